"""Training of the miniature's codecs on procedural clips: video VAE, audio VAE, vocoder.

Codecs see every shape, color and combination, as released ones have seen far more than any one fine-tuning; what is
held out is held out from the transformer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor

from ltx_titan.benchmarks.nano.loop import Inputs, train
from ltx_titan.codecs import AudioCodec, VideoCodec
from ltx_titan.codecs.audio_vae import mel_settings
from ltx_titan.codecs.mel import log_mel, resample
from ltx_titan.nano.clip_score import adherence, measure
from ltx_titan.nano.clips import ALL_SHAPES, SAMPLE_RATE, Clips, combinations, draw_clips, render_audio, render_video
from ltx_titan.nano.trained_config import TRAINED_CONFIG
from ltx_titan.nano.trained_pack import (
    CODEC_MANTISSA_BITS,
    audio_codec,
    latent_statistics,
    stored,
    video_codec,
    vocoder_of,
)

_SHAPES = range(len(ALL_SHAPES))
_EVERYTHING = combinations(held_out=False, shapes=_SHAPES) + combinations(held_out=True)
_KL_WEIGHT = 1e-5
# Noise on latents in training, as a fraction of their spread: what a transformer predicts is never exact.
_LATENT_NOISE = 0.03
_MEL = mel_settings(TRAINED_CONFIG["audio_vae"])
_FFT_SIZES = (256, 512, 1024, 2048)
# Short windows have wide bins: a tone of nearly the right pitch is nearly right there.
_TRAINING_FFT_SIZES = (64, 128, 256, 512, 1024, 2048)
_STATISTICS_CLIPS = 128
# Range of random gains of what the vocoder learns from, and weights of the errors of level and balance.
_LEAST_GAIN, _GREATEST_GAIN = math.exp(-2.0), math.exp(0.4)
_LEVEL_WEIGHT, _BALANCE_WEIGHT = 1.0, 4.0
# Spectrogram frames of a sample: the generator is local, and half of a clip is silent.
_SEGMENT_FRAMES = 32


def random_clips(count: int, seed: int, device: torch.device | str) -> Clips:
    """Clips of all shapes."""
    return draw_clips(count, seed, _EVERYTHING).to(device)


def held_out_clips(count: int, device: torch.device | str, seed: int = 1) -> Clips:
    """Clips of held-out combinations."""
    return draw_clips(count, 10**6 + seed, combinations(held_out=True)).to(device)


def train_video_vae(
    vae: AutoencoderKLLTX2Video, device: str, seconds: float, batch: int, lr: float, save: Callable[[], None]
) -> dict[str, Any]:
    """Trains on L1 and squared error with a small KL term; returns the figures."""
    vae.to(device, memory_format=torch.channels_last_3d).train()

    def inputs_of(step: int) -> Inputs:
        pixels = render_video(random_clips(batch, step, device))
        return (pixels.contiguous(memory_format=torch.channels_last_3d),)

    def loss_of(pixels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(_noisy(posterior.mean, posterior.logvar)).sample.float()
        error = decoded - pixels
        kl = _kl(posterior.mean, posterior.logvar)
        squared = error.square().mean()
        loss = error.abs().mean() + 4 * squared + _KL_WEIGHT * kl
        return {"loss": loss, "psnr": -10 * (squared / 4).log10(), "kl": kl}

    return train("video VAE", vae.parameters(), inputs_of, loss_of, seconds=seconds, lr=lr, save=save)


def train_audio_vae(vae: AutoencoderKLLTX2Audio, device: str, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    """Trains on errors of log-mel spectrograms and of their balance with a small KL term; returns the figures."""
    vae.to(device, memory_format=torch.channels_last).train()

    def inputs_of(step: int) -> Inputs:
        mel = log_mel(render_audio(random_clips(batch, step, device)), _MEL)
        return (mel.contiguous(memory_format=torch.channels_last),)

    def loss_of(mel: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            posterior = vae.encode(mel).latent_dist
            decoded = vae.decode(_noisy(posterior.mean, posterior.logvar)).sample.float()
        mel = mel[:, :, : decoded.shape[2]]
        error = decoded - mel
        # A few decibels between the channels are little in the error of all bins: it counts where there is a tone.
        is_loud = (mel > mel.amax((1, 2, 3), keepdim=True) - 2).any(1)
        balance = ((error[:, 1] - error[:, 0]).abs() * is_loud).sum() / is_loud.sum()
        kl = _kl(posterior.mean, posterior.logvar)
        loss = error.abs().mean() + 0.1 * error.square().mean() + balance + 10 * _KL_WEIGHT * kl
        return {"loss": loss, "mel_l1": error.abs().mean(), "balance": balance, "kl": kl}

    return train("audio VAE", vae.parameters(), inputs_of, loss_of, seconds=seconds, lr=lr)


def train_vocoder(
    generator: LTX2Vocoder, codec: AudioCodec, device: str, seconds: float, batch: int, lr: float
) -> dict[str, Any]:
    """Trains the generator of one channel on spectra of several resolutions; returns the figures.

    Half of the spectrograms have been through the audio VAE, as all have when sampling. The channels of a clip are
    samples of their own.
    """
    generator.to(device).train()
    final, generator.final_act_fn = generator.final_act_fn, None

    def inputs_of(step: int) -> Inputs:
        audio = render_audio(random_clips(batch, step, device))
        # Louder and softer than any clip: at nearly equal levels a generator learns one, and ignores the balance.
        draws = torch.rand(len(audio[1::2]), 2, 1, device=device)
        gains = _LEAST_GAIN * (_GREATEST_GAIN / _LEAST_GAIN) ** draws
        audio = torch.cat([audio[::2], gains * audio[1::2]])
        with torch.no_grad():
            decoded = codec.decode(codec.encode(audio[: len(audio) - len(gains)], SAMPLE_RATE))
        mel = torch.cat([decoded, log_mel(audio, _MEL)[len(decoded) :, :, : decoded.shape[2]]])
        frames = min(mel.shape[2], audio.shape[-1] // _MEL.hop_length)
        first = int(torch.randint(frames - _SEGMENT_FRAMES, ()))
        mel = mel[:, :, first : first + _SEGMENT_FRAMES]
        audio = audio[..., first * _MEL.hop_length : (first + _SEGMENT_FRAMES) * _MEL.hop_length]
        # [B, 2, ...] -> [2 B, 1, ...].
        return mel.flatten(0, 1)[:, None].contiguous(), audio.flatten(0, 1)[:, None].contiguous()

    def loss_of(mel: Tensor, target: Tensor) -> dict[str, Tensor]:
        # Phase is free, so only the spectra are compared.
        output = generator(mel)[..., : target.shape[-1]]
        spectral = _weighted_spectral_loss(output, target)
        level, balance, follows = _compare_levels(output, target)
        loss = spectral + _LEVEL_WEIGHT * level + _BALANCE_WEIGHT * balance
        return {"loss": loss, "spectral": spectral, "level": level, "balance": balance, "follows": follows}

    figures = train(
        "vocoder",
        generator.parameters(),
        inputs_of,
        loss_of,
        seconds=seconds,
        lr=lr,
        weight_decay=0.0,
        warmup=50,
        log_every=25,
    )
    generator.final_act_fn = final
    shift = shift_levels(generator, codec, device)
    return {**figures, "shift": shift}


@torch.no_grad()
def shift_levels(generator: LTX2Vocoder, codec: AudioCodec, device: str, clips: int = 24) -> dict[str, float]:
    """Moves the generator to the levels at which it follows them best, in place.

    A generator that has learned a range of levels compresses the loudest, where most clips are. Its first convolution
    then reads softer spectrograms, and its last one is louder for it: for one that follows all levels, the same.

    Returns:
        The shift of the log spectrograms, the gain of the output in nepers, and the errors of level and balance.
    """
    audio = render_audio(draw_clips(clips, 77, combinations(held_out=False)).to(device))
    mel = codec.decode(codec.encode(audio, SAMPLE_RATE)).flatten(0, 1)[:, None]
    response = generator.conv_in.weight.sum((1, 2))
    bias = generator.conv_in.bias.clone()
    best: dict[str, float] = {}
    for shift in (0.0, 0.5, 1.0, 1.5):
        generator.conv_in.bias.copy_(bias - shift * response)
        output = torch.cat([generator(part) for part in mel.split(16)])
        length = min(output.shape[-1], audio.shape[-1])
        output, target = output[..., :length], audio[..., :length].flatten(0, 1)[:, None]
        power = [signal.unflatten(0, (-1, 2)).square().mean((1, 2, 3)) for signal in (output, target)]
        gain = float(0.5 * (power[1] / power[0]).log().median())
        level, balance, _ = (float(value) for value in _compare_levels(math.exp(gain) * output, target))
        if not best or level + balance < best["level"] + best["balance"]:
            best = {"shift": shift, "gain": gain, "level": level, "balance": balance}
    generator.conv_in.bias.copy_(bias - best["shift"] * response)
    generator.conv_out.weight.mul_(math.exp(best["gain"]))
    return best


def _weighted_spectral_loss(output: Tensor, target: Tensor) -> Tensor:
    """Distance of log magnitudes in which loud bins weigh more, over all training resolutions.

    With equal weights silence is a local minimum: a tone of the wrong pitch is twice as far from the target.
    """
    losses = []
    for size in _TRAINING_FFT_SIZES:
        ours, theirs = _magnitudes(output, size), _magnitudes(target, size)
        weight = 1 + theirs / theirs.mean((1, 2), keepdim=True).clamp(min=1e-5)
        error = ((ours + 1e-4).log() - (theirs + 1e-4).log()).abs()
        losses.append((weight * error).sum() / weight.sum())
    return torch.stack(losses).mean()


def _compare_levels(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of the loudness over time and of the balance in nepers, and how far the output's balance follows.

    A few decibels are little in a spectral loss, and of the error of the loudness most is common to both channels of a
    clip, which are neighbors in the batch.

    Returns:
        Mean error of the loudness, of its difference between the channels, and the slope of that difference against the
        target's: 1 for a vocoder that keeps levels, 0 for one that ignores them.
    """
    levels = []
    for audio in (output, target):
        power = _magnitudes(audio, 1024).square().sum(1)
        levels.append(0.5 * (power + 1e-6).log())
    is_loud = (power > 0.1 * power.amax(1, keepdim=True)).float()
    both = is_loud[::2] * is_loud[1::2]
    ours, theirs = (level[1::2] - level[::2] for level in levels)
    slope = (both * ours * theirs).sum() / (both * theirs.square()).sum().clamp(min=1e-6)
    level = ((levels[0] - levels[1]).abs() * is_loud).sum() / is_loud.sum().clamp(min=1)
    return level, ((ours - theirs).abs() * both).sum() / both.sum().clamp(min=1), slope.detach()


