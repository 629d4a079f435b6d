"""Fits validation into the memory that a job leaves free: how much that is, and the tiles of the video decoder."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ltx_titan.codecs import VideoCodec
from ltx_titan.common.hardware import GIB
from ltx_titan.common.tensors import on_meta
from ltx_titan.memory.live_bytes import LiveBytes
from ltx_titan.memory.peak import RESERVE

logger = logging.getLogger(__name__)

# Memory of a decoder beyond its tensors: convolution workspaces, and blocks that the allocator cannot reuse. Assumed.
_WORKSPACE = 1.25


@dataclass(frozen=True)
class Tiles:
    """Sizes and strides of a decoder's tiles.

    Attributes:
        size, stride: of spatial tiles, in pixels.
        time: size and stride in latent frames.
    """

    size: int
    stride: int
    time: tuple[int, int]


TILES = (
    # Those of the released pipelines: 768 pixels per side with an overlap of 64, and 81 frames (11 latent frames) with
    # an overlap of 24, that is a stride of 7 latent frames.
    Tiles(768, 704, (11, 7)),
    # Smaller ones have more seams, with the same overlaps.
    Tiles(512, 448, (11, 7)),
    # Below this the frames of a clip, in float32, take more than a tile.
    Tiles(384, 320, (11, 7)),
)


def memory_left(device: torch.device | str) -> float:
    """Bytes that can still be allocated on a device; infinite for a CPU."""
    if torch.device(device).type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    left = float(free + torch.cuda.memory_reserved(device) - allocated)
    share = torch.cuda.get_per_process_memory_fraction(device)
    if share < 1:
        # A smaller device is tried out, whose memory would also have to hold what is not allocated by torch.
        left = min(left, total * share - RESERVE - allocated)
    return left


def with_tiles(codec: VideoCodec, tiles: Tiles) -> VideoCodec:
    """The codec, decoding in tiles."""
    codec.vae.enable_tiling(
        tile_sample_min_height=tiles.size,
        tile_sample_min_width=tiles.size,
        tile_sample_stride_height=tiles.stride,
        tile_sample_stride_width=tiles.stride,
    )
    # Own tiles in time: those of diffusers are off by one frame after the first seam, see `VideoCodec`.
    return replace(codec, time_tiles=tiles.time)


def decoding_bytes(codec: VideoCodec, shape: torch.Size, tiles: Tiles) -> int:
    """Largest number of bytes that tensors hold while latents are decoded, without the weights.

    Counted on the meta device, with the operations of the real decoder.

    Args:
        codec: with a decoder.
        shape: of the latents [B, C, F, H, W].
        tiles: of the decoder.
    """
    with on_meta():
        vae = type(codec.vae).from_config(codec.vae.config).eval()
    nn.Module.to(vae, codec.vae.dtype)  # that of diffusers warns
    shapes = replace(codec, vae=vae, mean=codec.mean.to("meta"), std=codec.std.to("meta"))
    with LiveBytes() as live:
        with_tiles(shapes, tiles).decode(torch.empty(shape, device="meta"), torch.Generator())
    return live.peak


def fitting_tiles(codec: VideoCodec, shapes: Iterable[torch.Size], limit: float) -> Tiles:
    """The largest tiles whose decoding fits a number of bytes; the smallest ones with a warning if none do.

    Args:
        codec: with a decoder.
        shapes: of the latents that will be decoded, each [B, C, F, H, W].
        limit: bytes, such as `memory_left`.
    """
    if limit == float("inf"):
        return TILES[0]
    largest = max(shapes, key=lambda shape: shape.numel())
    for tiles in TILES:
        needed = _WORKSPACE * decoding_bytes(codec, largest, tiles)
        if needed <= limit:
            if tiles is not TILES[0]:
                logger.info(
                    "decoding in tiles of %d pixels and %d latent frames: %.1f GiB of %.1f free",
                    *(tiles.size, tiles.time[0], needed / GIB, limit / GIB),
                )
            return tiles
    logger.warning(
        "decoding: %.1f GiB expected with the smallest tiles, %.1f are free; set validation.offload_optimizer = true, "
        "or smaller validation.video_dims",
        *(needed / GIB, limit / GIB),
    )
    return TILES[-1]
