import pytest
import torch

from ltx_titan.media import Audio, MediaError, read_audio, to_stereo, write_wav
from ltx_titan.media.audio_parts import iter_audio_parts
from tests.media.clips import tone, write_clip, write_late_audio

RATE = 48000


def test_parts_are_those_of_the_whole(tmp_path):
    sweep = torch.sin(torch.cumsum(torch.linspace(0.01, 0.5, 3 * RATE), 0))[None] * torch.tensor([[0.5], [0.2]])
    write_wav(tmp_path / "a.wav", Audio(sweep, RATE))
    whole = to_stereo(read_audio(tmp_path / "a.wav").waveform)
    # Apart, adjacent, overlapping, and beyond the end.
    spans = [(0.0, 0.5), (0.7, 0.3), (1.0, 1.0), (1.5, 0.25), (2.9, 0.5), (5.0, 0.1)]
    parts = list(iter_audio_parts(tmp_path / "a.wav", spans))
    for (start_s, duration_s), part in zip(spans, parts, strict=True):
        expected = torch.zeros(2, round(duration_s * RATE))
        piece = whole[:, round(start_s * RATE) :][:, : expected.shape[1]]
        expected[:, : piece.shape[1]] = piece
        assert part.sample_rate == RATE
        torch.testing.assert_close(part.waveform, expected)


def test_time_counts_from_the_first_frame_of_the_video(tmp_path):
    path = write_late_audio(tmp_path / "late.mkv", delay_s=0.5)
    early, late = iter_audio_parts(path, [(0.0, 0.4), (0.55, 0.3)])
    assert early.waveform.abs().max() == 0
    assert late.waveform.abs().max() > 0.25


def test_without_audio_and_without_a_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", channels=0)
    assert list(iter_audio_parts(path, [(0, 1), (1, 1)])) == [None, None]
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(MediaError, match="0 bytes"):
        list(iter_audio_parts(tmp_path / "zero.mp4", [(0, 1)]))


def test_mono_is_doubled(tmp_path):
    write_wav(tmp_path / "a.wav", Audio(tone(0.5, RATE, 1), RATE))
    (part,) = iter_audio_parts(tmp_path / "a.wav", [(0.1, 0.2)])
    assert torch.equal(part.waveform[0], part.waveform[1])
