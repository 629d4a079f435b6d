"""Work for ranks: the golden sampling run and held-out losses with a model that no rank holds whole."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ltx_titan.conditioning import FlexibleStrategy, Grid
from ltx_titan.config import Degrees, ValidationSection
from ltx_titan.diffusion import sample
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import build_mesh
from ltx_titan.parallel.tokens import shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel
from ltx_titan.validation import (
    Contexts,
    PreparedSample,
    SampleGroups,
    audio_start,
    condition_frames,
    evaluating,
    freeze,
    held_out_losses,
    sample_all,
    video_start,
)
from ltx_titan.validation.engine import SampledFile, gather_samples
from ltx_titan.validation.preview import Preview
from tests.diffusion.sampling_case import sampled_stream
from tests.golden_cases import load_case
from tests.model.golden_transformer import build_transformer

CASE = load_case("sampling_loop")
VIDEO_CHANNELS, AUDIO_WIDTH, TEXT = 10, 8, 12
# Two passes at a time: three per step where all four are needed.
SECTION = ValidationSection(
    samples=[{"prompt": "unused"}] * 3,
    inference_steps=2,
    stg_blocks=[1],
    tokens_at_once=30,
)


def sharded_model(degrees: Degrees) -> nn.Module:
    """The golden model on a mesh."""
    mesh = build_mesh("cpu", degrees)
    model = build_transformer(CASE)
    if degrees.tp * degrees.cp > 1:
        layout = shard_tokens(model, mesh)
        if degrees.tp > 1:
            apply_tensor_parallel(model, mesh, layout)
        apply_context_parallel(model, layout)
    apply_fsdp(model, model.transformer_blocks, mesh.fsdp, torch.float32)
    return model


def golden_run(degrees: Degrees) -> tuple[Tensor, Tensor]:
    """Final tokens of both streams."""
    model = sharded_model(degrees)
    with evaluating(model):
        video, audio = sampled_stream(CASE, "video"), sampled_stream(CASE, "audio")
        return sample(model, video, audio, CASE.tensors["input.sigmas"])


def prepared_samples() -> list[PreparedSample]:
    """Three that need different numbers of forwards: both streams, one frozen stream, and video alone."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def text() -> Contexts:
        return Contexts(*(draw(1, 5, TEXT) for _ in range(4)))

    video = video_start(Grid(3, 2, 2), 24.0, (8, 32, 32), channels=VIDEO_CHANNELS)
    audio = audio_start(6, width=AUDIO_WIDTH)
    first = condition_frames(video, draw(1, VIDEO_CHANNELS, 1, 2, 2))
    frozen_audio = freeze(audio, draw(1, AUDIO_WIDTH, 6, 1))
    return [
        PreparedSample(first, audio, text(), 0),
        PreparedSample(video, frozen_audio, text(), 1),
        PreparedSample(video, None, text(), 2),
    ]


def sample_tokens(model: nn.Module, groups: SampleGroups | None = None) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Latents of the samples of this rank's group."""
    found = sample_all(model, prepared_samples(), SECTION, "cpu", groups)
    return {index: (latents.video, latents.audio) for index, latents in found.items()}


def held_out(model: nn.Module, groups: SampleGroups | None = None) -> dict[str, float]:
    """Losses over three samples with a first frame that applies to about half of them."""
    first_frame = {"type": "first_frame", "probability": 0.5}
    strategy = FlexibleStrategy.from_config(
        {
            "video": {"is_generated": True, "latents_dir": "latents", "conditions": [first_frame]},
            "audio": {"is_generated": True, "latents_dir": "audio_latents"},
        }
    )
    return held_out_losses(model, strategy, held_out_sample, 3, (0.2, 0.8), 7, "cpu", groups)


def held_out_sample(index: int) -> dict[str, dict[str, Tensor]]:
    """A batch of one."""
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    return {
        "video_latents": {"latents": draw(VIDEO_CHANNELS, 2, 2, 2), "fps": torch.tensor([24.0])},
        "audio_latents": {"latents": draw(2, 5, 4)},
        "conditions": {"video_prompt_embeds": draw(5, TEXT), "audio_prompt_embeds": draw(5, TEXT)},
    }


def with_other_weights(model: nn.Module, groups: SampleGroups | None = None) -> dict:
    """Samples with all weights 1.1 times as large, as averaged weights are put in and taken out again."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    kept = [part.detach().clone() for part in parts]
    with torch.no_grad():
        for part in parts:
            part.mul_(1.1)
        found = sample_tokens(model, groups)
        for part, weight in zip(parts, kept, strict=True):
            part.copy_(weight)
    return found


def most_blocks_held(num_blocks: int) -> int:
    """Largest number of blocks that a rank holds whole while a deeper model is sampled under FSDP2."""
    model = LTXTransformer.from_config(CASE.entry["config"]["transformer"] | {"num_layers": num_blocks})
    blocks = model.transformer_blocks
    apply_fsdp(model, blocks, build_mesh("cpu", Degrees(dp_shard=2)).fsdp, torch.float32)
    held = []

    def count(*_: object) -> None:
        held.append(sum(any(not isinstance(p, DTensor) for p in block.parameters()) for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(count)  # after the one of FSDP2, which gathers
    sample_all(model, prepared_samples()[:1], SECTION, "cpu")
    return max(held)


def work() -> dict:
    """Everything that one start of two ranks can show."""
    meshes = {"fsdp2": Degrees(dp_shard=2), "tp2": Degrees(tp=2), "cp2": Degrees(cp=2)}
    runs = {name: golden_run(degrees) for name, degrees in meshes.items()}
    model = sharded_model(meshes["fsdp2"]).train()
    groups = SampleGroups(dist.get_rank(), 2, dist.group.WORLD)
    found = {
        "golden": runs,
        "other": with_other_weights(model, groups),
        "samples": sample_tokens(model, groups),
        "held_out": held_out(model, groups),
    }
    own = [SampledFile(index, "unused", Path(f"{index}"), Preview()) for index in (range(0, 3, 2), [1])[groups.rank]]
    found["held"] = most_blocks_held(6)
    found["files"] = [sample.index for sample in gather_samples(own, groups)]
    # Parameters are back in shards, and the model in training mode.
    return found | {
        "is_training": model.training and model.transformer_blocks[0].training,
        "local_numel": sum(p.to_local().numel() for p in model.parameters()),
        "numel": sum(p.numel() for p in model.parameters()),
    }
