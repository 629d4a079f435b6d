from fractions import Fraction

import numpy as np
import pytest
import torch

from ltx_titan.media import MediaError, iter_frames, probe_video, read_clip, write_video
from tests.media.clips import ramp, write_clip


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(24000, 1001), Fraction(30000, 1001), 12.5])
def test_frame_rate_and_count_survive(tmp_path, fps):
    info = probe_video(write_clip(tmp_path / "a.mp4", frames=9, fps=Fraction(fps), channels=0))
    assert info.fps == Fraction(fps)
    assert (info.frames, info.width, info.height) == (9, 96, 64)
    assert not info.has_audio


def test_exactly_the_frames_asked_for(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20)
    clip = read_clip(path, frames=5, width=96, height=64, start=7)
    assert clip.shape == (3, 5, 64, 96)
    grey = ((clip.mean((0, 2, 3)) + 1) * 127.5).tolist()
    assert grey == pytest.approx([8 * i for i in range(7, 12)], abs=3)


def test_asking_for_too_many_frames_names_the_file(tmp_path):
    path = write_clip(tmp_path / "short.mp4", frames=5)
    with pytest.raises(MediaError, match=r"short.mp4: frames 0 to 9 were asked for, 5 can be decoded"):
        read_clip(path, frames=9, width=96, height=64)


def test_rotation_of_a_phone_video_is_applied(tmp_path):
    frames = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    frames[:, :20, :30] = 255
    path = tmp_path / "phone.mp4"
    write_video(path, frames, 25)
    # The track header's matrix maps (x, y) to (-y, x): a quarter turn clockwise, how phones store upright clips.
    content = path.read_bytes()
    identity, turned = (
        b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
        for matrix in (
            (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
            (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30),
        )
    )
    at = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    info = probe_video(path)
    assert (info.width, info.height) == (64, 96)
    first = next(iter_frames(path))
    assert first.shape == (96, 64, 3)
    # The bright corner moves from the top left to the top right.
    assert first[:30, 44:].mean() > 240
    assert np.delete(first, np.s_[40:], axis=1).mean() < 20


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file"), (b"", "empty"), (b"hello" * 100, "not a readable media file")]
)
def test_unreadable_files_are_named_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "bäd.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=reason) as caught:
        probe_video(path)
    assert "bäd.mp4" in str(caught.value)
    assert caught.value.path == path


def test_truncated_file_is_refused(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", frames=20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"cut.mp4"):
        read_clip(path, frames=20, width=96, height=64)


def test_odd_sizes_cannot_be_written(tmp_path):
    with pytest.raises(MediaError, match="even"):
        write_video(tmp_path / "a.mp4", ramp(3, height=33), 25)
    assert list(tmp_path.iterdir()) == []
