"""From decoded frames to 8-bit RGB in the color space of the training data: BT.709 primaries, SDR, full range.

Limited range and the YUV matrix are converted by FFmpeg's swscale as tagged; primaries of BT.2020 and P3 by FFmpeg's
filter `colorspace`, in linear light. PQ and HLG are refused with a command: mapping their range to SDR is a choice of
look, and PyAV's builds lack the filter (zscale) that players use for it. Transparency is composited over white.
"""

from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from ltx_titan.media.container import MediaError

# Values of ISO/IEC 23091-2 (H.273).
_UNSPECIFIED = 2
_WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_OTHER_PRIMARIES = {10: "XYZ"}
_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_OTHER_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic"}
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 13: "chromaticity-derived", 14: "ICtCp", 15: "IPT"}
# Input formats of the filter `colorspace`.
_FILTER_FORMATS = frozenset(f"yuv{s}p{depth}" for s in ("420", "422", "444") for depth in ("", "10le", "12le"))
WHITE = 255


class ToRgb:
    """Converts the frames of one video to uint8 RGB [H, W, 3]."""

    def __init__(self, path: str | Path) -> None:
        """Takes the video's path, for messages."""
        self._path = Path(path)
        self._graph: Graph | None = None
        # One for all frames: each frame's own would start threads that live as long as the frame.
        self._reformatter = VideoReformatter()
        self._is_dolby: bool | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts a frame.

        Raises:
            MediaError: its colors cannot be converted; the message has a command that converts the file.
        """
        self._check(frame)
        if frame.color_primaries in _WIDE_PRIMARIES:
            frame = self._to_bt709(frame)
        if has_alpha(frame):
            return over_white(self._reformatter.reformat(frame, format="rgba").to_ndarray())
        return self._reformatter.reformat(frame, format="rgb24").to_ndarray()

    def _check(self, frame: av.VideoFrame) -> None:
        transfer, name = frame.color_trc, self._path.name
        if self._is_dolby is None:
            # Profile 5 leaves the transfer unspecified: it is PQ in a color space of its own. Only the first frame is
            # asked: PyAV's side data refers back to its frame, which then lives until the garbage collector runs.
            self._is_dolby = transfer == _UNSPECIFIED and frame.side_data.get("DOVI_METADATA") is not None
        if transfer in _HDR_TRANSFERS or self._is_dolby:
            label = "Dolby Vision" if self._is_dolby else _HDR_TRANSFERS[transfer]
            raise MediaError(
                self._path,
                f"is HDR with the transfer function {label}, expected SDR (BT.709); convert its tones: "
                f"ffmpeg -i {name} -vf zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=clip:desat=0,"
                f"zscale=t=bt709:m=bt709:r=tv,format=yuv420p -crf 12 -c:a copy {self._path.stem}_sdr.mp4",
            )
        for kind, value, names in (
            ("transfer function", transfer, _OTHER_TRANSFERS),
            ("primaries", frame.color_primaries, _OTHER_PRIMARIES),
            ("matrix", frame.colorspace, _OTHER_MATRICES),
        ):
            if value in names:
                raise MediaError(
                    self._path,
                    f"its color {kind} is {names[value]}, expected BT.709; convert it: ffmpeg -i {name} "
                    f"-vf zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p -crf 12 {self._path.stem}_sdr.mp4",
                )

    def _to_bt709(self, frame: av.VideoFrame) -> av.VideoFrame:
        if frame.format.name not in _FILTER_FORMATS:
            raise MediaError(
                self._path,
                f"has {_WIDE_PRIMARIES[frame.color_primaries]} colors in the pixel format {frame.format.name}, "
                f"expected BT.709; convert it: ffmpeg -i {self._path.name} -vf scale=out_color_matrix=bt2020nc,"
                f"format=yuv444p12le,colorspace=all=bt709 -crf 12 {self._path.stem}_709.mp4",
            )
        if self._graph is None:
            self._graph = _bt709_graph(frame)
        self._graph.push(frame)
        converted = self._graph.pull()
        assert isinstance(converted, av.VideoFrame)
        return converted


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether the pixel format of a frame has transparency."""
    return any(component.is_alpha for component in frame.format.components)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Composites uint8 RGBA [H, W, 4] over white: a c + (1 - a) 255 on the encoded values, as browsers do."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + WHITE * (1 - alpha)).round().astype(np.uint8)


def _bt709_graph(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    # What a file leaves unspecified is what its primaries are used with.
    options = ["all=bt709", "range=tv"]
    if frame.color_trc == _UNSPECIFIED:
        options.append("itrc=bt709")
    if frame.colorspace == _UNSPECIFIED:
        options.append("ispace=bt2020nc" if frame.color_primaries == 9 else "ispace=bt709")
    if frame.color_range == 0:
        options.append("irange=tv")
    filters = graph.add("colorspace", ":".join(options))
    sink = graph.add("buffersink")
    source.link_to(filters)
    filters.link_to(sink)
    graph.configure()
    return graph
