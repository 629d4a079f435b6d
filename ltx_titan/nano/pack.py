"""A miniature but complete LTX-2.3 pack with seeded random weights, in the official layout.

It replaces the real 46 GB wherever the mechanics matter and not the output: test jobs, tutorials, the test suite. All
commands read it like the real pack. The statistics of its VAEs are measured on synthetic clips and audio, so that
latents of natural ones have a mean near 0 and a standard deviation near 1, as the diffusion process expects.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ltx_titan.codecs.audio_vae import audio_vae_arguments, mel_settings
from ltx_titan.codecs.mel import log_mel, slaney_filters
from ltx_titan.codecs.video_vae import video_vae_layout
from ltx_titan.codecs.vocoder import build_vocoder, stored_vocoder_name
from ltx_titan.common.options import Flag, Positional
from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.nano.archive import TEXT_ENCODER_NAME, unpack_trained_nano
from ltx_titan.nano.pack_config import CONFIG, MODEL_VERSION, TEXT_ENCODER
from ltx_titan.nano.text_encoder import IMAGE_TOKENS, SPECIAL_TOKENS, fast_tokenizer, write_gemma3
from ltx_titan.weights import save_safetensors
from ltx_titan.weights.names import TRANSFORMER_PREFIX

DESCRIPTION = """\
Write a miniature LTX-2.3 pack: transformer, connectors, text projection, video and audio VAE and vocoder in one
safetensors file of 20 MB in the official layout, and a tiny Gemma text encoder next to it. All commands work on it
as on the real pack. Use it to try a job before downloading 46 GB.

The weights are random, so its clips are noise. `--trained` writes a larger one (30 MB) that generates what `ltx-titan
make-clips` shows: a colored shape that moves, and a tone that follows it.

examples:
  ltx-titan make-nano nano/
  ltx-titan make-nano nano/ --trained
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "256x160x25" \\
      --model-path nano/ltx-2.3-nano.safetensors --text-encoder-path nano/text_encoder
"""

CHECKPOINT_NAME = "ltx-2.3-nano.safetensors"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class NanoOptions:
    """Options of `ltx-titan make-nano`."""

    out: Positional[Path]
    """Folder to write to; created if it does not exist."""

    shape: Literal["2.3", "2.5"] = "2.3"
    """Layout: one file of LTX-2.3 and a folder with its text encoder, or the four files of LTX-2.5."""

    seed: int = 0
    """Seed of random weights; the same seed gives the same bytes."""

    trained: Flag = False
    """Write the trained pack, which ships with the package."""


def run(options: NanoOptions) -> int:
    """Runs the command; returns the exit status."""
    if options.shape == "2.5":
        if options.trained:
            raise ValueError("--trained: expected --shape 2.3, found 2.5, of which no trained pack exists; omit one.")
        # Imported here: it builds on this module.
        from ltx_titan.nano.split_pack import make_split_nano

        for name, file in make_split_nano(options.out, options.seed)._asdict().items():
            print(f"{name.replace('_', ' '):13} {file} ({file.stat().st_size / 2**20:.1f} MiB)")
        return 0
    path = unpack_trained_nano(options.out) if options.trained else make_nano(options.out, options.seed)
    print(f"checkpoint    {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    print(f"text encoder  {path.parent / TEXT_ENCODER_NAME}")
    return 0


def make_nano(folder: str | Path, seed: int = 0) -> Path:
    """Writes the pack, `ltx-2.3-nano.safetensors` and `text_encoder/`; the same bytes for the same seed.

    Returns:
        The path of the checkpoint file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        **_transformer_tensors(seed),
        **video_vae_tensors(seed + 1),
        **audio_vae_tensors(seed + 2),
        **vocoder_tensors(seed + 3),
    }
    path = folder / CHECKPOINT_NAME
    metadata = {"config": json.dumps(CONFIG), "model_version": MODEL_VERSION}
    save_safetensors(path, tensors, metadata)
    write_gemma3(folder / TEXT_ENCODER_NAME, _byte_tokens(), TEXT_ENCODER, seed + 4)
    return path


