"""Small media files for tests."""

from fractions import Fraction

import av
import torch
from PIL import Image

from ltx_titan.media import write_video


def ramp(frames, height=64, width=96):
    """A clip whose frame i is gray of value 8 i."""
    values = (torch.arange(frames) * 8).clamp(max=255).to(torch.uint8)
    return values.view(-1, 1, 1, 1).expand(-1, height, width, 3).contiguous()


def tone(seconds, rate, channels=2, hertz=440.0):
    wave = 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * rate)) / rate)
    return wave.expand(channels, -1).contiguous()


def write_clip(path, frames=20, fps=Fraction(25), channels=2, height=64, width=96, rate=48000):
    """Writes a ramp with a tone of the same duration; `channels=0` for no audio."""
    audio = tone(frames / fps, rate, channels) if channels else None
    write_video(path, ramp(frames, height, width), fps, audio, rate if channels else None)
    return path


def write_mixed_files(folder):
    """Writes a file of every kind, the last two unreadable; returns their names."""
    (folder / "sub").mkdir()
    write_clip(folder / "stereo.mp4", frames=20, fps=Fraction(24000, 1001), channels=2)
    write_clip(folder / "sub" / "mönö ☃.mp4", frames=17, channels=1, rate=24000)
    write_clip(folder / "silent.mp4", frames=17, channels=0)
    write_clip(folder / "short.mp4", frames=3)
    Image.new("RGB", (90, 50), "orange").save(folder / "still.png")
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    return ["stereo.mp4", "sub/mönö ☃.mp4", "silent.mp4", "short.mp4", "still.png", "zero.mp4", "text.mp4"]


def write_late_audio(path, delay_s, rate=48000, seconds=1.0):
    """Writes a video of one second whose audio starts `delay_s` later, as some cameras do."""
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for pixels in ramp(25, 64, 64).numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        samples = (tone(seconds, rate, 1) * 32767).to(torch.int16).numpy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), int(delay_s * rate)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path
