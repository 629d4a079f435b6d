"""Stages: the column `audio` to `audio_latents/`, and `reference_audio` to `reference_audio_latents/`.

Beside a video, a separate audio file is brought to the length of the encoded clip, by the clip's own frame rate: cut,
or filled up with silence. A reference is cut to it but not filled up. Without videos the whole file is encoded, or as
much of it as the longest of some given durations that it reaches, so that batches can be formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx_titan.codecs import AudioCodec
from ltx_titan.commands.process.stage import Output, Plan, Stage
from ltx_titan.data.layout import AUDIO_STEPS_PER_SECOND, Value
from ltx_titan.media import Audio, MediaError, open_media, read_audio, to_duration, to_stereo
from ltx_titan.media.tables import SampleRow

_BYTES_PER_STEP = 8 * 16 * 4


@dataclass(frozen=True)
class AudioColumn:
    """A column of audio files.

    Attributes:
        name: of the stage.
        folder: where its latents go.
        file: the file of a sample.
        fills_up: whether an audio shorter than its clip gets silence behind it.
    """

    name: str
    folder: str
    file: Callable[[SampleRow], Path | None]
    fills_up: bool


AUDIO = AudioColumn("audio", "audio_latents", lambda sample: sample.audio, fills_up=True)
REFERENCE_AUDIO = AudioColumn(
    "reference audio",
    "reference_audio_latents",
    lambda sample: sample.extras.get("reference_audio"),
    fills_up=False,
)


def audio_stage(
    column: AudioColumn,
    load_codec: Callable[[], AudioCodec],
    clip_duration_s: Callable[[SampleRow], float] | None,
    durations_s: Sequence[float],
) -> Stage:
    """The stage that encodes a column of audio files.

    Args:
        column: which.
        load_codec: loads an audio codec with an encoder.
        clip_duration_s: seconds of a sample's clip; None in a data set without videos.
        durations_s: lengths to cut audio to where there are no videos; empty to take each as long as it is.
    """

    def path_of(sample: SampleRow) -> Path:
        path = column.file(sample)
        assert path is not None
        return path

    def length_s(sample: SampleRow, own_s: float) -> float:
        if clip_duration_s is not None:
            clip_s = clip_duration_s(sample)
            return clip_s if column.fills_up else min(own_s, clip_s)
        if not durations_s:
            return own_s
        fitting = [duration for duration in durations_s if duration <= own_s]
        if not fitting:
            reason = (
                f"lasts {own_s:.2f} s, the shortest of --audio-durations is {min(durations_s):g} s; add a shorter one"
            )
            raise MediaError(path_of(sample), reason)
        return max(fitting)

    def plan(sample: SampleRow) -> Plan:
        seconds = length_s(sample, _probe_duration_s(path_of(sample)))
        return Plan(f"{seconds:.2f} s", _BYTES_PER_STEP * max(1, round(AUDIO_STEPS_PER_SECOND * seconds)))

    def read(sample: SampleRow) -> tuple[Audio, float]:
        audio = read_audio(path_of(sample))
        if audio is None:
            raise MediaError(path_of(sample), "has no audio track")
        return audio, length_s(sample, audio.duration_s)

    def load() -> Callable[[SampleRow, tuple[Audio, float]], Output]:
        codec = load_codec()
        return lambda sample, item: {column.folder: audio_fields(*item, codec)}

    return Stage(column.name, (column.folder,), lambda sample: str(column.file(sample)), plan, read, load)


def audio_fields(audio: Audio, duration_s: float, codec: AudioCodec) -> dict[str, Value]:
    """Fields of an audio sample.

    Args:
        audio: cut, or filled up with silence, to the duration.
        duration_s: seconds.
        codec: with an encoder.

    Returns:
        `latents` [8, round(25 * seconds), 16] in float32, their sizes, and the duration.
    """
    # One spectrogram frame is the least that can be encoded; a single video frame may be shorter.
    shortest_s = codec.mel.filter_length / codec.mel.sample_rate
    audio = to_duration(audio, max(duration_s, shortest_s))
    latents = codec.encode(to_stereo(audio.waveform)[None], audio.sample_rate)[0].cpu()
    steps = codec.steps_for(duration_s)
    # Centred frames make the encoder return at least as many steps, often one more.
    assert latents.shape[1] >= steps
    return {
        "latents": latents[:, :steps].contiguous(),
        "num_time_steps": steps,
        "frequency_bins": latents.shape[2],
        "duration": duration_s,
    }


def absent_audio_fields(duration_s: float, codec: AudioCodec) -> dict[str, Value]:
    """Fields that say that a sample has no audio, as opposed to silence.

    The zeros are a stand-in of the right size, marked `present = False`: in training on video and audio together they
    have no loss and nothing attends to them, and the sample's video is not lost to it.
    """
    steps, channels, bins = codec.steps_for(duration_s), codec.mean.shape[0], codec.mean.shape[2]
    return {
        "latents": torch.zeros(channels, steps, bins),
        "num_time_steps": steps,
        "frequency_bins": bins,
        "duration": duration_s,
        "present": False,
    }


def _probe_duration_s(path: Path) -> float:
    """Length of an audio by its header; by decoding it where that does not tell."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise MediaError(path, "has no audio track")
        stream = container.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
    audio = read_audio(path)
    assert audio is not None
    return audio.duration_s