def _transformer_tensors(seed: int) -> dict[str, Tensor]:
    """Transformer, connectors and text projection under their official names, bfloat16."""
    return {
        **module_tensors(TRANSFORMER_PREFIX, LTXTransformer.from_config(CONFIG["transformer"]), seed),
        **module_tensors(TRANSFORMER_PREFIX, TextConnectors.from_config(CONFIG), seed),
        **module_tensors("text_embedding_projection.", FeatureExtractor.from_config(CONFIG, TEXT_ENCODER), seed),
    }


def module_tensors(prefix: str, module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights of a module under its official names, bfloat16."""
    init_random_(module, seed)
    # Initial zeros and ones would hide a bias or norm weight that is never used.
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.ndim == 1:
            tensor = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        if name in ("proj_out.weight", "audio_proj_out.weight"):
            # As large as in a trained model: the small initial heads would hide the effect of a LoRA below them.
            tensor = 10 * tensor
        tensors[prefix + name] = tensor.to(torch.bfloat16)
    return tensors


def video_vae_tensors(seed: int) -> dict[str, Tensor]:
    """Random video VAE under its official names, with measured statistics, bfloat16."""
    layout = video_vae_layout(CONFIG["vae"])
    generator = torch.Generator().manual_seed(seed)
    vae = _random_codec(AutoencoderKLLTX2Video(**layout.arguments), generator)
    tensors = {
        f"vae.{layout.stored_name(name)}": tensor.to(torch.bfloat16)
        for name, tensor in vae.state_dict().items()
        if not name.startswith("latents_")
    }
    with torch.no_grad():
        latents = torch.cat([vae.encode(clip[None]).latent_dist.mode() for clip in _synthetic_clips(generator)])
    # [clips, C, F, H, W] -> [C, clips * F * H * W].
    return tensors | statistics("vae.", latents.transpose(0, 1).flatten(1))


def audio_vae_tensors(seed: int, section: dict[str, Any] = CONFIG["audio_vae"]) -> dict[str, Tensor]:
    """Random audio VAE under its official names, with measured statistics, bfloat16.

    Args:
        seed: of the weights.
        section: `audio_vae` of the metadata.
    """
    generator = torch.Generator().manual_seed(seed)
    vae = _random_codec(AutoencoderKLLTX2Audio(**audio_vae_arguments(section)), generator)
    tensors = {
        f"audio_vae.{name}": tensor.to(torch.bfloat16)
        for name, tensor in vae.state_dict().items()
        if not name.startswith("latents_")
    }
    settings = mel_settings(section)
    with torch.no_grad():
        spectrograms = log_mel(_synthetic_audio(generator, settings.sample_rate), settings)
        latents = vae.encode(spectrograms).latent_dist.mode()
    # Statistics have the packed layout: one entry per (channel, frequency).
    return tensors | statistics("audio_vae.", latents.permute(1, 3, 0, 2).flatten(0, 1).flatten(1))


def vocoder_tensors(seed: int) -> dict[str, Tensor]:
    """Random vocoder under its official names."""
    section = CONFIG["vocoder"]
    model = build_vocoder(section)
    _random_codec(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # Random layers have large outputs: unscaled, their sum would be clipped almost everywhere.
        model.vocoder.conv_out.weight *= 0.03
        model.bwe_generator.conv_out.weight *= 0.005
    fill_spectrogram_buffers(model, section)
    parameters = {name for name, _ in model.named_parameters()}
    # Filters and bases are exact, and rounding them would only degrade the audio.
    return {
        "vocoder." + stored_vocoder_name(name, True): tensor.to(torch.bfloat16) if name in parameters else tensor
        for name, tensor in model.state_dict().items()
    }


def fill_spectrogram_buffers(model: LTX2VocoderWithBWE, section: dict[str, Any]) -> None:
    """Fills the windowed DFT and the mel filters of the bandwidth extension in place.

    Args:
        model: the vocoder.
        section: `vocoder` of the metadata.
    """
    stft = model.mel_stft.stft_fn
    stft.forward_basis.copy_(_causal_stft_basis(stft.window_length))
    # Never used by the vocoder, but the file must hold all of its buffers.
    stft.inverse_basis.copy_(stft.forward_basis / stft.window_length)
    bwe = section["bwe"]
    filters = slaney_filters(bwe["n_fft"], bwe["num_mels"], bwe["input_sampling_rate"], 0.0, 8000.0)
    model.mel_stft.mel_basis.copy_(filters)


def _causal_stft_basis(length: int) -> Tensor:
    """Real and imaginary rows of the windowed DFT [2 * (length // 2 + 1), 1, length]."""
    time = torch.arange(length, dtype=torch.float64)
    frequency = torch.arange(length // 2 + 1, dtype=torch.float64)
    angle = 2 * math.pi * frequency[:, None] * time / length
    window = torch.hann_window(length, periodic=True, dtype=torch.float64)
    return (torch.cat([angle.cos(), -angle.sin()]) * window)[:, None].float()


@torch.no_grad()
def _random_codec(module: Module, generator: torch.Generator) -> Module:
    """Fills convolutions with N(0, 1 / fan_in) and one-dimensional parameters with values near zero."""
    for _, parameter in sorted(module.named_parameters()):
        fan_in = parameter[0].numel()
        std = 0.02 if parameter.ndim == 1 else 1 / math.sqrt(fan_in)
        # The codec computes with what the file will hold.
        parameter.copy_((std * torch.randn(parameter.shape, generator=generator)).to(torch.bfloat16))
    return module.eval()


def _synthetic_clips(generator: torch.Generator, clips: int = 4, frames: int = 17, size: int = 128) -> Tensor:
    """Clouds of all sizes, with about the spectrum of photographs: [clips, 3, frames, size, size] in [-1, 1]."""
    total = torch.zeros(clips, 3, frames, size, size)
    cells = 1
    while cells <= size:
        noise = torch.randn(clips, 3, 3, cells, cells, generator=generator)
        # [clips, 3, 3, cells, cells]: three key frames, so the clouds drift over time.
        cloud = F.interpolate(noise, (frames, size, size), mode="trilinear", align_corners=True)
        # Amplitude falls with frequency, as in photographs: white noise would give the encoder's statistics of noise.
        total += cloud / math.sqrt(cells)
        cells *= 2
    return (0.4 * total).clamp(-1, 1)


def _synthetic_audio(generator: torch.Generator, sample_rate: int, clips: int = 4, seconds: float = 1.5) -> Tensor:
    """Chords over noise with varying envelopes and volumes, some near silence [clips, 2, N]."""
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    result = torch.zeros(clips, 2, len(time))
    for audio in result:
        for _ in range(6):
            hertz, phase, rate, pan = torch.rand(4, generator=generator).tolist()
            envelope = torch.sin(math.pi * (0.3 + 1.5 * rate) * time + 6.3 * phase).clamp(min=0) ** 2
            # 80 Hz to 4 kHz, evenly in the logarithm.
            tone = torch.sin(2 * math.pi * 80 * 50**hertz * time) * envelope
            audio += 0.2 * tone * torch.tensor([[pan], [1 - pan]])
        noise = torch.randn(2, len(time), generator=generator).cumsum(-1)
        # Brown noise without its slow drift, which would be a constant offset.
        noise = noise - F.avg_pool1d(noise[None], 255, 1, 127)[0]
        audio += 0.01 * noise
        # Down to -40 dB.
        audio *= 10 ** (-2 * torch.rand(1, generator=generator))
    return result


def statistics(prefix: str, values: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of raw latents [C, samples] under their names in checkpoints."""
    return {
        # Rounded, so that the file does not depend on the order in which a machine sums.
        f"{prefix}per_channel_statistics.mean-of-means": values.mean(1).to(torch.bfloat16),
        f"{prefix}per_channel_statistics.std-of-means": values.std(1).to(torch.bfloat16),
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per UTF-8 byte after BOS: it needs no training text and accepts any script."""
    return fast_tokenizer(_byte_tokens())


def _byte_tokens() -> Tokenizer:
    # Tokens of images last: Gemma 4's layout has the same numbers for bytes, and no such tokens.
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *IMAGE_TOKENS]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return tokenizer
