"""Frames and times against FFmpeg itself, displaying as a player does.

With an `ffmpeg` on the path its command line is the reference for frames. Without one it is libavfilter through PyAV,
with the filters that the command line would insert for the file (scale by the pixel aspect, transpose, flips): then our
geometry and color code is compared with FFmpeg's, and decoding is the same library on both sides. The reference for
audio is always the time stamp of the decoded frame that holds the event.
"""

import shutil
import subprocess

import av
import numpy as np
import pytest
import torch

from ltx_titan.media import iter_frames, probe_video, read_audio
from tests.media.containers import set_matrix, write_frames
from tests.media.test_time import RATE, beep, loud_s, write_audio

FFMPEG = shutil.which("ffmpeg")


def scenery(index, height=120, width=160):
    """Smooth colors that move, so that a shift, squeeze or wrong color shows."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(x + index / 5), np.sin(y * 1.3 - index / 7), np.cos(x - y)]
    return ((np.stack(waves, axis=-1) * 0.4 + 0.5) * 255).round().astype(np.uint8)


def reference_frames(path, width, height, filters):
    if FFMPEG:
        command = [FFMPEG, "-v", "error", "-i", str(path), "-vf", f"scale={width}:{height}:flags=bicubic"]
        command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
        return list(np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3))
    chain = [*filters, ("scale", f"{width}:{height}:flags=bicubic"), ("format", "rgb24")]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_buffer(template=stream), *(graph.add(*item) for item in chain), graph.add("buffersink")
        ).configure()
        frames = []
        for frame in container.decode(stream):
            graph.push(frame)
            frames.append(graph.pull().to_ndarray(format="rgb24"))
        return frames


CASES = {
    "plain": ({}, None, []),
    "wide_pixels": ({"sar": "4/3"}, None, [("scale", "iw*sar:ih")]),
    "narrow_pixels": ({"sar": "8/9"}, None, [("scale", "iw*sar:ih")]),
    "rotated": ({}, (0, 1, -1, 0), [("transpose", "clock")]),
    "rotated_back": ({}, (0, -1, 1, 0), [("transpose", "cclock")]),
    "mirrored": ({}, (-1, 0, 0, 1), [("hflip", "")]),
    "wide_and_rotated": ({"sar": "4/3"}, (0, 1, -1, 0), [("scale", "iw*sar:ih"), ("transpose", "clock")]),
    "full_range": ({"color_range": 2, "pix_fmt": "yuv444p"}, None, []),
    "bt709": ({"colorspace": 1, "color_primaries": 1, "color_trc": 1, "pix_fmt": "yuv444p"}, None, []),
    "10_bit": ({"pix_fmt": "yuv422p10le"}, None, []),
}


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_ffmpeg(tmp_path, name):
    options, matrix, filters = CASES[name]
    path = write_frames(tmp_path / "a.mp4", [scenery(index) for index in range(4)], **options)
    if matrix is not None:
        set_matrix(path, *matrix)
    info = probe_video(path)
    # Half of the displayed size: both sides then scale, as a reader for training does.
    width, height = info.width // 2, info.height // 2
    expected = reference_frames(path, width, height, filters)
    found = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() for frame in iter_frames(path)]
    assert len(found) == len(expected) == info.frames == 4
    for ours, theirs in zip(found, expected, strict=True):
        scaled = torch.nn.functional.interpolate(ours, size=(height, width), mode="bicubic", antialias=True)
        difference = (scaled[0].permute(1, 2, 0).clamp(0, 255) - torch.from_numpy(theirs.copy()).float()).abs()
        assert difference.mean() < 2
        # The corners, where a flip or a shift would show.
        assert difference[: height // 4, : width // 4].mean() < 3
        assert difference[-(height // 4) :, -(width // 4) :].mean() < 3


def reference_onset_s(path):
    """Onset of the beep after the first video frame."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        origin_s = float(first.pts * first.time_base)
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        for frame in container.decode(stream):
            loud = (np.abs(frame.to_ndarray().astype(np.float32)) > 0.2 * 32768).any(0).nonzero()[0]
            if loud.size:
                return float(frame.pts * frame.time_base) + float(loud[0]) / frame.sample_rate - origin_s
    raise AssertionError("no beep")


@pytest.mark.parametrize(
    ("pieces", "video_start_s"),
    [
        ([(0.0, RATE, beep(1.0, 2))], 0.0),
        ([(0.3, RATE, beep(0.7, 1.5))], 0.0),
        ([(0.0, RATE, beep(1.6, 2))], 0.4),
        ([(0.0, RATE, beep(9, 0.5)), (0.8, RATE, beep(0.4, 1.0))], 0.0),
        ([(0.0, RATE, beep(9, 0.5)), (0.53, RATE, beep(0.4, 1.0)), (1.7, RATE, beep(9, 0.2))], 0.2),
    ],
    ids=["plain", "late_audio", "late_video", "gap", "small_gap_and_late_video"],
)
def test_audio_events_are_where_time_stamps_put_them(tmp_path, pieces, video_start_s):
    path = write_audio(tmp_path / "a.mkv", pieces, video_start_s)
    assert loud_s(read_audio(path)) == pytest.approx(reference_onset_s(path), abs=0.02)
