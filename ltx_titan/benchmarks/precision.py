"""Error of a bfloat16 forward and backward against float32, for a few layers of a released shape on the same device.

    python -m ltx_titan.benchmarks.precision [--shape ltx-2.3-22b] [--layers 4] [--float8 native] [--out FILE.json]

Random seeded weights, one clip with a clean first frame. Errors are relative L2 norms. bfloat16 keeps 8 bits: one
rounding is 2 ** -9 = 0.2 % of a value, and the error of a residual stream grows with the square root of the number of
roundings, a few dozen per layer. The bound is 5 % for outputs and 10 % for any gradient, which passes through twice
as many.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ltx_titan.benchmarks.measure import environment
from ltx_titan.common.files import write_text
from ltx_titan.common.options import Maybe, parse_options, placeholder
from ltx_titan.conditioning import FlexibleStrategy, ModelInputs
from ltx_titan.diffusion import ShiftedLogitNormal, draw_step
from ltx_titan.model import LTXTransformer
from ltx_titan.model.init import init_random_
from ltx_titan.parallel.float8 import apply_float8
from ltx_titan.weights import released_config

OUTPUT_BOUND = 0.05
GRADIENT_BOUND = 0.10


@dataclass(frozen=True)
class PrecisionOptions:
    """Options of the precision benchmark."""

    shape: str = "ltx-2.3-22b"
    """Released model, or JSON file with checkpoint metadata."""

    layers: int = 4
    """Number of transformer blocks."""

    latent: Annotated[tuple[int, int, int], placeholder("F H W")] = (12, 14, 24)
    """Latent frames, height and width."""

    float8: tuple[Literal["native", "tensorwise", "rowwise"], ...] = ()
    """Recipes of float8 to compare as well, eager; without bounds."""

    out: Maybe[Path] = None
    """File for the result (.json)."""


def make_inputs(
    device: torch.device, transformer: dict, frames: int, height: int, width: int, seed: int = 0
) -> tuple[FlexibleStrategy, ModelInputs]:
    """A joint audio-video sample with a clean first frame; `frames`, `height` and `width` are those of the latents."""
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
    """Loss, outputs and gradients of one forward and backward, and the seconds of the second call."""
    # Twice: the first call includes the selection of kernels.
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        video, audio = model(inputs.video, inputs.audio)
        loss = strategy.loss(video, audio, inputs).total
        loss.backward()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - started
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": value, "outputs": (video, audio), "gradients": gradients, "seconds": seconds}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, L2."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()


def gradient_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of gradients, but of those that are only rounding (of a bias that a norm cancels)."""
    largest = max(g.norm().item() for g in exact.values())
    return {
        name: relative_error(found[name], gradient)
        for name, gradient in exact.items()
        if gradient.norm().item() > 1e-4 * largest
    }


def main() -> None:
    """Runs both precisions and prints the comparison; exits with 1 outside the bounds."""
    options = parse_options(PrecisionOptions, sys.argv[1:], prog="ltx_titan.benchmarks.precision", description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # No TF32 in the matmuls of the float32 reference.
    torch.set_float32_matmul_precision("highest")
    transformer = {**released_config(options.shape)["transformer"], "num_layers": options.layers}
    with torch.device(device):
        model = LTXTransformer.from_config(transformer)
    init_random_(model, seed=0)
    strategy, inputs = make_inputs(device, transformer, *options.latent)
    assert inputs.video is not None and inputs.audio is not None
    exact = run(model, strategy, inputs)
    # Frees the graph of the float32 run.
    exact = {**exact, "outputs": [o.detach() for o in exact["outputs"]]}
    # The same weights, rounded in place, instead of a second model.
    rough = run(model.to(torch.bfloat16), strategy, inputs)

    outputs = {s: relative_error(rough["outputs"][i], exact["outputs"][i]) for i, s in enumerate(("video", "audio"))}
    errors = gradient_errors(rough["gradients"], exact["gradients"])
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    parameters = sum(p.numel() for p in model.parameters())
    float8 = {}
    for recipe in options.float8:
        with torch.device(device):
            model = LTXTransformer.from_config(transformer)
        init_random_(model, seed=0)
        model.to(torch.bfloat16)
        apply_float8(model, recipe, emulate=device.type == "cpu")
        found = run(model, strategy, inputs)
        all_errors = sorted(gradient_errors(found["gradients"], exact["gradients"]).items(), key=lambda item: -item[1])
        float8[recipe] = {
            "loss": found["loss"],
            "output_error": [relative_error(o, e) for o, e in zip(found["outputs"], exact["outputs"], strict=True)],
            "gradient_error_median": all_errors[len(all_errors) // 2][1],
            "gradient_error_worst": all_errors[:5],
        }
    row = {
        **environment(device),
        "shape": options.shape,
        "layers": options.layers,
        "parameters": parameters,
        "video_tokens": inputs.video.latent.shape[1],
        "audio_tokens": inputs.audio.latent.shape[1],
        "loss_fp32": exact["loss"],
        "loss_bf16": rough["loss"],
        "output_error": outputs,
        "gradient_error_median": sorted(errors.values())[len(errors) // 2],
        "gradient_error_worst": worst,
        "gradients_compared": len(errors),
        "float8": float8,
        "seconds_fp32": exact["seconds"],
        "seconds_bf16": rough["seconds"],
        "peak_mem_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    print(json.dumps(row, indent=1))
    if options.out is not None:
        write_text(options.out, json.dumps(row))
    if max(outputs.values()) > OUTPUT_BOUND or worst[0][1] > GRADIENT_BOUND:
        raise SystemExit(f"bfloat16 is outside the bounds ({OUTPUT_BOUND} outputs, {GRADIENT_BOUND} gradients).")


if __name__ == "__main__":
    main()
