import pytest
import torch

from ltx_titan.media import Audio, MediaError, read_audio, to_duration, to_stereo, write_wav
from tests.media.clips import tone, write_clip, write_late_audio


@pytest.mark.parametrize("channels", [1, 2])
def test_audio_of_a_video_keeps_rate_channels_and_place(tmp_path, channels):
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


def test_late_audio_gets_silence_in_front(tmp_path):
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


def test_unreadable_audio(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(MediaError, match=r"a\.wav"):
        read_audio(tmp_path / "a.wav")


def test_down_mixing():
    mono = torch.tensor([[0.5, -0.5]])
    assert torch.equal(to_stereo(mono), mono.expand(2, -1))
    surround = torch.eye(6)
    left, right = to_stereo(surround)
    assert left.tolist() == pytest.approx([1 / 2.414, 0, 0.707 / 2.414, 0, 0.707 / 2.414, 0])
    assert right.tolist() == pytest.approx([0, 1 / 2.414, 0.707 / 2.414, 0, 0, 0.707 / 2.414])
    assert to_stereo(torch.eye(8))[0, 6] == pytest.approx(0.707 / 3.121)
    # Without its bass channel, what is loud everywhere stays as loud.
    torch.testing.assert_close(to_stereo(torch.ones(8, 4)), torch.ones(2, 4))
    assert torch.equal(to_stereo(torch.tensor([[3.0], [0.0], [0.0]])), torch.ones(2, 1))


def test_length_is_cut_or_filled_with_silence():
    audio = Audio(torch.ones(2, 100), 100)
    assert to_duration(audio, 0.5).waveform.shape == (2, 50)
    longer = to_duration(audio, 1.5).waveform
    assert longer.shape == (2, 150)
    assert longer[:, 100:].abs().max() == 0
