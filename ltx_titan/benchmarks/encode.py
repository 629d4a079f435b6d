"""Times the encoder of a released video VAE with random weights: speed and memory, whole clips and tiles.

    ltx-titan bench encode [--clip 1280x704x121] [--shape ltx-2.3-22b] [--out FILE]

One clip of random pixels at a time, as `process-dataset` encodes. Medians of 5 after 2, without
reading and decoding the file.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.common.options import Maybe, parse_size, placeholder
from ltx_titan.weights import released_config, scale_factors

if TYPE_CHECKING:
    from ltx_titan.codecs import VideoCodec

DESCRIPTION = __doc__

_WARMUP, _STEPS = 2, 5
_GIB = 2**30


@dataclass(frozen=True)
class EncodeOptions:
    """Options of `ltx-titan bench encode`."""

    shape: str = "ltx-2.3-22b"
    """Released model, or JSON file with checkpoint metadata."""

    clip: Annotated[str, placeholder("WxHxF")] = "1280x704x121"
    """Size of the clip: width and height in pixels, and frames."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""


def run(options: EncodeOptions) -> int:
    """Times whole clips and tiles; the exit status is 1 if one of them runs out of memory."""
    width, height, frames = parse_size(options.clip, "--clip")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Random pixels: a GPU draws less power on constant data and clocks higher.
    pixels = torch.rand(1, 3, frames, height, width, device=device) * 2 - 1
    rows, failures = [], 0
    for tiling in (False, True):
        row: dict[str, Any] = {**environment(device), "shape": options.shape, "clip": options.clip, "tiling": tiling}
        try:
            row |= measure(random_codec(options.shape, device, tiling=tiling), pixels)
        except torch.OutOfMemoryError as error:
            failures += 1
            row["error"] = str(error)[:300]
        rows.append(row)
        memory = f", {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
        found = row.get("error") or f"{row['clip_s']:.2f} s a clip, {row['clips_per_s']:.2f} clips/s{memory}"
        print(f"{options.clip} {'in tiles' if tiling else 'whole'}: {found}", flush=True)
        write_rows(options.out, rows)
    return 1 if failures else 0


def random_codec(shape: str, device: torch.device, *, tiling: bool) -> "VideoCodec":
    """The encoder of a released VAE with random weights, in the dtype that `load_video_codec` would choose."""
    # Here, because they import diffusers, which takes seconds.
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

    from ltx_titan.codecs.video_vae import TILE, TILE_STRIDE, VideoCodec, video_vae_layout

    config = released_config(shape)
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**video_vae_layout(config["vae"]).arguments)
    vae.decoder = None
    vae.to(torch.float32 if device.type == "cpu" else torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in vae.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)
    if tiling:
        vae.enable_tiling(TILE, TILE, tile_sample_stride_height=TILE_STRIDE, tile_sample_stride_width=TILE_STRIDE)
    channels = vae.config.latent_channels
    # Neutral statistics: normalization costs the same with any.
    mean, std = torch.zeros(channels, 1, 1, 1, device=device), torch.ones(channels, 1, 1, 1, device=device)
    return VideoCodec(vae.requires_grad_(False).eval(), mean, std, scale_factors(config))


def measure(codec: "VideoCodec", pixels: torch.Tensor) -> dict[str, object]:
    """Seconds per clip, clips per second, and peak memory."""
    on_gpu = pixels.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(_WARMUP + _STEPS):
        started = time.perf_counter()
        latents = codec.encode(pixels)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    # The first calls select cuDNN's algorithms and grow the allocator's pool.
    times = times[_WARMUP:]
    return {
        "clip_s": median(times),
        "clips_per_s": 1 / median(times),
        "spread": (max(times) - min(times)) / median(times),
        "latent": list(latents.shape[1:]),
        "peak_gib": torch.cuda.max_memory_allocated() / _GIB if on_gpu else None,
    }
