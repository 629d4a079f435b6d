"""Modules of the trained miniature pack, and the official file that holds them.

The recipe (`benchmarks.nano`) trains the modules; `save_pack` writes them as the released files are laid out, so that
every command of this project, diffusers and the released loaders read them.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from ltx_titan.codecs import AudioCodec, VideoCodec, Vocoder
from ltx_titan.codecs.audio_vae import audio_vae_arguments, mel_settings, packed_statistics
from ltx_titan.codecs.video_vae import video_vae_layout
from ltx_titan.codecs.vocoder import build_vocoder, stored_vocoder_name, vocoder_arguments
from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.nano.pack import fill_spectrogram_buffers, statistics
from ltx_titan.nano.pack_config import MODEL_VERSION
from ltx_titan.nano.text_encoder import IMAGE_TOKENS, SPECIAL_TOKENS, write_gemma3
from ltx_titan.nano.trained_config import MAX_TOKENS, MONO_WIDTH, TEXT_ENCODER, TRAINED_CONFIG, VOCABULARY
from ltx_titan.weights import save_safetensors

# Mantissa bits of the weights of the codecs; the transformer has all 7 of bfloat16.
CODEC_MANTISSA_BITS = 5
# Parameters of the connectors without which a block adds nothing.
_SILENT = ("learnable_registers", "attn1.to_out.0.weight", "ff.net.2.weight")
_TRANSFORMER, _TEXT_PROJECTION = "model.diffusion_model.", "text_embedding_projection."


def build_video_vae() -> AutoencoderKLLTX2Video:
    """The video VAE, with diffusers' initial weights."""
    return AutoencoderKLLTX2Video(**video_vae_layout(TRAINED_CONFIG["vae"]).arguments)


def build_audio_vae() -> AutoencoderKLLTX2Audio:
    """The audio VAE, with diffusers' initial weights."""
    return AutoencoderKLLTX2Audio(**audio_vae_arguments(TRAINED_CONFIG["audio_vae"]))


def build_pack_vocoder() -> LTX2VocoderWithBWE:
    """The vocoder, with diffusers' initial weights; its bandwidth extension adds nothing."""
    section = TRAINED_CONFIG["vocoder"]
    model = build_vocoder(section)
    assert isinstance(model, LTX2VocoderWithBWE)
    fill_spectrogram_buffers(model, section)
    nn.init.zeros_(model.bwe_generator.conv_out.weight)
    return model


def build_mono_vocoder() -> LTX2Vocoder:
    """The 16 kHz generator of one channel, with diffusers' initial weights; see `stereo_vocoder`."""
    arguments = vocoder_arguments(TRAINED_CONFIG["vocoder"])
    names = (
        *("upsample_kernel_sizes", "upsample_factors", "resnet_kernel_sizes", "resnet_dilations"),
        *("act_fn", "antialias", "final_act_fn", "final_bias"),
    )
    return LTX2Vocoder(
        in_channels=64, hidden_channels=MONO_WIDTH, out_channels=1, **{name: arguments[name] for name in names}
    )


@torch.no_grad()
def stereo_vocoder(mono: LTX2Vocoder) -> LTX2VocoderWithBWE:
    """The pack's vocoder, which does for each channel what `mono` does for one."""
    model = build_pack_vocoder()
    weights = dict(mono.named_parameters())
    for name, parameter in model.vocoder.named_parameters():
        weight = weights[name]
        if weight.ndim == 1:
            parameter.copy_(torch.cat([weight, weight]))
            continue
        # Both kinds of convolution have two dims of channels first.
        parameter.zero_()
        rows, columns = weight.shape[:2]
        parameter[:rows, :columns] = weight
        parameter[rows:, columns:] = weight
    return model


@torch.no_grad()
def mono_vocoder(stereo: LTX2VocoderWithBWE) -> LTX2Vocoder:
    """The generator of one channel that `stereo_vocoder` was given."""
    model = build_mono_vocoder()
    weights = dict(stereo.vocoder.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
    return model


def build_text_modules(seed: int) -> tuple[FeatureExtractor, TextConnectors]:
    """Text projection and connectors with seeded random weights, which are never trained.

    A projection of random features keeps words apart, which is all that the transformer's text attention needs. The
    connectors add nothing to it, and their registers are zeros: a thousand random ones would hide twenty words.
    """
    extractor = FeatureExtractor.from_config(TRAINED_CONFIG, TEXT_ENCODER)
    connectors = TextConnectors.from_config(TRAINED_CONFIG)
    for module in (extractor, connectors):
        init_random_(module, seed)
        for name, parameter in module.named_parameters():
            if name.endswith(_SILENT):
                nn.init.zeros_(parameter)
        # The file stores bfloat16: features are computed with what it will hold.
        module.to(torch.bfloat16).float().requires_grad_(False).eval()
    return extractor, connectors


def build_transformer(seed: int) -> LTXTransformer:
    """The transformer, with seeded initial weights."""
    model = LTXTransformer.from_config(TRAINED_CONFIG["transformer"])
    init_random_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Nearly the same at all sigmas at first, with open gates: random ones switch half of the layers off.
            if re.search(r"adaln_single\.linear\.weight$", name):
                parameter.mul_(0.1)
            elif name.endswith("scale_shift_table") and len(parameter) == 9:
                parameter[[2, 5, 8]] = 1.0
            elif "scale_shift_table_a2v_ca" in name:
                parameter[4] = 0.5
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if name.endswith("attn2.to_q.bias"):
                # Of the 1024 tokens of a context about 1000 are zeros: queries start out averse to them.
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameters[name.replace("to_q", "to_k")].copy_(-0.3 * parameter)
    return model


def video_codec(vae: AutoencoderKLLTX2Video, mean: Tensor, std: Tensor) -> VideoCodec:
    """Codec of a VAE and the statistics of its raw latents [128]."""
    return VideoCodec(vae, mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1), (8, 32, 32))


