"""Models that `bench block` compares, each with a step (forward and backward) over its first n layers.

All have random bfloat16 weights of the same released shape and process one clip with audio: S video tokens, 126 audio
tokens, 1,024 text tokens. diffusers receives the inputs of a trainer, a timestep per token and a text mask of ones;
ours receives the distinct timesteps and no mask, which is equivalent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltx_titan.config import Float8Recipe
from ltx_titan.model import LTXTransformer, Modality, TransformerConfig
from ltx_titan.model.config import StreamConfig
from ltx_titan.model.init import init_random_
from ltx_titan.model.kernel_ops import KernelBackend, select_operators
from ltx_titan.model.rope import distinct_coordinates, midpoints
from ltx_titan.parallel.float8 import apply_float8
from ltx_titan.parallel.parallelize import apply_compile

AUDIO_TOKENS = 126
TEXT_TOKENS = 1024
_SIGMA = 0.7

# Latent frames, height and width: 89 and 185 frames of 768 x 448, and of 1536 x 896; 49 of 1280 x 704.
_GRIDS = {4_032: (12, 14, 24), 6_160: (7, 22, 40), 8_064: (24, 14, 24), 16_128: (12, 28, 48), 32_256: (24, 28, 48)}


@dataclass(frozen=True)
class BlockModel:
    """A model that can run any number of its layers.

    Attributes:
        step: one forward and backward over the first n layers; accumulates gradients.
        parameters: parameters of the layers of the last step, and of everything outside the layers.
        blocks: all layers.
    """

    step: Callable[[int], None]
    parameters: Callable[[], list[nn.Parameter]]
    blocks: nn.ModuleList


def our_model(
    backend: KernelBackend,
    transformer: dict,
    layers: int,
    tokens: int,
    timesteps: int,
    device: torch.device,
    recipe: Float8Recipe = "none",
) -> BlockModel:
    """LTXTransformer, its blocks compiled, with the operators of `backend` and a recipe of float8."""
    operators = select_operators(backend, device)
    with torch.device(device), _default_dtype(torch.bfloat16):
        model = LTXTransformer.from_config({**transformer, "num_layers": layers}, operators=operators)
    init_random_(model, seed=0)
    if recipe != "none":
        apply_float8(model, recipe, emulate=device.type == "cpu")
    if device.type == "cuda":
        apply_compile(model.transformer_blocks)
    blocks = model.transformer_blocks
    video, audio = _modalities(transformer, tokens, timesteps, device)

    def step(count: int) -> None:
        # A slice of the same blocks: one and four layers share weights and compiled code.
        model.transformer_blocks = blocks[:count]
        outputs = model(video, audio)
        dense_loss(outputs).backward()

    return BlockModel(step, lambda: list(model.parameters()), blocks)


def diffusers_model(transformer: dict, layers: int, tokens: int, device: torch.device) -> BlockModel:
    """Diffusers' LTX2VideoTransformer3DModel, its blocks compiled the same way.

    Raises:
        ImportError: diffusers is not installed.
    """
    model = build_diffusers(transformer, layers, device)
    if device.type == "cuda":
        compile_blocks(model.transformer_blocks)
    blocks = model.transformer_blocks
    inputs = diffusers_inputs(transformer, tokens, AUDIO_TOKENS, device)

    def step(count: int) -> None:
        model.transformer_blocks = blocks[:count]
        dense_loss(model(**inputs)).backward()

    return BlockModel(step, lambda: list(model.parameters()), blocks)


def build_diffusers(transformer: dict, layers: int, device: torch.device) -> Any:
    """Diffusers' LTX2VideoTransformer3DModel in bfloat16, with random weights.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import LTX2VideoTransformer3DModel

    config = TransformerConfig.from_metadata(transformer)
    with torch.device(device), _default_dtype(torch.bfloat16):
        model = LTX2VideoTransformer3DModel(
            num_attention_heads=config.video.heads,
            attention_head_dim=config.video.head_dim,
            cross_attention_dim=config.video.context_dim,
            audio_num_attention_heads=config.audio.heads,
            audio_attention_head_dim=config.audio.head_dim,
            audio_cross_attention_dim=config.audio.context_dim,
            num_layers=layers,
            cross_attn_mod=config.text_modulation,
            audio_cross_attn_mod=config.text_modulation,
            gated_attn=config.gated_attention,
            audio_gated_attn=config.gated_attention,
            rope_type="split",
            use_prompt_embeddings=False,
        )
    model.to(torch.bfloat16)
    init_random_(model, seed=0)
    return model


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compiles each block, static, as ours: the measured difference is then in the blocks."""
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def diffusers_inputs(transformer: dict, tokens: int, audio_tokens: int, device: torch.device) -> dict[str, Any]:
    """Arguments of diffusers' transformer for one clip of S video and A audio tokens."""
    video, audio = _modalities(transformer, tokens, 1, device, audio_tokens)
    # diffusers takes timesteps that are already scaled.
    sigma = torch.full((1,), _SIGMA * 1000, device=device)
    mask = torch.ones(1, TEXT_TOKENS, device=device)
    frames, height, width = _grid(tokens)
    return {
        "hidden_states": video.latent,
        "audio_hidden_states": audio.latent,
        "encoder_hidden_states": video.context,
        "audio_encoder_hidden_states": audio.context,
        "timestep": sigma[:, None].expand(1, tokens),
        "audio_timestep": sigma[:, None].expand(1, audio_tokens),
        "sigma": sigma,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio_tokens,
        "use_cross_timestep": True,
        "return_dict": False,
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Creates parameters in this dtype, which avoids a float32 copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dense_loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Any loss whose gradient is dense will do to time a step."""
    video, audio = (output.float().square().mean() for output in outputs)
    return video + audio


def _grid(tokens: int) -> tuple[int, int, int]:
    return _GRIDS.get(tokens, (tokens, 1, 1))


def _modalities(
    transformer: dict, tokens: int, timesteps: int, device: torch.device, audio_tokens: int = AUDIO_TOKENS
) -> tuple[Modality, Modality]:
    """One sample of both streams; with two timesteps the first latent frame is clean."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    frames, height, width = _grid(tokens)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (frames, height, width)]
    cell = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    start = cell * torch.tensor([8 / 24, 32.0, 32.0], device=device)[:, None]
    end = (cell + 1) * torch.tensor([8 / 24, 32.0, 32.0], device=device)[:, None]
    second = torch.arange(audio_tokens + 1, device=device, dtype=torch.float32) / 25
    sigma = torch.full((1,), _SIGMA, device=device)

    def modality(count: int, positions: Tensor, stream: StreamConfig, clean_mask: Tensor | None) -> Modality:
        values, index = distinct_coordinates(midpoints(positions))
        return Modality.from_sigma(
            draw(1, count, stream.in_channels),
            sigma,
            clean_mask,
            positions=positions,
            context=draw(1, TEXT_TOKENS, stream.context_dim),
            coordinate_values=values,
            coordinate_index=index,
        )

    config = TransformerConfig.from_metadata(transformer)
    clean_mask = None if timesteps == 1 else (cell[0] == 0)[None]
    audio_positions = torch.stack([second[:-1], second[1:]], dim=-1)[None, None]
    return (
        modality(tokens, torch.stack([start, end], dim=-1)[None], config.video, clean_mask),
        modality(audio_tokens, audio_positions, config.audio, None),
    )
