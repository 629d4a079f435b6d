import math

import numpy as np
import pytest
import torch

from ltx_titan.codecs.mel import MelSettings, log_mel, resample, slaney_filters


def naive_log_mel(samples, settings):
    """The definition, with sums over samples and explicit triangles."""
    n, hop = settings.filter_length, settings.hop_length
    padded = np.pad(samples, n // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    turns = np.exp(-2j * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(n)) / n)
    frames = [padded[i * hop : i * hop + n] * window for i in range(1 + len(samples) // hop)]
    magnitude = np.abs(np.array(frames) @ turns.T)

    def mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    def hertz(value):
        return value * 200 / 3 if value < 15 else 1000 * 6.4 ** ((value - 15) / 27)

    top = mel(settings.high_hz)
    edges = [hertz(top * i / (settings.bands + 1)) for i in range(settings.bands + 2)]
    filters = np.zeros((settings.bands, n // 2 + 1))
    for band in range(settings.bands):
        low, center, high = edges[band : band + 3]
        for k in range(n // 2 + 1):
            hz = k * settings.sample_rate / n
            if low < hz <= center:
                filters[band, k] = (hz - low) / (center - low) * 2 / (high - low)
            elif center < hz < high:
                filters[band, k] = (high - hz) / (high - center) * 2 / (high - low)
    return np.log(np.maximum(magnitude @ filters.T, 1e-5))


def test_log_mel_follows_its_definition(generator):
    settings = MelSettings()
    samples = torch.randn(3200, generator=generator) * 0.3
    # A stretch of digital silence reaches the floor of the logarithm.
    samples[1600:] = 0
    expected = naive_log_mel(samples.double().numpy(), settings)
    actual = log_mel(samples, settings)
    assert actual.shape == (21, 64)
    assert actual.min() == pytest.approx(math.log(1e-5))
    # Only above the floor: frames that end in silence consist of float32 rounding in the FFT.
    loud = expected > math.log(1e-3)
    np.testing.assert_allclose(actual.numpy()[loud], expected[loud], atol=2e-4)


def test_filters_have_unit_area_where_the_grid_resolves_them():
    filters = slaney_filters(1024, 64, 16000, 0.0, 8000.0)
    area_hz = filters.sum(1) * 16000 / 1024
    assert torch.allclose(area_hz[40:], torch.ones(24), atol=0.02)


def test_too_short_audio_is_refused():
    with pytest.raises(ValueError, match="too short"):
        log_mel(torch.zeros(500), MelSettings())


@pytest.mark.parametrize("rate", [48000, 44100, 24000, 8000, 11025])
def test_resampling_preserves_a_tone(rate):
    seconds, hertz = 0.5, 440.0
    tone = torch.sin(2 * math.pi * hertz * torch.arange(int(rate * seconds)) / rate)
    resampled = resample(tone[None], rate, 16000)
    assert resampled.shape == (1, math.ceil(len(tone) * 16000 / rate))
    expected = torch.sin(2 * math.pi * hertz * torch.arange(resampled.shape[1]) / 16000)
    middle = slice(500, -500)
    # The filter's pass band has ripples of a few thousandths.
    torch.testing.assert_close(resampled[0, middle], expected[middle], atol=5e-3, rtol=0)


def test_resampling_removes_frequencies_above_the_new_nyquist():
    tone = torch.sin(2 * math.pi * 12000 * torch.arange(24000) / 48000)
    assert resample(tone, 48000, 16000)[500:-500].abs().max() < 0.02
