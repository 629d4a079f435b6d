"""Video files written frame by frame, so that a clip of any length costs no more memory than one frame."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from ltx_titan.media.errors import MediaError


@contextmanager
def video_writer(
    path: str | Path,
    width: int,
    height: int,
    fps: Fraction | float,
    audio: Tensor | None = None,
    sample_rate: int | None = None,
    crf: int = 18,
) -> Iterator[Callable[[np.ndarray], None]]:
    """An mp4 (H.264 in yuv420p, AAC) that browsers and TensorBoard play; complete or not there at all.

    Args:
        path: the file; its folder is made.
        width: pixels, even.
        height: pixels, even.
        fps: frames per second; a fraction keeps rates such as 30000/1001 exact.
        audio: float waveform [1 or 2, N] in [-1, 1], or None for a silent file.
        sample_rate: of the waveform, Hz; needed with it.
        crf: quality of H.264, 0 (lossless) to 51; 18 is hard to tell from the source.

    Yields:
        A function that takes the next frame, uint8 [height, width, 3].
    """
    if height % 2 or width % 2:
        raise MediaError(path, f"frames of {width}x{height} cannot be written as H.264, width and height must be even")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(100_000)
            video = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio_stream = None
            if audio is not None:
                assert sample_rate is not None
                assert audio.shape[0] in (1, 2)
                layout = "stereo" if audio.shape[0] == 2 else "mono"
                audio_stream = container.add_stream("aac", rate=sample_rate, layout=layout)
            yield lambda pixels: container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(video.encode())
            if audio_stream is not None:
                samples = np.ascontiguousarray(audio.detach().float().clamp(-1, 1).cpu().numpy())
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
                container.mux(audio_stream.encode(frame))
                container.mux(audio_stream.encode())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
