"""Where a sampled stream starts: which of its tokens are given, what lies beside them, and noise for the rest.

Everything here works on encoded latents; `encode` makes them from media files. A `StreamStart` holds what is known
before training and is kept on the host; `begin` adds text, guidance and noise when it is sampled.

References come after the target's tokens (in training they come before; attention does not mind, positions are what
counts) and are cut off by `target_tokens`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx_titan.conditioning import Coordinates, Grid, patchify_audio, patchify_video, unpatchify_audio, unpatchify_video
from ltx_titan.conditioning.references import reference_factors, scale_reference
from ltx_titan.conditioning.tokens import audio_coordinates, video_coordinates
from ltx_titan.diffusion import Guidance, SampledStream, noise_given

# An audio latent has 8 channels of 16 mel bins, one token per step.
AUDIO_CHANNELS, AUDIO_BINS = 8, 16


@dataclass(frozen=True)
class StreamStart:
    """One stream of one sample before sampling: `S` target tokens of width `C`, then those of its references.

    Attributes:
        grid: latent sizes of the target; audio is a grid of height and width 1.
        clean: given content [1, S + R, C], float32; zeros where a token is generated.
        given: True where a token is given [1, S + R].
        coordinates: of all tokens.
        num_marked: target tokens at the start that stand for a single pixel frame and are marked; 0 marks none.
        is_frozen: the whole stream is given.
    """

    grid: Grid
    clean: Tensor
    given: Tensor
    coordinates: Coordinates
    num_marked: int = 0
    is_frozen: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the model is given, references included."""
        return self.clean.shape[1]


def video_start(
    grid: Grid,
    fps: float,
    scale_factors: tuple[int, int, int],
    *,
    channels: int = 128,
    marks_first_frame: bool = False,
) -> StreamStart:
    """A video that is generated altogether.

    Args:
        grid: latent sizes.
        fps: frames per second.
        scale_factors: compression factors of the video codec (time, height, width).
        channels: of the latents.
        marks_first_frame: whether the model has an embedding for tokens of a single pixel frame (LTX-2.5).
    """
    coordinates = video_coordinates(grid, torch.tensor([fps]), scale_factors)
    marked = grid.tokens_per_frame if marks_first_frame else 0
    return _all_generated(grid, channels, coordinates, marked)


def audio_start(steps: int, *, width: int = AUDIO_CHANNELS * AUDIO_BINS) -> StreamStart:
    """An audio of so many latent steps that is generated altogether, in tokens of `width` channels."""
    return _all_generated(Grid(steps, 1, 1), width, audio_coordinates(steps, 1))


def frozen(start: StreamStart, latents: Tensor) -> StreamStart:
    """The stream with all of its target given: latents [1, C, F, H, W] or [1, 8, T, 16].

    Raises:
        ValueError: if their sizes are not the stream's.
    """
    whole = given_where(start, latents, torch.ones(start.grid.num_tokens, dtype=torch.bool))
    return replace(whole, is_frozen=True)


def given_frames(start: StreamStart, latents: Tensor, *, at_end: bool = False) -> StreamStart:
    """The stream with its first latent frames (or audio steps), or its last ones, given.

    Raises:
        ValueError: if the latents are larger than the stream or of other height and width.
    """
    tokens, grid = _tokens(latents)
    own = start.grid
    if grid.frames > own.frames or grid[1:] != own[1:]:
        raise ValueError(
            f"given latents are {_size(grid)} (frames, rows, columns), the sample's {_size(own)}; "
            "give a clip of the same size that is not longer."
        )
    first = (own.frames - grid.frames) * own.tokens_per_frame if at_end else 0
    return _with_given(start, tokens, torch.arange(first, first + grid.num_tokens))


def given_where(start: StreamStart, latents: Tensor, mask: Tensor) -> StreamStart:
    """The stream with the tokens given that a mask [S] marks True, from latents of the stream's own sizes.

    Raises:
        ValueError: if the latents' sizes are not the stream's, or the mask has not one element per token.
    """
    tokens, grid = _tokens(latents)
    if grid != start.grid or mask.numel() != grid.num_tokens:
        raise ValueError(
            f"given latents are {_size(grid)} (frames, rows, columns) with a mask of {mask.numel()} elements, the "
            f"sample is {_size(start.grid)}; give a clip and a mask of the sample's size and length."
        )
    places = mask.flatten().nonzero()[:, 0]
    return _with_given(start, tokens[:, places], places)


