"""Video, audio and image files as tensors and back, and the tables that list them."""

from ltx_titan.media.audio import (
    Audio,
    AudioInfo,
    after_time,
    iter_audio_parts,
    probe_audio,
    read_audio,
    to_duration,
    to_stereo,
)
from ltx_titan.media.container import MediaError, open_media
from ltx_titan.media.image import fit_frames, is_image, read_image, to_uint8
from ltx_titan.media.masks import read_audio_mask, read_video_mask
from ltx_titan.media.video import (
    TooFewFramesError,
    VideoInfo,
    frames_at_rate,
    is_same_rate,
    iter_fitted,
    iter_frames,
    probe_video,
    read_clip,
    seek_frames,
)
from ltx_titan.media.writer import cut_windows, encode_wav, video_writer, window_starts, write_video, write_wav

__all__ = [
    "Audio",
    "AudioInfo",
    "MediaError",
    "TooFewFramesError",
    "VideoInfo",
    "after_time",
    "cut_windows",
    "encode_wav",
    "fit_frames",
    "frames_at_rate",
    "is_image",
    "is_same_rate",
    "iter_audio_parts",
    "iter_fitted",
    "iter_frames",
    "open_media",
    "probe_audio",
    "probe_video",
    "read_audio",
    "read_audio_mask",
    "read_clip",
    "read_image",
    "read_video_mask",
    "seek_frames",
    "to_duration",
    "to_stereo",
    "to_uint8",
    "video_writer",
    "window_starts",
    "write_video",
    "write_wav",
]
