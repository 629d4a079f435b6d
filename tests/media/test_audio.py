import io

import pytest
import torch

from ltx_titan.media import (
    Audio,
    MediaError,
    encode_wav,
    iter_audio_parts,
    read_audio,
    to_duration,
    to_stereo,
    write_wav,
)
from tests.media.clips import tone, write_clip, write_late_audio

RATE = 48000


@pytest.mark.parametrize("channels", [1, 2])
def test_audio_of_a_video_keeps_rate_channels_and_position(tmp_path, channels):
    path = write_clip(tmp_path / "a.mp4", frames=25, channels=channels)
    audio = read_audio(path)
    assert audio.sample_rate == 48000
    assert audio.waveform.shape[0] == channels
    # AAC comes in whole frames of 1,024 samples.
    assert 48000 <= audio.waveform.shape[1] < 48000 + 2048
    original = tone(1, 48000, channels)
    middle = slice(4000, 40000)
    assert (audio.waveform[:, middle] - original[:, middle]).abs().max() < 0.02


def test_no_audio_track(tmp_path):
    assert read_audio(write_clip(tmp_path / "a.mp4", channels=0)) is None


def test_late_audio_is_padded_with_silence(tmp_path):
    audio = read_audio(write_late_audio(tmp_path / "late.mkv", delay_s=0.5))
    assert audio.duration_s == pytest.approx(1.5, abs=0.01)
    assert audio.waveform[:, :23000].abs().max() == 0
    assert audio.waveform[:, 24100:30000].abs().max() > 0.25


def test_wav_round_trip(tmp_path):
    audio = Audio(tone(0.2, 24000), 24000)
    write_wav(tmp_path / "sub" / "a.wav", audio)
    again = read_audio(tmp_path / "sub" / "a.wav")
    assert again.sample_rate == 24000
    torch.testing.assert_close(again.waveform, audio.waveform, atol=2 / 32768, rtol=0)


def test_wav_bytes_are_those_of_the_file(tmp_path):
    audio = Audio(tone(0.2, 24000), 24000)
    write_wav(tmp_path / "a.wav", audio)
    buffer = io.BytesIO()
    encode_wav(buffer, audio)
    assert buffer.getvalue() == (tmp_path / "a.wav").read_bytes()


def test_unreadable_audio_is_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(MediaError, match=r"a\.wav"):
        read_audio(tmp_path / "a.wav")


def test_downmix_weights():
    mono = torch.tensor([[0.5, -0.5]])
    assert torch.equal(to_stereo(mono), mono.expand(2, -1))
    surround = torch.eye(6)
    left, right = to_stereo(surround)
    assert left.tolist() == pytest.approx([1 / 2.414, 0, 0.707 / 2.414, 0, 0.707 / 2.414, 0])
    assert right.tolist() == pytest.approx([0, 1 / 2.414, 0.707 / 2.414, 0, 0, 0.707 / 2.414])
    assert to_stereo(torch.eye(8))[0, 6] == pytest.approx(0.707 / 3.121)
    # The weights sum to 1: a signal that is equal in all channels keeps its level.
    torch.testing.assert_close(to_stereo(torch.ones(8, 4)), torch.ones(2, 4))
    assert torch.equal(to_stereo(torch.tensor([[3.0], [0.0], [0.0]])), torch.ones(2, 1))


def test_duration_is_cut_or_padded_with_silence():
    audio = Audio(torch.ones(2, 100), 100)
    assert to_duration(audio, 0.5).waveform.shape == (2, 50)
    longer = to_duration(audio, 1.5).waveform
    assert longer.shape == (2, 150)
    assert longer[:, 100:].abs().max() == 0


def test_parts_equal_the_whole_track(tmp_path):
    sweep = torch.sin(torch.cumsum(torch.linspace(0.01, 0.5, 3 * RATE), 0))[None] * torch.tensor([[0.5], [0.2]])
    write_wav(tmp_path / "a.wav", Audio(sweep, RATE))
    whole = to_stereo(read_audio(tmp_path / "a.wav").waveform)
    # Separate, adjacent and overlapping spans, and spans beyond the end.
    spans = [(0.0, 0.5), (0.7, 0.3), (1.0, 1.0), (1.5, 0.25), (2.9, 0.5), (5.0, 0.1)]
    parts = list(iter_audio_parts(tmp_path / "a.wav", spans))
    for (start_s, duration_s), part in zip(spans, parts, strict=True):
        expected = torch.zeros(2, round(duration_s * RATE))
        piece = whole[:, round(start_s * RATE) :][:, : expected.shape[1]]
        expected[:, : piece.shape[1]] = piece
        assert part.sample_rate == RATE
        torch.testing.assert_close(part.waveform, expected)


def test_parts_are_timed_from_the_first_video_frame(tmp_path):
    path = write_late_audio(tmp_path / "late.mkv", delay_s=0.5)
    early, late = iter_audio_parts(path, [(0.0, 0.4), (0.55, 0.3)])
    assert early.waveform.abs().max() == 0
    assert late.waveform.abs().max() > 0.25


def test_parts_of_a_silent_and_of_an_empty_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", channels=0)
    assert list(iter_audio_parts(path, [(0, 1), (1, 1)])) == [None, None]
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(MediaError, match="0 bytes"):
        list(iter_audio_parts(tmp_path / "zero.mp4", [(0, 1)]))


def test_mono_parts_become_stereo(tmp_path):
    write_wav(tmp_path / "a.wav", Audio(tone(0.5, RATE, 1), RATE))
    (part,) = iter_audio_parts(tmp_path / "a.wav", [(0.1, 0.2)])
    assert torch.equal(part.waveform[0], part.waveform[1])


@pytest.mark.parametrize(
    ("layout", "left", "right"),
    [
        (("FL", "FR", "FC"), [1, 0, 0.707], [0, 1, 0.707]),
        (("FL", "FR", "LFE"), [1, 0, 0], [0, 1, 0]),
        (("FL", "FR", "BL", "BR"), [1, 0, 0.707, 0], [0, 1, 0, 0.707]),
        (("FL", "FR", "FC", "BC"), [1, 0, 0.707, 0.5], [0, 1, 0.707, 0.5]),
        (("FL", "FR", "FC", "BL", "BR"), [1, 0, 0.707, 0.707, 0], [0, 1, 0.707, 0, 0.707]),
        (("FL", "FR", "FC", "LFE", "BC", "SL", "SR"), [1, 0, 0.707, 0, 0.5, 0.707, 0], [0, 1, 0.707, 0, 0.5, 0, 0.707]),
        (("AMBI0", "AMBI1", "AMBI2", "AMBI3"), [1, 0, 0, 0], [1, 0, 0, 0]),
        (("FC", "LFE"), [1, 0], [1, 0]),
        ((), [1, 1, 1], [1, 1, 1]),
    ],
)
def test_channels_are_mixed_by_their_positions(layout, left, right):
    found = to_stereo(torch.eye(len(left)), layout)
    for weights, expected in zip(found, (left, right), strict=True):
        assert weights.tolist() == pytest.approx([value / sum(expected) for value in expected], abs=1e-3)
