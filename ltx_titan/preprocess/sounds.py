"""Stage: the column `audio` to `audio_latents/`.

Beside a video, a separate sound file is brought to the length of the encoded clip, by the clip's own frame rate; in a
data set of sound only, the whole file is encoded.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ltx_titan.codecs import AudioCodec
from ltx_titan.data import write_sample
from ltx_titan.media import MediaError, Sound, read_sound
from ltx_titan.preprocess.report import Report
from ltx_titan.preprocess.rows import Sample
from ltx_titan.preprocess.store import is_whole
from ltx_titan.preprocess.videos import audio_fields


def sound_is_done(sample: Sample, output: Path) -> bool:
    """Whether the audio latents of a sample are there."""
    return is_whole(output / "audio_latents" / sample.key)


def process_sounds(
    samples: Sequence[Sample], output: Path, codec: AudioCodec, time_factor: int, report: Report
) -> list[Sample]:
    """Encode separate sound files.

    Args:
        samples: with a sound file each.
        output: root of the prepared data; where samples have a video, its latents are there.
        codec: with an encoder.
        time_factor: pixel frames per latent frame, to know how long a clip lasts from its latents.
        report: told about every sound.

    Returns:
        The samples that worked.
    """
    usable = []
    with report.progress("sounds", len(samples)) as bar:
        for sample in samples:
            try:
                sound = _read(sample)
                duration_s = _clip_duration_s(sample, output, time_factor) if sample.video else sound.duration_s
                write_sample(output / "audio_latents" / sample.key, audio_fields(sound, duration_s, codec))
            except (MediaError, OSError) as error:
                reason = error.reason if isinstance(error, MediaError) else str(error)
                report.fail("sounds", str(sample.audio), reason)
            else:
                report.add("sounds", "done")
                usable.append(sample)
            bar.advance()
    return usable


def _read(sample: Sample) -> Sound:
    assert sample.audio is not None
    sound = read_sound(sample.audio)
    if sound is None:
        raise MediaError(sample.audio, "has no sound track")
    return sound


def _clip_duration_s(sample: Sample, output: Path, time_factor: int) -> float:
    latents = torch.load(output / "latents" / sample.key, weights_only=True)
    frames = (latents["num_frames"] - 1) * time_factor + 1
    return frames / latents["fps"]
