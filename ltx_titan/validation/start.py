"""Initial latents for sampling: conditioned tokens, references and noise.

Everything here works on encoded latents; `encode` makes them from media files. A `StreamTokens` holds one stream of one
sample (a batch of one) on the host, from before training until it is sampled; `begin` adds text, guidance and noise.
Which tokens are conditioned, where references are placed and what is marked is decided in `conditioning.conditioned`,
for training and sampling alike.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ltx_titan.conditioning import (
    Batch,
    Clip,
    FlexibleStrategy,
    Grid,
    StreamTokens,
    audio_coordinates,
    frames_mask,
    latent_grid,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_coordinates,
)
from ltx_titan.config.streams import FixedLatentTime, Span
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS
from ltx_titan.diffusion import Guidance, SampledStream, initial_latent


def video_start(
    grid: Grid,
    fps: float,
    scale_factors: tuple[int, int, int],
    *,
    channels: int = VIDEO_CHANNELS,
    marks_first_frame: bool = False,
) -> StreamTokens:
    """Creates a video that is generated entirely.

    Args:
        grid: latent sizes.
        fps: frames per second.
        scale_factors: compression factors of the video codec (time, height, width).
        channels: of the latents.
        marks_first_frame: whether the model has an embedding for tokens of a single pixel frame (LTX-2.5).
    """
    coordinates = video_coordinates(grid, torch.tensor([fps]), scale_factors)
    return _empty(Clip(torch.zeros(1, grid.num_tokens, channels), grid, coordinates), marks_first_frame)


def audio_start(steps: int, *, width: int = AUDIO_CHANNELS * AUDIO_BINS) -> StreamTokens:
    """Creates audio of `steps` latent steps that is generated entirely, in tokens of `width` channels."""
    return _empty(Clip(torch.zeros(1, steps, width), Grid(steps, 1, 1), audio_coordinates(steps, 1)))


def dataset_starts(strategy: FlexibleStrategy, batch: Batch) -> dict[str, StreamTokens]:
    """Creates the streams of a prepared sample, conditioned as in training when all conditions fire.

    Args:
        strategy: of the job.
        batch: one sample on the host, with text contexts.

    Raises:
        ValueError: the sample does not fit the job; see `FlexibleStrategy.prepare`.
    """
    starts = {}
    for name, tokens in strategy.clean_streams(batch).items():
        target, conditioned = tokens.target, tokens.conditioned
        if conditioned is None:
            conditioned = torch.zeros(target.tokens.shape[:2], dtype=torch.bool)
        if not tokens.is_frozen:
            # What is to be generated must not be seen, not even by mistake.
            known = torch.where(conditioned[:, :, None], target.tokens, torch.zeros_like(target.tokens))
            target = target._replace(tokens=known)
        # References are appended when sampling, see `StreamTokens`.
        starts[name] = replace(tokens, target=target, conditioned=conditioned, references_first=False)
    return starts


def freeze(tokens: StreamTokens, latents: Tensor) -> StreamTokens:
    """Fixes the whole target to latents [1, C, F, H, W] or [1, 8, T, 16].

    Raises:
        ValueError: their sizes are not the stream's.
    """
    whole = condition_where(tokens, latents, torch.ones(tokens.target.grid.num_tokens, dtype=torch.bool))
    return replace(whole, is_frozen=True)


def condition_frames(tokens: StreamTokens, latents: Tensor, *, at: FixedLatentTime = "first") -> StreamTokens:
    """Conditions on latent frames (or audio steps) of the target.

    Args:
        tokens: the stream.
        latents: content [1, C, F, H, W] or [1, 8, T, 16]; its length is the number of conditioned frames or steps.
        at: the first of them, negative from the end, or where in the target they are.

    Raises:
        ValueError: the latents are not within the target or of other height and width.
    """
    content, grid = _patchify(latents)
    own = tokens.target.grid
    mask = frames_mask(own, [Span(at, grid.frames)])
    if grid[1:] != own[1:] or int(mask.sum()) != grid.num_tokens:
        raise ValueError(
            f"conditioning latents at {at} are {grid} (frames, rows, columns), the sample's {own}; "
            "use a clip of the same size that fits there."
        )
    return _condition(tokens, mask, content)


def condition_where(tokens: StreamTokens, latents: Tensor, mask: Tensor) -> StreamTokens:
    """Conditions on the tokens that a mask [S] marks True, from latents of the target's own sizes.

    Raises:
        ValueError: the latents' sizes are not the target's, or the mask does not have one element per token.
    """
    content, grid = _patchify(latents)
    own = tokens.target.grid
    if grid != own or mask.numel() != grid.num_tokens:
        raise ValueError(
            f"conditioning latents are {grid} (frames, rows, columns) with a mask of {mask.numel()} elements, the "
            f"sample is {own}; use a clip and a mask of the sample's size and length."
        )
    mask = mask.flatten().bool()[None]
    return _condition(tokens, mask, content[:, mask[0]])


def with_video_reference(
    tokens: StreamTokens, latents: Tensor, fps: float, scale_factors: tuple[int, int, int]
) -> StreamTokens:
    """Adds a reference video, with coordinates scaled to the target's.

    Args:
        tokens: the stream, without or with earlier references.
        latents: reference [1, C, F, H, W].
        fps: the reference's own frames per second: the sample's divided by the temporal factor.
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: the reference's sizes are not in a whole ratio to the sample's.
    """
    content, grid = _patchify(latents)
    coordinates = video_coordinates(grid, torch.tensor([fps]), scale_factors)
    return tokens.add_reference(Clip(content.cpu(), grid, coordinates))


def with_audio_reference(tokens: StreamTokens, latents: Tensor) -> StreamTokens:
    """Adds reference audio [1, 8, T, 16], which starts at the same time as the target."""
    content, grid = _patchify(latents)
    return tokens.add_reference(Clip(content.cpu(), grid, audio_coordinates(grid.frames, 1)))


def begin(
    tokens: StreamTokens,
    context: Tensor,
    negative_context: Tensor | None,
    guidance: Guidance,
    generator: torch.Generator,
    sigma: float,
    device: torch.device | str,
    result: Tensor | None = None,
) -> SampledStream:
    """Adds noise, text and guidance: the state of a stream before the first step.

    Args:
        tokens: target and references.
        context: text of the prompt [1, T, D].
        negative_context: text of the negative prompt, None if guidance needs no unconditional pass.
        guidance: the stream's weights.
        generator: source of the noise, drawn on its device for the target's tokens alone: a reference changes no noise.
        sigma: first sigma of the schedule.
        device: device of the run.
        result: latents of an earlier run to refine [1, C, F, H, W] or [1, 8, T, 16], of the target's sizes; None starts
            from noise alone.
    """
    target = tokens.target
    clean_mask = tokens.clean_mask
    if tokens.is_frozen:
        # A frozen stream has no clean mask (its sigma is 0 instead), but the sampler reads one.
        denoise_mask = tokens.extend(torch.zeros(1, target.grid.num_tokens), 0)
        noise = torch.zeros_like(target.tokens)
    else:
        assert clean_mask is not None, "a stream to sample starts with an empty mask"
        denoise_mask = (~clean_mask).float()
        # On the generator's device (the host): every mesh and GPU samples the same clip.
        noise = torch.randn(target.tokens.shape, generator=generator, device=generator.device, dtype=torch.float32)
    clean = tokens.with_references(target.tokens).to(device)
    denoise_mask = denoise_mask[:, :, None].to(device)
    noise = tokens.extend(noise.to(target.tokens.device), 0).to(device)
    marker = tokens.keyframes_mask
    coordinates = tokens.coordinates
    start = torch.zeros_like(clean)
    if result is not None:
        start = tokens.extend(_patchify(result)[0].to(target.tokens.device), 0).to(device)
    return SampledStream(
        latent=initial_latent(start, clean, noise, denoise_mask, sigma),
        clean=clean,
        denoise_mask=denoise_mask,
        positions=coordinates.positions.to(device),
        context=context.to(device),
        negative_context=None if negative_context is None else negative_context.to(device),
        guidance=guidance,
        is_frozen=tokens.is_frozen,
        keyframes_mask=None if marker is None else marker.to(device),
        # Compact form as well, so that the model does not search for distinct coordinates in every step.
        coordinate_values=tuple(axis.to(device) for axis in coordinates.midpoints),
        coordinate_index=coordinates.index.to(device),
    )


def target_latents(sampled: Tensor, tokens: StreamTokens, stream: str) -> Tensor:
    """Turns sampled tokens [1, S + R, C] into latents [1, C, F, H, W] (video) or [1, 8, T, 16] (audio)."""
    sampled = tokens.select_target(sampled)
    if stream == "video":
        return unpatchify_video(sampled, tokens.target.grid)
    return unpatchify_audio(sampled, AUDIO_CHANNELS)


def _empty(target: Clip, marks_first_frame: bool = False) -> StreamTokens:
    # All False rather than None: `begin` reads a mask of every stream that is not frozen.
    nothing = torch.zeros(target.tokens.shape[:2], dtype=torch.bool)
    # References are appended when sampling, see `StreamTokens`.
    return StreamTokens(target, nothing, references_first=False, marks_first_frame=marks_first_frame)


def _patchify(latents: Tensor) -> tuple[Tensor, Grid]:
    tokens = patchify_video(latents) if latents.ndim == 5 else patchify_audio(latents)
    return tokens.float(), latent_grid(latents)


def _condition(tokens: StreamTokens, mask: Tensor, content: Tensor) -> StreamTokens:
    width = tokens.target.tokens.shape[2]
    if content.shape[2] != width:
        raise ValueError(
            f"conditioning tokens have {content.shape[2]} channels, the sample's {width}; they come from "
            "another codec than the model's."
        )
    return tokens.condition(mask, content.cpu())
