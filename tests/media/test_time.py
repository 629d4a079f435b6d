"""Time comes from time stamps and counts from what decodes, in video and audio."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.clips import ClipRules, decode_clip, plan_clip
from ltx_titan.media import MediaError, frames_at_rate, iter_audio_parts, iter_frames, probe_video, read_audio
from tests.media.clips import ramp, write_clip
from tests.media.containers import write_frames

RATE = 48000
# One second at 30 and two seconds at 10 frames per second.
VARYING_MS = [round(1000 * index / 30) for index in range(30)] + [1000 + 100 * index for index in range(20)]


def gray(level, count=1):
    return [np.full((64, 64, 3), level, np.uint8)] * count


def levels(path, fps=None):
    return [int(frame.mean()) for frame in iter_frames(path, fps)]


def write_varying(path):
    """A clip that turns white at second 2.0."""
    frames = [gray(255 if time_ms >= 2000 else 0)[0] for time_ms in VARYING_MS]
    return write_frames(path, frames, times=VARYING_MS, options={"bf": "0"})


def test_variable_rate_is_resampled_at_its_mean(tmp_path):
    path = write_varying(tmp_path / "a.mkv")
    info = probe_video(path)
    assert info.is_variable
    assert float(info.fps) == pytest.approx(49 / 2.9, abs=0.01)
    assert info.frames == 50
    found = levels(path)
    assert len(found) == 50
    first_white = next(index for index, level in enumerate(found) if level > 128)
    # The nearest frame: off by half of the 0.1 s between two frames at most.
    assert float(first_white / info.fps) == pytest.approx(2.0, abs=0.05)
    clip = plan_clip(path, ClipRules([Bucket(64, 64, 41)], (8, 32, 32)))
    assert clip.notes == ("videos of variable frame rate, resampled by their time stamps",)


def test_variable_rate_at_another_rate_has_all_its_seconds(tmp_path):
    path = write_varying(tmp_path / "a.mkv")
    count = frames_at_rate(probe_video(path), Fraction(24))
    assert count == 71
    found = levels(path, Fraction(24))
    assert len(found) == count
    # Time 2.0 is frame 48; the nearest frame to 47 / 24 = 1.958 s is that of 2.0 s.
    assert [level > 128 for level in found[46:50]] == [False, True, True, True]


def test_dropped_frames_keep_the_usual_rate(tmp_path):
    times = [40 * index for index in range(50) if not 20 <= index < 23]
    frames = [gray(255 if time_ms >= 1200 else 0)[0] for time_ms in times]
    path = write_frames(tmp_path / "a.mkv", frames, times=times, options={"bf": "0"})
    info = probe_video(path)
    assert (info.fps, info.frames, info.is_variable) == (25, 50, True)
    found = levels(path)
    assert len(found) == 50
    assert [level > 128 for level in found[28:32]] == [False, False, True, True]


def test_rounding_of_the_container_is_no_variable_rate(tmp_path):
    path = write_frames(tmp_path / "a.mkv", gray(9, 40), fps=Fraction(30000, 1001))
    info = probe_video(path)
    assert (info.fps, info.frames, info.is_variable) == (Fraction(30000, 1001), 40, False)


@pytest.mark.parametrize(("suffix", "codec"), [("mpg", "mpeg1video"), ("vob", "mpeg2video"), ("ts", "libx264")])
def test_frames_of_headers_without_a_count_are_counted(tmp_path, suffix, codec):
    path = write_frames(tmp_path / f"a.{suffix}", gray(9, 25), codec=codec)
    assert probe_video(path).frames == len(list(iter_frames(path))) == 25


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    """A cut without re-encoding keeps the frames since the key frame, and hides them."""
    source, cut = tmp_path / "a.mp4", tmp_path / "cut.mp4"
    write_frames(source, list(ramp(20, 64, 64).numpy()), options={"bf": "0", "g": "100"})
    with av.open(str(source)) as one, av.open(str(cut), "w") as out:
        stream = out.add_stream_from_template(one.streams.video[0])
        for packet in one.demux(video=0):
            if packet.size:
                shift = round(Fraction(8, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                out.mux(packet)
    info = probe_video(cut)
    assert info.frames == len(levels(cut)) == 12
    assert levels(cut)[0] == pytest.approx(64, abs=4)
    rules = ClipRules([Bucket(64, 64, 17), Bucket(64, 64, 9)], (8, 32, 32))
    assert plan_clip(cut, rules).bucket.frames == 9


def test_shorter_bucket_is_chosen_if_fewer_frames_decode(tmp_path):
    """Frames of a stream that starts before its first key frame are in the file but do not decode."""
    source, path = tmp_path / "a.ts", tmp_path / "late.ts"
    write_frames(source, list(ramp(30, 64, 64).numpy()), options={"bf": "0", "g": "10", "sc_threshold": "0"})
    with av.open(str(source)) as one, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(one.streams.video[0])
        for index, packet in enumerate(one.demux(video=0)):
            if packet.size and index >= 5:
                packet.stream = stream
                out.mux(packet)
    decodable = len(levels(path))
    assert decodable < probe_video(path).frames == 25
    rules = ClipRules([Bucket(64, 64, 25), Bucket(64, 64, 17)], (8, 32, 32))
    decoded = decode_clip(path, rules, path, with_audio=False)
    assert decoded.clip.bucket.frames == decoded.pixels.shape[1] == 17
    with pytest.raises(MediaError, match="the shortest bucket needs 25"):
        decode_clip(path, ClipRules([Bucket(64, 64, 25)], (8, 32, 32)), path, with_audio=False)


def test_interlaced_video_is_noticed(tmp_path):
    options = {"x264-params": "tff=1:interlaced=1"}
    path = write_frames(tmp_path / "a.mp4", gray(99, 9), options=options)
    assert probe_video(path).is_interlaced
    assert not probe_video(write_frames(tmp_path / "b.mp4", gray(99, 9))).is_interlaced
    (note,) = plan_clip(path, ClipRules([Bucket(64, 64, 9)], (8, 32, 32))).notes
    assert note.startswith("interlaced videos")


def write_audio(path, pieces, video_start_s=0.0, codec="pcm_s16le"):
    """Writes two seconds of video and pieces (start in seconds, rate, samples [C, N] in [-1, 1])."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        rate, channels = pieces[0][1], pieces[0][2].shape[0]
        audio = container.add_stream(codec, rate=rate, layout="stereo" if channels == 2 else "mono")
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(gray(9)[0], format="rgb24")
            frame.pts, frame.time_base = round(1000 * video_start_s) + 40 * index, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for start_s, rate, samples in pieces:
            layout = "stereo" if samples.shape[0] == 2 else "mono"
            data = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(data, format="s16", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start_s * rate)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def beep(at_s, seconds, rate=RATE, channels=1):
    """Silence with a loud tenth of a second."""
    samples = np.zeros((channels, round(seconds * rate)), np.float32)
    first = round(at_s * rate)
    samples[:, first : first + rate // 10] = 0.8
    return samples


def loud_s(audio):
    return float((audio.waveform.abs().amax(0) > 0.2).nonzero()[0]) / audio.sample_rate


def both_readers(path):
    """The onset of the beep, from the whole track and from a part that starts at 0.5 s."""
    (part,) = iter_audio_parts(path, [(0.5, 1.4)])
    return loud_s(read_audio(path)), 0.5 + loud_s(part)


@pytest.mark.parametrize("gap_s", [0.02, 0.04, 0.5])
def test_gap_does_not_shift_what_follows(tmp_path, gap_s):
    pieces = [(0.0, RATE, beep(9, 0.4)), (0.4 + gap_s, RATE, beep(0.6 - gap_s, 1.2))]
    assert both_readers(write_audio(tmp_path / "a.mkv", pieces)) == pytest.approx((1.0, 1.0), abs=0.002)


def test_overlap_does_not_shift_what_follows(tmp_path):
    pieces = [(0.0, RATE, beep(9, 0.6)), (0.5, RATE, beep(0.5, 1.2))]
    assert both_readers(write_audio(tmp_path / "a.mkv", pieces)) == pytest.approx((1.0, 1.0), abs=0.002)


def test_audio_is_timed_from_the_first_video_frame(tmp_path):
    path = write_audio(tmp_path / "a.mkv", [(0.0, RATE, beep(1.48, 2))], video_start_s=0.48)
    assert both_readers(path) == pytest.approx((1.0, 1.0), abs=0.002)


def mp2(path, pieces):
    """A transport stream with audio alone: its pieces differ in rate or channels, as broadcasts do."""
    content = b""
    for index, (start_s, rate, samples) in enumerate(pieces):
        name = path.with_name(f"part{index}.ts")
        with av.open(str(name), "w", format="mpegts") as container:
            layout = "stereo" if samples.shape[0] == 2 else "mono"
            audio = container.add_stream("mp2", rate=rate, layout=layout)
            data = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(data, format="s16", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start_s * rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
        content += name.read_bytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("rate", "channels"), [(44100, 1), (32000, 1), (RATE, 2)], ids=["44_1_khz", "32_khz", "stereo"]
)
def test_changes_of_rate_and_channels_keep_time_and_pitch(tmp_path, rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate, dtype=np.float32)[None].repeat(channels, 0)
    tone[:, : rate // 2] = 0
    path = mp2(tmp_path / "a.ts", [(0.0, RATE, beep(9, 0.6)), (0.6, rate, tone)])
    audio = read_audio(path)
    assert audio.sample_rate == RATE
    assert audio.waveform.shape[0] == channels
    assert loud_s(audio) == pytest.approx(1.1, abs=0.02)
    # 1 kHz: 48 samples per period.
    middle = audio.waveform[0, round(1.2 * RATE) : round(1.5 * RATE)]
    spectrum = torch.fft.rfft(middle).abs()
    assert spectrum.argmax() / (middle.numel() / RATE) == pytest.approx(1000, abs=5)


def test_empty_audio_track_is_no_audio(tmp_path):
    # Written by a screen recorder: a track of AAC whose samples last no time.
    path = Path(__file__).parent / "data" / "empty_audio_track.mp4"
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert read_audio(path) is None
    assert not probe_video(path).has_audio
    assert list(iter_audio_parts(path, [(0, 0.1)])) == [None]
    decoded = decode_clip(path, ClipRules([Bucket(64, 64, 9)], (8, 32, 32)), path, with_audio=True)
    assert decoded.audio is None
    assert probe_video(write_clip(tmp_path / "b.mp4", frames=9)).has_audio


def test_track_without_packets_is_no_audio(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        container.add_stream("aac", rate=RATE, layout="stereo")
        container.start_encoding()
        for pixels in gray(9, 9):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert read_audio(path) is None
    assert (probe_video(path).has_audio, probe_video(path).frames) == (False, 9)


def appended(folder, *parts):
    """A transport stream of parts (width, height, start in seconds) appended to each other."""
    path = folder / "joined.ts"
    content = b""
    for index, (width, height, start_s) in enumerate(parts):
        part = folder / f"part{index}.ts"
        with av.open(str(part), "w", options={"output_ts_offset": str(start_s)}) as container:
            stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for level in (40, 80, 120, 160, 200):
                pixels = np.full((height, width, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        content += part.read_bytes()
    path.write_bytes(content)
    return path


def test_frames_of_another_resolution_get_the_size_of_the_first(tmp_path):
    path = appended(tmp_path, (96, 64, 0), (192, 128, 0.2))
    frames = list(iter_frames(path))
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 10
    assert [int(frame.mean()) for frame in frames] == pytest.approx([40, 80, 120, 160, 200] * 2, abs=4)


def test_frames_of_another_aspect_ratio_are_refused(tmp_path):
    path = appended(tmp_path, (96, 64, 0), (64, 64, 0.2))
    with pytest.raises(MediaError, match=r"changes its size from 96x64 to 64x64 at 0\.200 s"):
        list(iter_frames(path))


@pytest.mark.parametrize(("start_s", "reason"), [(500, "jump by 500 s"), (0, "start again")])
def test_broadcasts_whose_clock_jumps_are_refused(tmp_path, start_s, reason):
    path = appended(tmp_path, (96, 64, 0), (96, 64, start_s))
    with pytest.raises(MediaError, match=rf"its time stamps {reason}.*ffmpeg -i joined\.ts -c copy joined_joined\.mkv"):
        probe_video(path)
