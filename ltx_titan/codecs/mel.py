"""Waveform to log-mel spectrogram, the input of the audio VAE, and resampling, in plain torch.

The spectrogram is not part of any checkpoint, yet the audio latents depend on every detail of it: magnitude (not
power), Slaney mel scale with area normalization, natural logarithm with a floor of 1e-5, centered frames with
reflected edges. Own code avoids a dependency on torchaudio, whose builds have to match torch's.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# The Slaney mel scale: linear below 1000 Hz (3 mel per 200 Hz), logarithmic above (27 mel per factor of 6.4).
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0

# Low-pass filter of the resampler: zero crossings on each side of the sinc, and cutoff as a fraction of Nyquist.
_RESAMPLE_WIDTH = 6
_RESAMPLE_ROLLOFF = 0.99


@dataclass(frozen=True)
class MelSettings:
    """Parameters of the spectrogram; the defaults are those of all published audio VAEs.

    Attributes:
        sample_rate: Hz.
        filter_length: samples per frame, also the length of the Hann window.
        hop_length: samples between frames.
        bands: number of mel bands.
        low_hz: lower edge of the lowest band.
        high_hz: upper edge of the highest band.
    """

    sample_rate: int = 16000
    filter_length: int = 1024
    hop_length: int = 160
    bands: int = 64
    low_hz: float = 0.0
    high_hz: float = 8000.0


def log_mel(waveform: Tensor, settings: MelSettings) -> Tensor:
    """Log-mel spectrogram [..., 1 + N // hop, bands] of a waveform [..., N] at the settings' sample rate.

    ln(max(|STFT| @ mel, 1e-5)) with a periodic Hann window, centered frames and reflected edges.

    Raises:
        ValueError: the waveform is too short for reflect padding.
    """
    needed = settings.filter_length // 2 + 1
    if waveform.shape[-1] < needed:
        raise ValueError(f"audio of {waveform.shape[-1]} samples is too short to encode, expected at least {needed}")
    # `torch.stft` takes one batch dimension.
    flat = waveform.float().reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(
        flat,
        n_fft=settings.filter_length,
        hop_length=settings.hop_length,
        window=torch.hann_window(settings.filter_length, periodic=True, device=waveform.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    filters = slaney_filters(
        settings.filter_length, settings.bands, settings.sample_rate, settings.low_hz, settings.high_hz
    )
    # Magnitude before the filter bank: a power spectrogram would give other latents without an error.
    mel = spectrum.abs().transpose(1, 2) @ filters.to(waveform.device).T
    return mel.clamp(min=1e-5).log().reshape(*waveform.shape[:-1], *mel.shape[-2:])


@cache
def slaney_filters(filter_length: int, bands: int, sample_rate: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangular mel filters [bands, filter_length // 2 + 1], each scaled by 2 / (its width in Hz), float32."""
    # float64 until the end: bands at low frequencies are only a few bins wide.
    edges = torch.linspace(_hz_to_mel(low_hz), _hz_to_mel(high_hz), bands + 2, dtype=torch.float64)
    edges_hz = torch.where(
        edges < _LOG_START_MEL,
        edges * _LINEAR_HZ_PER_MEL,
        _LOG_START_HZ * torch.exp(_LOG_STEP * (edges - _LOG_START_MEL)),
    )
    bins_hz = torch.linspace(0, sample_rate / 2, filter_length // 2 + 1, dtype=torch.float64)
    left, center, right = (edges_hz[i : bands + i, None] for i in range(3))
    rising = (bins_hz - left) / (center - left)
    falling = (right - bins_hz) / (right - center)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _LOG_START_MEL + math.log(hz / _LOG_START_HZ) / _LOG_STEP


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Changes the sample rate of a waveform [..., N]; returns [..., ceil(N * to_rate / from_rate)], float32.

    Band-limited interpolation: each output sample is the input convolved with sinc(c t) * cos^2(pi c t / 12), six zero
    crossings wide, at a cutoff of 0.99 of the lower Nyquist frequency. Edges are padded with zeros.
    """
    divisor = math.gcd(from_rate, to_rate)
    step, phases = from_rate // divisor, to_rate // divisor
    if step == phases:
        return waveform.float()
    kernels, reach = _resample_kernels(step, phases)
    samples = waveform.shape[-1]
    # Zeros on both sides, and one more step at the end for the last partial block.
    flat = F.pad(waveform.float().reshape(-1, 1, samples), (reach, reach + step))
    # One strided convolution yields all phases of an output block as channels; interleaving them gives the samples.
    blocks = F.conv1d(flat, kernels.to(flat.device)[:, None], stride=step)
    resampled = blocks.transpose(1, 2).reshape(*waveform.shape[:-1], -1)
    return resampled[..., : math.ceil(samples * phases / step)]


@cache
def _resample_kernels(step: int, phases: int) -> tuple[Tensor, int]:
    """Filters [phases, step + 2 * reach] of the reduced ratio phases / step, and their half width `reach`."""
    # The lower of both Nyquist frequencies: against images when upsampling, aliases when downsampling.
    cutoff = min(step, phases) * _RESAMPLE_ROLLOFF
    reach = math.ceil(_RESAMPLE_WIDTH * step / cutoff)
    inputs = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    outputs = torch.arange(phases, dtype=torch.float64) / phases
    time = ((inputs[None] - outputs[:, None]) * cutoff).clamp(-_RESAMPLE_WIDTH, _RESAMPLE_WIDTH)
    # A Hann window over the truncated sinc, against ringing.
    window = torch.cos(time * math.pi / _RESAMPLE_WIDTH / 2) ** 2
    return (torch.sinc(time) * window * cutoff / step).float(), reach
