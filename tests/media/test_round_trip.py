"""Frames and times against FFmpeg's own command line, displaying as a player does.

The command is that of imageio-ffmpeg's wheel, another build of another version than PyAV's: it rotates, crops and picks
tracks by itself; pixels are made square with its filter `scale`, as players do.
"""

import re

import numpy as np
import pytest
import torch

from ltx_titan.media import iter_frames, probe_video, read_audio
from ltx_titan.media.color import over_white
from tests.media.registry import AUDIOS, VIDEOS, ffmpeg

RATE = 48000
# Longer side of the pixels, of the shorter one.
SQUARE = "scale='if(gt(sar,1),round(iw*sar),iw)':'if(gt(sar,1),ih,round(ih/sar))':flags=bicubic"


def reference_frames(path, width, height, track="0:V:0", shown=(), decoder=()):
    """(seconds, frame) of all frames that a player shows, scaled."""
    filters = [*shown, SQUARE, f"scale={width}:{height}:flags=bicubic", "showinfo", "format=rgba"]
    command = ["-copyts", *decoder, "-i", path, "-map", track, "-vf", ",".join(filters), "-fps_mode", "passthrough"]
    content, log = ffmpeg(*command, "-f", "rawvideo", "-")
    times = [float(value) for value in re.findall(r"pts_time:(\S+)", log)]
    frames = np.frombuffer(content, np.uint8).reshape(-1, height, width, 4)
    return list(zip(times, map(over_white, frames), strict=True))


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_ffmpeg(tmp_path, name):
    file = VIDEOS[name]
    path = file.write(tmp_path)
    info = probe_video(path)
    # Half of the displayed size: both sides then scale, as a reader for training does.
    width, height = info.width // 2, info.height // 2
    expected = reference_frames(path, width, height, file.track, file.shown, file.decoder)
    found = list(iter_frames(path))
    if not info.is_variable:
        assert len(found) == len(expected)
    for index, frame in enumerate(found):
        assert frame.shape == (info.height, info.width, 3)
        # The frame on the screen i / fps seconds after the first; in the middle between two either may be shown.
        at_s = expected[0][0] + float(index / info.fps)
        distance = min(abs(time_s - at_s) for time_s, _ in expected)
        nearest = [theirs for time_s, theirs in expected if abs(time_s - at_s) <= distance + 0.002]
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
        scaled = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
        ours = scaled[0].permute(1, 2, 0).clamp(0, 255).numpy()
        differences = [np.abs(ours - theirs.astype(np.float32)) for theirs in nearest]
        difference = min(differences, key=np.mean)
        assert difference.mean() < 2
        # The corners, where a flip or a shift would show.
        assert difference[: height // 4, : width // 4].mean() < 3
        assert difference[-(height // 4) :, -(width // 4) :].mean() < 3
    # The last frame is on the screen until the end, and no longer than a frame of the mean rate.
    assert len(found) / info.fps == pytest.approx(expected[-1][0] - expected[0][0] + 1 / info.fps, abs=1.01 / info.fps)


def onsets_s(waveform, rate):
    """Starts of loud passages, in seconds."""
    level = np.abs(waveform).max(0)
    loud = (level > 0.4 * level.max()).nonzero()[0]
    return [float(at) / rate for at in loud[np.diff(loud, prepend=-rate) > 0.05 * rate]]


@pytest.mark.parametrize("name", AUDIOS)
def test_beeps_are_where_ffmpeg_plays_them(tmp_path, name):
    file = AUDIOS[name]
    path = file.write(tmp_path)
    # Gaps are filled with silence, from the start of the file.
    resample = "aresample=async=1:min_hard_comp=0.01" + (":first_pts=0" if file.has_video else "")
    command = ["-copyts", "-i", path, "-map", "0:a:0", "-af", resample, "-ac", "1", "-ar", RATE, "-f", "f32le", "-"]
    content, _ = ffmpeg(*command)
    origin_s = reference_frames(path, 16, 16)[0][0] if file.has_video else 0.0
    expected = [at_s - origin_s for at_s in onsets_s(np.frombuffer(content, np.float32)[None], RATE)]
    audio = read_audio(path)
    assert audio.sample_rate == file.rate
    assert onsets_s(audio.waveform.numpy(), audio.sample_rate) == pytest.approx(expected, abs=0.02)
    # The first channel is on the left, except in mono.
    left, right = audio.waveform[0].abs().max(), audio.waveform[-1].abs().max()
    assert left > 0.1
    if file.channels in (2, 3, 5, 6, 8) or file.layout:
        assert right < 0.1 * left
