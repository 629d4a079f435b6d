"""How far a bfloat16 forward and backward of a released shape, cut to a few layers, is from float32 on the same device.

    python -m ltx_titan.benchmarks.precision [--shape ltx-2.3-22b] [--layers 4] [--out FILE.json]

Random seeded weights, one clip with a clean first frame. Errors are relative L2 norms. bfloat16 keeps 8 bits: one
rounding is 2 ** -9 = 0.2 % of a value, and the error of a residual stream grows with the square root of the number of
roundings, a few dozen per layer. The bound is 5 % for outputs and 10 % for any gradient, which passes through twice
as many.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from ltx_titan.conditioning import FlexibleStrategy, ModelInputs
from ltx_titan.diffusion import ShiftedLogitNormal, draw_step
from ltx_titan.model import LTXTransformer
from ltx_titan.model.init import init_random_
from ltx_titan.weights import released_config

OUTPUT_BOUND = 0.05
GRADIENT_BOUND = 0.10


def make_inputs(
    device: torch.device, transformer: dict, frames: int, height: int, width: int, seed: int = 0
) -> tuple[FlexibleStrategy, ModelInputs]:
    """A joint audio-video sample with a clean first frame; latent frames, height and width."""
    generator = torch.Generator().manual_seed(seed)
    steps = round(25 * (8 * (frames - 1) + 1) / 24)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = {
        "video_prompt_embeds": random(1, 1024, transformer["cross_attention_dim"]),
        "audio_prompt_embeds": random(1, 1024, transformer["audio_cross_attention_dim"]),
    }
    batch = {
        "video_latents": {"latents": random(1, 128, frames, height, width), "fps": torch.tensor([24.0])},
        "audio_latents": {"latents": random(1, 8, steps, 16)},
        "conditions": text,
    }
    batch = {source: {k: v.to(device) for k, v in fields.items()} for source, fields in batch.items()}
    blocks = {
        "name": "flexible",
        "video": {"is_generated": True, "latents_dir": "latents", "conditions": [{"type": "first_frame"}]},
        "audio": {"is_generated": True, "latents_dir": "audio_latents"},
    }
    strategy = FlexibleStrategy.from_config(blocks)
    draws = draw_step(*strategy.draw_plan(batch), sampler=ShiftedLogitNormal(), seed=seed, step=1, indices=[0])
    return strategy, strategy.prepare(batch, draws)


def run(model: LTXTransformer, strategy: FlexibleStrategy, inputs: ModelInputs) -> dict:
    """Loss, outputs, gradients and the second call's seconds of one forward and backward."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        outputs = model(inputs.video, inputs.audio)
        loss = strategy.loss(*outputs, inputs).total
        loss.backward()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - started
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": value, "outputs": outputs, "gradients": gradients, "seconds": seconds}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, L2."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()


def main() -> None:
    """Runs both precisions and prints the comparison; exits with 1 outside the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="ltx-2.3-22b", help="released shape or metadata file")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latent", type=int, nargs=3, default=(12, 14, 24), metavar=("F", "H", "W"))
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Float32 here means float32: no TF32 in the matrix products of the reference.
    torch.set_float32_matmul_precision("highest")
    transformer = {**released_config(arguments.shape)["transformer"], "num_layers": arguments.layers}
    with torch.device(device):
        model = LTXTransformer.from_config(transformer)
    init_random_(model, seed=0)
    strategy, inputs = make_inputs(device, transformer, *arguments.latent)
    exact = run(model, strategy, inputs)
    exact = {**exact, "outputs": [o.detach() for o in exact["outputs"]]}
    rough = run(model.to(torch.bfloat16), strategy, inputs)

    outputs = {s: relative_error(rough["outputs"][i], exact["outputs"][i]) for i, s in enumerate(("video", "audio"))}
    # A gradient that is nothing but rounding (of a bias that a norm takes out again) has no meaningful relative error.
    largest = max(g.norm().item() for g in exact["gradients"].values())
    errors = {
        name: relative_error(rough["gradients"][name], gradient)
        for name, gradient in exact["gradients"].items()
        if gradient.norm().item() > 1e-4 * largest
    }
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    row = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "shape": arguments.shape,
        "layers": arguments.layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "video_tokens": inputs.video.latent.shape[1],
        "audio_tokens": inputs.audio.latent.shape[1],
        "loss_fp32": exact["loss"],
        "loss_bf16": rough["loss"],
        "output_error": outputs,
        "gradient_error_median": sorted(errors.values())[len(errors) // 2],
        "gradient_error_worst": worst,
        "gradients_compared": len(errors),
        "seconds_fp32": exact["seconds"],
        "seconds_bf16": rough["seconds"],
        "peak_mem_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    print(json.dumps(row, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(row))
    if max(outputs.values()) > OUTPUT_BOUND or worst[0][1] > GRADIENT_BOUND:
        raise SystemExit(f"bfloat16 is outside the bounds ({OUTPUT_BOUND} outputs, {GRADIENT_BOUND} gradients).")


if __name__ == "__main__":
    main()