def audio_codec(vae: AutoencoderKLLTX2Audio, mean: Tensor, std: Tensor) -> AudioCodec:
    """Codec of a VAE and the packed statistics of its raw latents [128]."""
    channels = vae.config.latent_channels
    unpacked = packed_statistics(mean, channels), packed_statistics(std, channels)
    return AudioCodec(vae, *unpacked, mel_settings(TRAINED_CONFIG["audio_vae"]))


def vocoder_of(model: LTX2VocoderWithBWE) -> Vocoder:
    """Vocoder of a model."""
    return Vocoder(model, model.config.output_sampling_rate)


def save_pack(
    path: Path,
    video: VideoCodec,
    audio: AudioCodec,
    vocoder: LTX2VocoderWithBWE,
    transformer: LTXTransformer,
    text: tuple[FeatureExtractor, TextConnectors],
    facts: dict[str, str],
) -> None:
    """Writes all parts but the text encoder into one file in the official layout, in bfloat16.

    Args:
        path: the file.
        video, audio, vocoder, transformer, text: the parts.
        facts: further entries of the header, such as the commit of the recipe.
    """
    layout = video_vae_layout(TRAINED_CONFIG["vae"])
    tensors = {
        f"vae.{layout.stored_name(name)}": tensor
        for name, tensor in video.vae.state_dict().items()
        if not name.startswith("latents_")
    }
    tensors |= {
        f"audio_vae.{name}": tensor
        for name, tensor in audio.vae.state_dict().items()
        if not name.startswith("latents_")
    }
    for prefix, mean, std in (("vae.", video.mean, video.std), ("audio_vae.", audio.mean, audio.std)):
        tensors[f"{prefix}per_channel_statistics.mean-of-means"] = mean.flatten()
        tensors[f"{prefix}per_channel_statistics.std-of-means"] = std.flatten()
    extractor, connectors = text
    for prefix, module in ((_TRANSFORMER, transformer), (_TRANSFORMER, connectors), (_TEXT_PROJECTION, extractor)):
        tensors |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
    coarse = re.compile(r"(audio_)?vae\.(?!per_channel_statistics)")
    tensors = {
        name: stored(tensor, CODEC_MANTISSA_BITS if coarse.match(name) else 7) for name, tensor in tensors.items()
    }
    parameters = {name for name, _ in vocoder.named_parameters()}
    for name, tensor in vocoder.state_dict().items():
        # Filters and bases are exact, and rounding them would only degrade the audio.
        saved = stored(tensor, CODEC_MANTISSA_BITS) if name in parameters else tensor
        tensors["vocoder." + stored_vocoder_name(name, True)] = saved
    metadata = {"config": json.dumps(TRAINED_CONFIG), "model_version": MODEL_VERSION, **facts}
    save_safetensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def stored(tensor: Tensor, mantissa_bits: int = 7) -> Tensor:
    """Rounds to bfloat16, or to fewer than its 7 mantissa bits: an archive compresses what is always zero."""
    dropped = 7 - mantissa_bits
    if dropped == 0:
        return tensor.to(torch.bfloat16)
    half, kept = 1 << (dropped - 1), -(1 << dropped)
    # The carry of the mantissa increments the exponent, as it should.
    bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16)
    return ((bits + half) & kept).view(torch.bfloat16)


def latent_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all but the first dim of raw latents [C, ...], as a file stores them."""
    values = statistics("", latents.flatten(1)).values()
    mean, std = (value.float() for value in values)
    return mean, std


def write_trained_text_encoder(folder: Path, captions: Iterable[str], seed: int) -> None:
    """Writes a tiny Gemma 3 with seeded random weights, and a tokenizer that knows the words of the captions."""

    def adjust(name: str, parameter: Tensor) -> None:
        # The norms after attention and feed-forward: random layers should add little to the words' embeddings.
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            parameter -= 0.8

    write_gemma3(folder, _word_tokenizer(captions), TEXT_ENCODER, seed, adjust, MAX_TOKENS)


def _word_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """BPE over bytes with merges learned from the captions: their words are single tokens, and any text is accepted."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS, *IMAGE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer
