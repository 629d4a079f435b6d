import pytest

from ltx_titan.media import MediaError, cut_windows, probe_video, read_audio, read_clip, window_starts, write_video
from tests.media.clips import ramp, write_clip


def test_windows_span_the_whole_clip():
    assert window_starts(132, 25, 8) == [0, 15, 30, 45, 61, 76, 91, 107]
    assert window_starts(25, 25, 1) == [0]
    with pytest.raises(ValueError, match="24 frames"):
        window_starts(24, 25, 2)


def test_windows_hold_their_frames_and_audio(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", frames=25)
    paths = cut_windows(source, tmp_path / "windows", window=9, count=3, width=96, height=64)
    assert [path.name for path in paths] == ["clip_00000.mp4", "clip_00008.mp4", "clip_00016.mp4"]
    for start, path in zip((0, 8, 16), paths, strict=True):
        assert probe_video(path).frames == 9
        first = read_clip(path, 1, 96, 64)
        assert ((first.mean() + 1) * 127.5).item() == pytest.approx(8 * start, abs=4)
        assert read_audio(path).duration_s == pytest.approx(9 / 25, abs=0.05)


def test_too_short_a_source_is_named(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", frames=5)
    with pytest.raises(MediaError, match=r"clip.mp4: has 5 frames"):
        cut_windows(source, tmp_path / "windows", window=9, count=3, width=96, height=64)


def test_odd_sizes_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(MediaError, match="even"):
        write_video(tmp_path / "a.mp4", ramp(3, height=33), 25)
    assert list(tmp_path.iterdir()) == []
