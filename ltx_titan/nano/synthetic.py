"""Samples made of noise, in the form of prepared ones: for measuring speed and for tests, without files or encoders."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ltx_titan.data.dataset import Sample, ShapeKey, shape_key_of
from ltx_titan.data.layout import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    AUDIO_STEPS_PER_SECOND,
    VIDEO_CHANNELS,
    Fields,
)

_STREAMS = ("conditions", "video_latents", "audio_latents")


class SyntheticDataset:
    """Samples of one shape; the values of sample `i` depend on (seed, i) alone."""

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        width: int,
        height: int,
        num_frames: int,
        fps: float,
        num_samples: int,
        text_tokens: int,
        video_text_dim: int,
        audio_text_dim: int | None,
        contexts: bool = True,
        seed: int = 0,
        scale_factors: tuple[int, int, int] = (8, 32, 32),
    ) -> None:
        """Describes the samples; values are made when asked for.

        Args:
            sources: folders that the job reads, each with its key in a batch; only targets and text can be made up.
            width: pixels.
            height: pixels.
            num_frames: pixel frames.
            fps: frames per second; audio has round(25 * num_frames / fps) steps.
            num_samples: distinct samples.
            text_tokens: tokens per caption.
            video_text_dim: width of the video's text contexts, or of its features where `contexts` is False.
            audio_text_dim: the same for the audio's; None leaves them out.
            contexts: True makes finished contexts; False features with a left-padded `prompt_attention_mask`.
            seed: of all values.
            scale_factors: compression factors of the video codec (time, height, width).

        Raises:
            ValueError: if the job reads other folders, or the codec cannot have made a clip of this size.
        """
        if others := {folder: key for folder, key in sources.items() if key not in _STREAMS}:
            raise ValueError(
                f"data.source = 'synthetic': expected only targets and text, found the folders {sorted(others)}; "
                "remove the mask and reference conditions, or set data.source = 'precomputed'."
            )
        time, rows, columns = scale_factors
        for key, size, step, rest in (
            ("num_frames", num_frames, time, 1),
            ("height", height, rows, 0),
            ("width", width, columns, 0),
        ):
            if size % step != rest % step or size < 1:
                rule = f"a multiple of {step}" + (f" plus {rest}" if rest else "")
                raise ValueError(
                    f"data.synthetic.{key} = {size}: expected {rule}; set it to {size - size % step + rest}."
                )
        self.sources = dict(sources)
        self._latent_sizes = ((num_frames - 1) // time + 1, height // rows, width // columns)
        self._fps = float(fps)
        self._duration = num_frames / fps
        self._audio_steps = max(round(AUDIO_STEPS_PER_SECOND * self._duration), 1)
        self._num_samples = num_samples
        self._text_tokens = text_tokens
        self._text_dims = {"video": video_text_dim, "audio": audio_text_dim}
        self._contexts = contexts
        self._seed = seed
        self._key = shape_key_of(self.load(0))
        self.fingerprint = hashlib.sha256(repr((self._key, num_samples, seed, "synthetic")).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self._num_samples

    def name(self, index: int) -> str:
        """What messages call a sample."""
        return f"synthetic sample {index}"

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes that a batch must share: the same for all samples."""
        return self._key

    def load(self, index: int) -> Sample:
        """Makes one sample: source -> field -> tensor or number, without a batch dim."""
        digest = hashlib.sha256(f"{self._seed}\0{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        makers = {"conditions": self._text, "video_latents": self._video, "audio_latents": self._audio}
        # One order for every job, so that a sample's video is the same with and without audio.
        sample = {key: makers[key](generator) for key in _STREAMS if key in self.sources.values()}
        return {key: sample[key] for key in self.sources.values()}

    def _video(self, generator: torch.Generator) -> Fields:
        frames, height, width = self._latent_sizes
        latents = torch.randn(VIDEO_CHANNELS, frames, height, width, generator=generator).to(torch.bfloat16)
        return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": self._fps}

    def _audio(self, generator: torch.Generator) -> Fields:
        steps = self._audio_steps
        latents = torch.randn(AUDIO_CHANNELS, steps, AUDIO_BINS, generator=generator)
        return {"latents": latents, "num_time_steps": steps, "frequency_bins": AUDIO_BINS, "duration": self._duration}

    def _text(self, generator: torch.Generator) -> Fields:
        tokens = self._text_tokens
        fields: dict[str, Tensor] = {
            f"{stream}_prompt_embeds": torch.randn(tokens, dim, generator=generator).to(torch.bfloat16)
            for stream, dim in self._text_dims.items()
            if dim is not None
        }
        if not self._contexts:
            length = int(torch.randint(1, tokens + 1, (), generator=generator))
            fields["prompt_attention_mask"] = (torch.arange(tokens) >= tokens - length).to(torch.int64)
        return dict(fields)
