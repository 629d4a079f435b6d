import gc
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from ltx_titan.media import MediaError, frames_at_rate, iter_frames, probe_video, read_clip, write_video
from tests.media.clips import ramp, write_clip


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(24000, 1001), Fraction(30000, 1001), 12.5])
def test_frame_rate_and_count_are_read_exactly(tmp_path, fps):
    info = probe_video(write_clip(tmp_path / "a.mp4", frames=9, fps=Fraction(fps), channels=0))
    assert info.fps == Fraction(fps)
    assert (info.frames, info.width, info.height) == (9, 96, 64)
    assert not info.has_audio


def test_clip_has_exactly_the_requested_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20)
    clip = read_clip(path, frames=5, width=96, height=64, start=7)
    assert clip.shape == (3, 5, 64, 96)
    gray = ((clip.mean((0, 2, 3)) + 1) * 127.5).tolist()
    assert gray == pytest.approx([8 * i for i in range(7, 12)], abs=3)


def test_too_few_frames_name_the_file(tmp_path):
    path = write_clip(tmp_path / "short.mp4", frames=5)
    with pytest.raises(MediaError, match=r"short.mp4: expected frames 0 to 9, only 5 can be decoded"):
        read_clip(path, frames=9, width=96, height=64)


def test_rotation_of_a_phone_video_is_applied(tmp_path):
    frames = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    frames[:, :20, :30] = 255
    path = tmp_path / "phone.mp4"
    write_video(path, frames, 25)
    # The track header's matrix maps (x, y) to (-y, x): 90 degrees clockwise, as phones store upright clips.
    content = path.read_bytes()
    identity, rotated = (
        b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
        for matrix in (
            (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
            (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30),
        )
    )
    at = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:at] + rotated + content[at + len(rotated) :])
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


def write_varying_rate(path, times_ms):
    """A clip whose frame i is gray of value 8 i, with the i-th time stamp."""
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


def gray_levels(clip):
    return [round(value / 8) for value in ((clip.mean((0, 2, 3)) + 1) * 127.5).tolist()]


def test_resampling_drops_or_repeats_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=20, fps=Fraction(20), channels=0)
    info = probe_video(path)
    for fps, count, expected in [(Fraction(10), 10, [0, 2, 4, 6]), (Fraction(40), 40, [0, 0, 1, 1])]:
        assert frames_at_rate(info, fps) == count
        clip = read_clip(path, count, 96, 64, fps=fps)
        # A time in the middle between two frames may round either way.
        assert all(abs(a - b) <= 1 for a, b in zip(gray_levels(clip), expected, strict=False))
        with pytest.raises(MediaError, match=f"only {count} can be decoded"):
            read_clip(path, count + 1, 96, 64, fps=fps)


def test_resampling_follows_time_stamps(tmp_path):
    # A phone that halves its rate in the dark, and drops frames.
    path = write_varying_rate(tmp_path / "phone.mkv", [0, 100, 200, 400, 600, 1020])
    assert gray_levels(read_clip(path, 11, 96, 64, fps=Fraction(10)))[:11:2] == [0, 2, 3, 4, 4, 5]


def test_anchor_moves_the_crop(tmp_path):
    path = write_clip(tmp_path / "wide.mp4", frames=2, channels=0)
    whole = read_clip(path, 1, 96, 64)
    assert torch.equal(read_clip(path, 1, 64, 64, anchor=(0.0, 1.0)), whole[..., 32:])
    assert torch.equal(read_clip(path, 1, 64, 64), whole[..., 16:80])


def test_frames_are_freed_while_reading(tmp_path):
    # PyAV's frames become cyclic garbage if their side data is read; those of a 4K film fill the memory before it is
    # collected, and the threads of their converters hang a process that is forked.
    path = write_clip(tmp_path / "a.mp4", frames=20, channels=0)
    gc.collect()
    gc.disable()
    try:
        assert len(list(iter_frames(path))) == 20
        alive = sum(type(item) is av.VideoFrame for item in gc.get_objects())
    finally:
        gc.enable()
    # The first frame of the probe and that of the reader have been asked for their side data.
    assert alive <= 2
