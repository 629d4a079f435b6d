from ltx_titan.media.audio import Audio, encode_wav, read_audio, to_duration, to_stereo, write_wav
from ltx_titan.media.errors import MediaError
from ltx_titan.media.frames import fit_frames, to_uint8
from ltx_titan.media.image import IMAGE_SUFFIXES, is_image, read_image
from ltx_titan.media.masks import read_audio_mask, read_video_mask
from ltx_titan.media.video import (
    VideoInfo,
    frames_at_rate,
    iter_fitted,
    iter_frames,
    open_media,
    probe_video,
    read_clip,
    write_video,
)
from ltx_titan.media.windows import cut_windows, window_starts
from ltx_titan.media.writer import video_writer

__all__ = [
    "IMAGE_SUFFIXES",
    "Audio",
    "MediaError",
    "VideoInfo",
    "cut_windows",
    "encode_wav",
    "fit_frames",
    "frames_at_rate",
    "is_image",
    "iter_fitted",
    "iter_frames",
    "open_media",
    "probe_video",
    "read_audio",
    "read_audio_mask",
    "read_clip",
    "read_image",
    "read_video_mask",
    "to_duration",
    "to_stereo",
    "to_uint8",
    "video_writer",
    "window_starts",
    "write_video",
    "write_wav",
]
