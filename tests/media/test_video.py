from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from ltx_titan.media import MediaError, frames_at_rate, iter_frames, probe_video, read_clip, write_video
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


def write_varying_rate(path, times_ms):
    """A clip whose frame i is grey of value 8 i and stands at the i-th time."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1000, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time_ms, pixels in zip(times_ms, ramp(len(times_ms)).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(clip):
    return [round(value / 8) for value in ((clip.mean((0, 2, 3)) + 1) * 127.5).tolist()]


def test_another_rate_drops_or_repeats_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20, fps=Fraction(20), channels=0)
    info = probe_video(path)
    for fps, count, expected in [(Fraction(10), 10, [0, 2, 4, 6]), (Fraction(40), 40, [0, 0, 1, 1])]:
        assert frames_at_rate(info, fps) == count
        clip = read_clip(path, count, 96, 64, fps=fps)
        # A frame that lies in the middle between two may go either way.
        assert all(abs(a - b) <= 1 for a, b in zip(greys(clip), expected, strict=False))
        with pytest.raises(MediaError, match=f"{count} can be decoded"):
            read_clip(path, count + 1, 96, 64, fps=fps)


def test_a_rate_goes_by_the_time_stamps_of_the_file(tmp_path):
    # A phone that halves its rate in the dark, and drops frames.
    path = write_varying_rate(tmp_path / "phone.mkv", [0, 100, 200, 400, 600, 1020])
    assert greys(read_clip(path, 11, 96, 64, fps=Fraction(10)))[:11:2] == [0, 2, 3, 4, 4, 5]


def test_the_place_of_a_cut(tmp_path):
    path = write_clip(tmp_path / "wide.mp4", frames=2, channels=0)
    whole = read_clip(path, 1, 96, 64)
    assert torch.equal(read_clip(path, 1, 64, 64, anchor=(0.0, 1.0)), whole[..., 32:])
    assert torch.equal(read_clip(path, 1, 64, 64), whole[..., 16:80])