def _magnitudes(audio: Tensor, size: int) -> Tensor:
    """[B, channels, N] -> [B * channels, bins, T]; 0.5 for a sine of amplitude 1."""
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio.flatten(0, 1), size, size // 4, window=window, return_complex=True).abs() / window.sum()


def spectral_distance(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of magnitudes, relative to the target's, and mean distance of log magnitudes, over four resolutions.

    Args:
        output, target: [B, 2, N].
    """
    linear, logarithmic = [], []
    for size in _FFT_SIZES:
        ours, theirs = _magnitudes(output, size), _magnitudes(target, size)
        linear.append((ours - theirs).square().sum().sqrt() / theirs.square().sum().sqrt())
        logarithmic.append(((ours + 1e-4).log() - (theirs + 1e-4).log()).abs().mean())
    return torch.stack(linear).mean(), torch.stack(logarithmic).mean()


@torch.no_grad()
def measured_video_codec(vae: AutoencoderKLLTX2Video, device: str) -> VideoCodec:
    """The codec with weights as stored, and statistics of the transformer's training clips."""
    _as_stored(vae, device)
    clips = draw_clips(_STATISTICS_CLIPS, 7, combinations(held_out=False)).to(device)
    raw = [vae.encode(render_video(clips[i : i + 64])).latent_dist.mode() for i in range(0, len(clips), 64)]
    return video_codec(vae, *latent_statistics(torch.cat(raw).transpose(0, 1)))


@torch.no_grad()
def measured_audio_codec(vae: AutoencoderKLLTX2Audio, device: str) -> AudioCodec:
    """As `measured_video_codec`, for audio."""
    _as_stored(vae, device)
    clips = draw_clips(_STATISTICS_CLIPS, 7, combinations(held_out=False)).to(device)
    raw = vae.encode(log_mel(render_audio(clips), _MEL)).latent_dist.mode()
    # One entry per (channel, frequency).
    return audio_codec(vae, *latent_statistics(raw.permute(1, 3, 0, 2).flatten(0, 1)))


@torch.no_grad()
def score_video(codec: VideoCodec, clips: Clips) -> dict[str, float]:
    """PSNR in dB (mean over clips, and the worst) of reconstructions, and what the scorer reads off them."""
    frames = render_video(clips)
    decoded = torch.cat([codec.decode(codec.encode(part)) for part in frames.split(32)]).clamp(-1, 1)
    psnr = -10 * ((decoded - frames).square().flatten(1).mean(1) / 4).log10()
    scores = adherence(measure(decoded, render_audio(clips), SAMPLE_RATE), clips)
    found = {key: scores[key] for key in ("shape", "color", "size", "background", "motion", "sync_time")}
    return {"psnr_db": float(psnr.mean()), "worst_psnr_db": float(psnr.min()), **found}


@torch.no_grad()
def score_audio(codec: AudioCodec, vocoder: LTX2VocoderWithBWE, clips: Clips) -> dict[str, float]:
    """Distances of reconstructed spectrograms and waveforms, and what the scorer reads off the latter."""
    audio = render_audio(clips)
    mel = log_mel(audio, codec.mel)
    decoded = codec.decode(codec.encode(audio, SAMPLE_RATE))
    play = vocoder_of(vocoder.to(audio.device).eval())
    waveform = torch.cat([play(part) for part in decoded.split(32)])
    rate = play.sample_rate
    scores = adherence(measure(render_video(clips), waveform, rate), clips)
    found = {key: scores[key] for key in ("register", "tone_motion", "pitch", "sync_time")}
    back = resample(waveform, rate, SAMPLE_RATE)
    length = min(back.shape[-1], audio.shape[-1])
    linear, logarithmic = spectral_distance(back[..., :length], audio[..., :length])
    return {
        "mel_l1": float((decoded - mel[:, :, : decoded.shape[2]]).abs().mean()),
        "spectral_distance": float(linear),
        "log_spectral_distance_db": float(logarithmic) * 20 / math.log(10),
        **found,
    }


def _as_stored(module: torch.nn.Module, device: str) -> None:
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(stored(parameter, CODEC_MANTISSA_BITS))
    module.to(device).eval()


def _noisy(mean: Tensor, logvar: Tensor) -> Tensor:
    """A sample of the posterior with a floor on its noise."""
    spread = mean.detach().float().std() * _LATENT_NOISE
    std = torch.maximum((0.5 * logvar.float().clamp(-20, 10)).exp(), spread)
    return mean + std * torch.randn_like(std)


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean KL divergence to the standard normal per latent number."""
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
