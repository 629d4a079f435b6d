"""Codecs of the official checkpoints: video VAE, audio VAE, vocoder, text encoder."""

from ltx_titan.codecs.audio_vae import AudioCodec, load_audio_codec
from ltx_titan.codecs.latent_upsampler import LatentUpsampler, load_upscaler, upscaler_scale
from ltx_titan.codecs.text_encoder import (
    MAX_TOKENS,
    TextEncoder,
    TextPrecision,
    encode_by_layers,
    load_feature_extractor,
    load_text_encoder,
    quantize_text_encoder,
    text_encoder_config,
    text_feature_widths,
)
from ltx_titan.codecs.video_vae import VideoCodec, load_video_codec
from ltx_titan.codecs.vocoder import Vocoder, load_vocoder

__all__ = [
    "MAX_TOKENS",
    "AudioCodec",
    "LatentUpsampler",
    "TextEncoder",
    "TextPrecision",
    "VideoCodec",
    "Vocoder",
    "encode_by_layers",
    "load_audio_codec",
    "load_feature_extractor",
    "load_text_encoder",
    "load_upscaler",
    "load_video_codec",
    "load_vocoder",
    "quantize_text_encoder",
    "text_encoder_config",
    "text_feature_widths",
    "upscaler_scale",
]
