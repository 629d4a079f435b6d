"""Loading of the frozen encoders, and their use by the threads of a training job that encodes its own clips.

Preparation and training load and call the same functions, so a clip gives the same tensors either way.
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
    TextPrecision,
    VideoCodec,
    load_audio_codec,
    load_feature_extractor,
    load_text_encoder,
    load_video_codec,
    quantize_text_encoder,
)
from ltx_titan.data.layout import Fields
from ltx_titan.encode.captions import TextModels, encode_caption
from ltx_titan.encode.latents import encode_audio, encode_video
from ltx_titan.media import Audio
from ltx_titan.weights import load_text_connectors

Device = str | torch.device


@dataclass(frozen=True)
class EncoderFiles:
    """Files of the encoders.

    Attributes:
        checkpoint: file with the text projection, and with the VAEs unless they have their own files.
        text_encoder: folder of Gemma 3, or the packed file of LTX-2.5; None if no captions are encoded.
        video_vae: file of the video VAE; None: the checkpoint.
        audio_vae: file of the audio VAE; None: the checkpoint.
        vae_tiling: encode frames in tiles.
    """

    checkpoint: Path
    text_encoder: Path | None = None
    video_vae: Path | None = None
    audio_vae: Path | None = None
    vae_tiling: bool = False

    @property
    def video_path(self) -> Path:
        """File that holds the video VAE."""
        return self.video_vae or self.checkpoint

    @property
    def audio_path(self) -> Path:
        """File that holds the audio VAE."""
        return self.audio_vae or self.checkpoint


def load_video_encoder(files: EncoderFiles, device: Device) -> VideoCodec:
    """Loads the video VAE with its encoder."""
    return load_video_codec(files.video_path, device, _dtype(device), part="encoder", tiling=files.vae_tiling)


def load_audio_encoder(files: EncoderFiles, device: Device) -> AudioCodec:
    """Loads the audio VAE with its encoder."""
    return load_audio_codec(files.audio_path, device, part="encoder")


def load_text_models(
    files: EncoderFiles,
    device: Device,
    precision: TextPrecision = "full",
    with_connectors: bool = False,
    offload: bool = False,
) -> TextModels:
    """Loads the models that encode captions.

    Args:
        files: of the encoders.
        device: device that they run on.
        precision: format of the text encoder's weights.
        with_connectors: load the text connectors too.
        offload: leave the text encoder in host memory, for a caller that copies it to the device for each caption.

    Raises:
        ValueError: the connectors keep padding, so their outputs are not complete without a mask.
    """
    assert files.text_encoder is not None
    dtype = _dtype(device)
    # Quantized from host memory: in full precision the encoder may be too large for the device.
    starts_on_host = offload or precision != "full"
    encoder = load_text_encoder(files.text_encoder, "cpu" if starts_on_host else device, dtype)
    if not offload:
        encoder = quantize_text_encoder(encoder, precision, device)
    extractor = load_feature_extractor(files.checkpoint, encoder, device, dtype)
    if not with_connectors:
        return TextModels(encoder, extractor)
    connectors = load_text_connectors(files.checkpoint, device, dtype)
    if not connectors.fills_padding:
        raise ValueError(f"{files.checkpoint}: its connectors keep padding; omit --contexts")
    return TextModels(encoder, extractor, connectors)


def _dtype(device: Device) -> torch.dtype:
    """Dtype of video VAE and text encoder: results are stored in 16 bits; CPUs compute faster in 32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


class Encoders:
    """The encoders of a training job, shared by the threads of its data loader.

    Each is loaded when it is first used, on the current device of the calling thread. One thread encodes at a time,
    since activations of encoders, not their weights, would fill a GPU; the others decode files in the meantime. On a
    GPU the encoders run in a stream of their own, concurrently with the training step.
    """

    def __init__(self, files: EncoderFiles, offload_text_encoder: bool = False) -> None:
        """Loads nothing yet.

        Args:
            files: of the encoders.
            offload_text_encoder: keep the text encoder in host memory while it is not used.
        """
        self._files = files
        self._offloads_text_encoder = offload_text_encoder
        self._lock = threading.Lock()

    def video(self, pixels: Tensor, fps: float) -> Fields:
        """Encodes pixels [3, F, H, W] in [-1, 1] to the fields of `latents/`."""
        with self._exclusive():
            return encode_video(pixels, fps, self._video_codec)

    def audio(self, audio: Audio | None, duration_s: float) -> Fields:
        """Encodes audio, or its absence, to the fields of `audio_latents/`."""
        with self._exclusive():
            return encode_audio(audio, duration_s, self._audio_codec)

    def text(self, caption: str) -> Fields:
        """Encodes a caption to the fields of `conditions/`: features, before the text connectors."""
        with self._exclusive():
            models = self._text_models
            # Under the lock: only one copy of the text encoder is on the device at a time.
            with _on_device(models.encoder.model, self._device) if self._offloads_text_encoder else nullcontext():
                return encode_caption(caption, models)

    @cached_property
    def _device(self) -> torch.device:
        # Not in __init__: jobs are planned before ranks have a device.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @cached_property
    def _video_codec(self) -> VideoCodec:
        return load_video_encoder(self._files, self._device)

    @cached_property
    def _audio_codec(self) -> AudioCodec:
        return load_audio_encoder(self._files, self._device)

    @cached_property
    def _text_models(self) -> TextModels:
        return load_text_models(self._files, self._device, offload=self._offloads_text_encoder)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # The lock comes first: the thread that holds it may be the first to create the stream.
        with self._lock, torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            yield


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies frozen weights to the device for the duration of the block; the host's tensors are put back after it."""
    # The host's tensors are kept rather than copied back: frozen weights do not change, so the way back is free.
    host = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in host:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in host:
            tensor.data = data