def with_video_reference(
    start: StreamStart, latents: Tensor, fps: float, scale_factors: tuple[int, int, int]
) -> StreamStart:
    """The stream with a reference video beside it.

    Its coordinates are stretched to the target's by the factors between their sizes, as in training.

    Args:
        start: the stream, without or with earlier references.
        latents: reference [1, C, F, H, W].
        fps: the reference's own frames per second: the sample's divided by the temporal factor.
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: if the reference's sizes are not in a whole ratio to the sample's.
    """
    tokens, grid = _tokens(latents)
    coordinates = video_coordinates(grid, torch.tensor([fps]), scale_factors)
    coordinates = scale_reference(coordinates, start.coordinates, *reference_factors(start.grid, grid))
    return _with_reference(start, tokens, coordinates)


def with_audio_reference(start: StreamStart, latents: Tensor) -> StreamStart:
    """The stream with a reference audio [1, 8, T, 16] beside it, whose time starts where the target's does."""
    tokens, grid = _tokens(latents)
    return _with_reference(start, tokens, audio_coordinates(grid.frames, 1))


def begin(
    start: StreamStart,
    context: Tensor,
    negative_context: Tensor | None,
    guidance: Guidance,
    generator: torch.Generator,
    noise_level: float,
    device: torch.device | str,
) -> SampledStream:
    """The stream at its first noise level.

    Args:
        start: what is given.
        context: text of the prompt [1, T, D].
        negative_context: text of the negative prompt, None where guidance does not ask for it.
        guidance: the stream's weights.
        generator: source of the noise, drawn on its device for the target's tokens alone: a reference moves no noise.
        noise_level: first value of the schedule.
        device: where the run takes place.
    """
    clean = start.clean.to(device)
    mask = (~start.given).float()[:, :, None].to(device)
    noise = torch.zeros_like(start.clean)
    if not start.is_frozen:
        shape = (1, start.grid.num_tokens, start.clean.shape[2])
        target_noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
        noise[:, : start.grid.num_tokens] = target_noise.to(noise.device)
    marker = None
    if start.num_marked:
        marker = torch.zeros_like(mask)
        marker[:, : start.num_marked] = 1
    coordinates = start.coordinates
    return SampledStream(
        latent=noise_given(torch.zeros_like(clean), clean, noise.to(device), mask, noise_level),
        clean=clean,
        denoise_mask=mask,
        positions=coordinates.positions.to(device),
        context=context.to(device),
        negative_context=None if negative_context is None else negative_context.to(device),
        guidance=guidance,
        is_frozen=start.is_frozen,
        keyframes_mask=marker,
        coordinate_values=tuple(axis.to(device) for axis in coordinates.midpoints),
        coordinate_index=coordinates.index.to(device),
    )


def target_latents(tokens: Tensor, start: StreamStart, stream: str) -> Tensor:
    """Sampled tokens [1, S + R, C] as latents [1, C, F, H, W] (video) or [1, 8, T, 16] (audio), references cut off."""
    tokens = tokens[:, : start.grid.num_tokens]
    return unpatchify_video(tokens, start.grid) if stream == "video" else unpatchify_audio(tokens, AUDIO_CHANNELS)


def _all_generated(grid: Grid, width: int, coordinates: Coordinates, num_marked: int = 0) -> StreamStart:
    clean = torch.zeros(1, grid.num_tokens, width)
    return StreamStart(grid, clean, torch.zeros(1, grid.num_tokens, dtype=torch.bool), coordinates, num_marked)


def _tokens(latents: Tensor) -> tuple[Tensor, Grid]:
    if latents.ndim == 5:
        return patchify_video(latents).float(), Grid(*latents.shape[2:])
    assert latents.ndim == 4, f"latents have shape {list(latents.shape)}"
    return patchify_audio(latents).float(), Grid(latents.shape[2], 1, 1)


def _with_given(start: StreamStart, tokens: Tensor, places: Tensor) -> StreamStart:
    if tokens.shape[2] != start.clean.shape[2]:
        raise ValueError(
            f"given tokens have {tokens.shape[2]} channels, the sample's {start.clean.shape[2]}; they come from "
            "another codec than the model's."
        )
    clean, given = start.clean.clone(), start.given.clone()
    clean[:, places] = tokens.cpu()
    given[:, places] = True
    return replace(start, clean=clean, given=given)


def _with_reference(start: StreamStart, tokens: Tensor, coordinates: Coordinates) -> StreamStart:
    return replace(
        start,
        clean=torch.cat([start.clean, tokens.cpu()], dim=1),
        given=torch.cat([start.given, torch.ones(tokens.shape[:2], dtype=torch.bool)], dim=1),
        coordinates=coordinates.prepend(start.coordinates),
    )


def _size(grid: Grid) -> str:
    return " x ".join(map(str, grid))
