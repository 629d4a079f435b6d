"""The frozen encoders of a training job that encodes its clips itself, resident on the rank's device.

They are the ones of `process-dataset`, called with its own functions, so that a clip gives the same tensors either way.
Threads of the data loader share them: one encodes at a time, since an encoder's activations, not its weights, are what
fills a GPU, while the others decode their files. On a GPU they work in a stream of their own, beside the training step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx_titan.codecs import (
    AudioCodec,
    TextEncoder,
    VideoCodec,
    load_audio_codec,
    load_feature_extractor,
    load_text_encoder,
    load_video_codec,
)
from ltx_titan.data.layout import Fields
from ltx_titan.encode.audio import absent_audio_fields, audio_fields
from ltx_titan.encode.captions import text_fields
from ltx_titan.encode.videos import latent_fields
from ltx_titan.media import Audio
from ltx_titan.model import FeatureExtractor


@dataclass(frozen=True)
class EncoderFiles:
    """Where the encoders come from.

    Attributes:
        checkpoint: file with the text projection, and the VAEs unless they are given.
        text_encoder: folder of Gemma 3, or the packed file of LTX-2.5.
        video_vae: file of the video VAE; None: the checkpoint.
        audio_vae: file of the audio VAE; None: the checkpoint.
        vae_tiling: encode frames in tiles.
        offload_text_encoder: keep the text encoder in host memory while it is not used.
    """

    checkpoint: Path
    text_encoder: Path
    video_vae: Path | None = None
    audio_vae: Path | None = None
    vae_tiling: bool = False
    offload_text_encoder: bool = False


class Encoders:
    """Loads each encoder when it is first needed, on the device that the calling thread then uses."""

    def __init__(self, files: EncoderFiles) -> None:
        self._files = files
        self._lock = threading.Lock()

    def video(self, pixels: Tensor, fps: float) -> Fields:
        """Fields of `latents/` from pixels [3, F, H, W] in [-1, 1]."""
        with self._turn():
            return latent_fields(pixels, fps, self._video_codec)

    def audio(self, audio: Audio | None, duration_s: float) -> Fields:
        """Fields of `audio_latents/` from an audio, cut or filled up to its clip's length, or from the lack of one."""
        with self._turn():
            if audio is None:
                return absent_audio_fields(duration_s, self._audio_codec)
            return audio_fields(audio, duration_s, self._audio_codec)

    def text(self, caption: str) -> Fields:
        """Fields of `conditions/`: features, before the text connectors."""
        with self._turn():
            encoder, extractor = self._text_models
            with _on_device(encoder.model, self._device) if self._files.offload_text_encoder else nullcontext():
                return text_fields(caption, encoder, extractor)

    @cached_property
    def _device(self) -> torch.device:
        # Not asked for at the start: jobs are planned before ranks have a device.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @cached_property
    def _dtype(self) -> torch.dtype:
        """As `process-dataset` has it: a CPU computes faster in 32 bits."""
        return torch.float32 if self._device.type == "cpu" else torch.bfloat16

    @cached_property
    def _video_codec(self) -> VideoCodec:
        path = self._files.video_vae or self._files.checkpoint
        return load_video_codec(path, self._device, self._dtype, part="encoder", tiling=self._files.vae_tiling)

    @cached_property
    def _audio_codec(self) -> AudioCodec:
        return load_audio_codec(self._files.audio_vae or self._files.checkpoint, self._device, part="encoder")

    @cached_property
    def _text_models(self) -> tuple[TextEncoder, FeatureExtractor]:
        home = torch.device("cpu") if self._files.offload_text_encoder else self._device
        encoder = load_text_encoder(self._files.text_encoder, home, self._dtype)
        return encoder, load_feature_extractor(self._files.checkpoint, encoder, self._device, self._dtype)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        # One after the other: only the thread whose turn it is may be the first to ask for the stream.
        with self._lock, torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            yield


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Lends frozen weights to a device: copied there, used, and dropped; the host keeps its own."""
    host = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in host:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in host:
            tensor.data = data
