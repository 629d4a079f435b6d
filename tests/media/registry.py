"""Small files of every kind that the readers take, made by FFmpeg's command line from the same frames and beep."""

import subprocess
from dataclasses import dataclass, field

import imageio_ffmpeg
import numpy as np

from tests.media.containers import set_clean_aperture, set_matrix, set_matroska_crop

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
HEIGHT, WIDTH = 88, 112
# A loud tenth of a second at 0.3 s, in one channel.
BEEP = "if(between(t\\,0.3\\,0.4)\\,0.8*sin(2*PI*1000*t)\\,0)"


def ffmpeg(*arguments, content=None):
    """Runs the command; returns its output and its log."""
    command = [FFMPEG, "-hide_banner", "-nostdin", "-y", "-threads", "1", *map(str, arguments)]
    if content is not None:
        command.remove("-nostdin")
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    log = done.stderr.decode(errors="replace")
    assert done.returncode == 0, log[-1500:]
    return done.stdout, log


def scenery(index, height=HEIGHT, width=WIDTH):
    """Smooth colors that move, so that a shift, squeeze or wrong color shows."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(x + index / 2), np.sin(y * 1.3 - index / 3), np.cos(x - y)]
    return ((np.stack(waves, axis=-1) * 0.4 + 0.5) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class VideoFile:
    """A file of moving colors.

    Attributes:
        suffix: of its name, which chooses the container.
        options: of the command that writes it.
        frames: number of frames.
        finish: what is done to the finished file.
        track: the one that a player shows, as FFmpeg names it.
        shown: filters that a player applies beside those of the `ffmpeg` command.
        decoder: options of the command that reads it.
    """

    suffix: str
    options: str = "-c:v libx264 -preset ultrafast -crf 8 -pix_fmt yuv420p"
    frames: int = 6
    finish: object = None
    track: str = "0:V:0"
    shown: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()

    def write(self, folder):
        path = folder / f"clip.{self.suffix}"
        content = b"".join(scenery(index).tobytes() for index in range(self.frames))
        options = [option.replace("{folder}", str(folder)) for option in self.options.split()]
        ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "25", "-i", "-", *options, path,
               content=content)  # fmt: skip
        return path if self.finish is None else self.finish(path) or path


H264 = "-c:v libx264 -preset ultrafast -crf 8"
YUV = f"{H264} -pix_fmt yuv420p"
BT709 = "setparams=color_primaries=bt709:color_trc=bt709"


def again(*options, suffix=None, before=()):
    """Writes a file once more with FFmpeg, most often without encoding."""

    def finish(path):
        target = path.with_name(f"again.{suffix or path.suffix[1:]}")
        ffmpeg(*before, "-i", path, *options, target)
        return target

    return finish


def cut_bytes(first):
    """Drops the start of a file, as of a recording of a running broadcast."""
    return lambda path: path.write_bytes(path.read_bytes()[first * 188 :]) and None


def matrix(*values):
    return lambda path: set_matrix(path, *values)


VIDEOS = {
    # Containers and codecs.
    "mp4": VideoFile("mp4", YUV),
    "mov": VideoFile("mov", YUV),
    "mkv": VideoFile("mkv", YUV),
    "ts": VideoFile("ts", YUV),
    "flv": VideoFile("flv", YUV),
    "3gp": VideoFile("3gp", YUV),
    "m4v_fragmented": VideoFile("m4v", f"{YUV} -movflags frag_keyframe+empty_moov"),
    "h264_without_time_stamps": VideoFile("h264", YUV),
    "avi_with_b_frames": VideoFile("avi", "-c:v libx264 -bf 2 -crf 8 -pix_fmt yuv420p"),
    "b_frames_open_gop": VideoFile(
        "mp4", "-c:v libx264 -bf 3 -crf 8 -pix_fmt yuv420p -x264-params open-gop=1:keyint=4", 12
    ),
    "hevc": VideoFile(
        "mp4", "-c:v libx265 -preset ultrafast -crf 8 -x265-params log-level=none:pools=1:frame-threads=1"
    ),
    "mpeg1": VideoFile("mpg", "-c:v mpeg1video -q 2"),
    "mpeg2": VideoFile("vob", "-c:v mpeg2video -q 2"),
    "mpeg4": VideoFile("avi", "-c:v mpeg4 -q 2"),
    "vp8": VideoFile("webm", "-c:v libvpx -crf 4 -b:v 4M -deadline realtime"),
    "vp9": VideoFile("webm", "-c:v libvpx-vp9 -crf 8 -b:v 0 -deadline realtime -cpu-used 8"),
    "av1": VideoFile("mp4", "-c:v libaom-av1 -crf 8 -usage realtime -cpu-used 8", 3),
    "prores": VideoFile("mov", "-c:v prores_ks"),
    "mjpeg_full_range": VideoFile("avi", "-c:v mjpeg -q 2"),
    "wmv": VideoFile("wmv", "-c:v wmv2 -q 2"),
    "theora": VideoFile("ogv", "-c:v libtheora -q 10"),
    "ffv1": VideoFile("mkv", "-c:v ffv1 -pix_fmt yuv420p"),
    "huffyuv": VideoFile("avi", "-c:v huffyuv -pix_fmt yuv422p"),
    "y4m": VideoFile("y4m", "-pix_fmt yuv420p"),
    "gif": VideoFile("gif", "-vf fps=20"),
    "apng": VideoFile("apng", "-c:v apng -plays 1"),
    "animated_webp_in_mov": VideoFile("mov", "-c:v png"),
    # Pixel formats.
    "422": VideoFile("mp4", f"{H264} -pix_fmt yuv422p"),
    "444": VideoFile("mp4", f"{H264} -pix_fmt yuv444p"),
    "411": VideoFile("mkv", "-c:v ffv1 -pix_fmt yuv411p"),
    "10_bit": VideoFile("mp4", f"{H264} -pix_fmt yuv420p10le"),
    "12_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt yuv444p12le"),
    "16_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt yuv444p16le"),
    "rgb": VideoFile("mkv", "-c:v ffv1 -pix_fmt gbrp"),
    "rgb_10_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt gbrp10le"),
    "rgb_16_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt rgb48le"),
    "gray": VideoFile("mkv", "-c:v ffv1 -pix_fmt gray"),
    "gray_limited_range": VideoFile(
        "mkv", "-vf format=yuv420p,extractplanes=y -c:v ffv1 -pix_fmt gray -color_range tv"
    ),
    "gray_h264": VideoFile("mp4", f"{H264} -pix_fmt gray"),
    "gray_10_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt gray10le"),
    "gray_16_bit": VideoFile("mkv", "-c:v ffv1 -pix_fmt gray16le"),
    "palette": VideoFile("mov", "-vf format=pal8 -c:v png"),
    "transparent": VideoFile("mov", "-vf format=rgba,colorchannelmixer=aa=0.5 -c:v png"),
    "transparent_yuv": VideoFile("mkv", "-vf format=rgba,colorchannelmixer=aa=0.4 -c:v ffv1 -pix_fmt yuva444p"),
    "transparent_prores": VideoFile(
        "mov", "-vf format=rgba,colorchannelmixer=aa=0.6 -c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le"
    ),
    "transparent_vp9": VideoFile(
        "webm",
        "-vf format=rgba,colorchannelmixer=aa=0.5,format=yuva420p -c:v libvpx-vp9 -crf 8 -b:v 0 -cpu-used 8",
        decoder=("-c:v", "libvpx-vp9"),
    ),
    "transparent_vp8": VideoFile(
        "webm",
        "-vf format=rgba,colorchannelmixer=aa=0.5,format=yuva420p -c:v libvpx -crf 4 -b:v 4M -auto-alt-ref 0",
        decoder=("-c:v", "libvpx"),
    ),
    # Colors.
    "full_range": VideoFile("mp4", f"-vf scale=out_range=pc {YUV} -color_range pc"),
    "bt601": VideoFile("mp4", f"-vf scale=out_color_matrix=smpte170m {YUV} -colorspace smpte170m"),
    "bt709": VideoFile("mp4", f"-vf scale=out_color_matrix=bt709,format=yuv420p,{BT709} {H264}"),
    "bt709_full_range": VideoFile(
        "mp4", f"-vf scale=out_color_matrix=bt709:out_range=pc,format=yuv420p,{BT709} {H264}"
    ),
    "bt2020_matrix": VideoFile("mp4", f"-vf scale=out_color_matrix=bt2020nc {YUV} -colorspace bt2020nc"),
    "bt2020": VideoFile(
        "mp4",
        "-vf scale=out_color_matrix=bt2020nc,format=yuv444p10le,"
        f"setparams=color_primaries=bt2020:color_trc=bt2020-10 {H264}",
        # In linear light by the curve of cameras; players that use that of displays differ in saturated colors.
        shown=("colorspace=all=bt709",),
    ),
    # Geometry.
    "odd_size": VideoFile("mkv", "-vf crop=99:77:0:0 -c:v ffv1 -pix_fmt yuv444p"),
    "sar_4_3": VideoFile("mp4", f"-vf setsar=4/3 {YUV}"),
    "sar_8_9_mkv": VideoFile("mkv", f"-vf setsar=8/9 {YUV}"),
    "sar_2_1_mpeg2": VideoFile("mpg", "-vf setsar=16/11 -c:v mpeg2video -q 2 -aspect 16:9"),
    "sar_of_the_container": VideoFile("mp4", YUV, finish=again("-c", "copy", "-aspect", "2:1")),
    "sar_avi": VideoFile("avi", "-vf setsar=2/1 -c:v mpeg4 -q 2"),
    "rotated_90": VideoFile("mp4", YUV, finish=matrix(0, 1, -1, 0)),
    "rotated_180": VideoFile("mp4", YUV, finish=matrix(-1, 0, 0, -1)),
    "rotated_270": VideoFile("mp4", YUV, finish=matrix(0, -1, 1, 0)),
    "mirrored": VideoFile("mp4", YUV, finish=matrix(-1, 0, 0, 1)),
    "upside_down": VideoFile("mp4", YUV, finish=matrix(1, 0, 0, -1)),
    "transposed": VideoFile("mp4", YUV, finish=matrix(0, 1, 1, 0)),
    "rotated_wide_pixels": VideoFile("mp4", f"-vf setsar=4/3 {YUV}", finish=matrix(0, 1, -1, 0)),
    "rotated_mkv": VideoFile("mp4", YUV, finish=again("-c", "copy", suffix="mkv", before=("-display_rotation", "90"))),
    "rotated_h264": VideoFile(
        "mp4",
        YUV,
        finish=again("-c", "copy", "-bsf:v", "h264_metadata=display_orientation=insert:rotate=90", suffix="ts"),
    ),
    "clean_aperture": VideoFile("mp4", YUV, finish=lambda path: set_clean_aperture(path, 80, 56, -8, 4)),
    "matroska_crop": VideoFile("mkv", YUV, finish=lambda path: set_matroska_crop(path, 8, 4, 24, 12)),
    "crop_of_the_codec": VideoFile(
        "mp4",
        YUV,
        finish=again("-c", "copy", "-bsf:v", "h264_metadata=crop_left=16:crop_right=8:crop_top=8:crop_bottom=4"),
    ),
    "crop_and_wide_pixels": VideoFile(
        "mkv", f"-vf setsar=4/3 {YUV}", finish=lambda path: set_matroska_crop(path, 8, 0, 8, 0)
    ),
    # Tracks.
    "second_track_is_default": VideoFile(
        "mkv",
        "-filter_complex [0:v]split[a][b];[a]negate,scale=64:64[c] -map [c] -map [b] "
        f"{YUV} -disposition:v:0 0 -disposition:v:1 default",
        track="0:v:1",
    ),
    "cover_first": VideoFile(
        "mp4",
        "-filter_complex [0:v]split[a][b];[a]negate,trim=end_frame=1[c] -map [c] -map [b] -c:v:0 mjpeg -q 2 "
        "-c:v:1 libx264 -pix_fmt:v:1 yuv420p -disposition:v:0 attached_pic",
    ),
    # Time.
    "59_94_fps": VideoFile("mp4", f"-vf settb=1/60000,setpts=N*1001 -fps_mode passthrough {YUV}"),
    "1_fps": VideoFile("mp4", f"-vf setpts=N/TB -fps_mode passthrough {YUV}"),
    "variable_rate": VideoFile(
        "mkv", f"-vf settb=1/1000,setpts=if(lt(N\\,10)\\,N*33\\,330+(N-10)*100) -fps_mode passthrough {YUV} -bf 0", 16
    ),
    "variable_rate_mp4": VideoFile(
        "mp4", f"-vf settb=1/1000,setpts=if(lt(N\\,10)\\,N*100\\,1000+(N-10)*40) -fps_mode passthrough {YUV}", 16
    ),
    "dropped_frames": VideoFile("mkv", f"-vf select=not(between(n\\,7\\,8)) -fps_mode passthrough {YUV}", 24),
    "gif_with_delays": VideoFile(
        "gif", "-vf settb=1/100,setpts=if(lt(N\\,4)\\,N*10\\,40+(N-4)*50) -fps_mode passthrough", 8
    ),
    "late_start": VideoFile("mkv", f"{YUV} -output_ts_offset 0.7"),
    "edit_list": VideoFile(
        "mp4", "-c:v libx264 -crf 8 -pix_fmt yuv420p -g 30", 20, finish=again("-c", "copy", before=("-ss", "0.28"))
    ),
    "cut_broadcast": VideoFile("ts", f"{YUV} -g 5 -bf 0", 20, finish=cut_bytes(12)),
    "time_stamps_of_a_day": VideoFile("ts", f"{YUV} -output_ts_offset 86400"),
    # Scanning.
    "interlaced": VideoFile(
        "mp4",
        "-vf tinterlace=interleave_top,setfield=tff -c:v libx264 -crf 6 -pix_fmt yuv420p "
        "-flags +ilme+ildct -x264opts tff=1",
        16,
        shown=("bwdif=send_frame:deint=interlaced",),
    ),
    "interlaced_mpeg2": VideoFile(
        "mpg",
        "-vf tinterlace=interleave_bottom,setfield=bff -c:v mpeg2video -q 2 -flags +ilme+ildct -field_order bt",
        16,
        shown=("bwdif=send_frame:deint=interlaced",),
    ),
}


@dataclass(frozen=True)
class AudioFile:
    """A file with a beep at 0.3 s of its audio.

    Attributes:
        suffix: of its name, which chooses the container.
        codec: options of the encoder.
        rate: Hz.
        channels: number of channels; only the first one beeps.
        layout: their positions.
        has_video: whether there is a video of 1 s.
        options: of the command that writes it.
        filters: of the audio.
        finish: what is done to the finished file.
    """

    suffix: str
    codec: str = "aac"
    rate: int = 48000
    channels: int = 1
    layout: str = ""
    has_video: bool = True
    options: str = ""
    filters: str = "anull"
    before: tuple[str, ...] = ()
    video_before: tuple[str, ...] = ()
    finish: object = field(default=None)

    def write(self, folder):
        path = folder / f"audio.{self.suffix}"
        beep = "|".join([BEEP] + ["0"] * (self.channels - 1))
        layout = f":c={self.layout}" if self.layout else ""
        inputs = [*self.before, "-f", "lavfi", "-i", f"aevalsrc={beep}{layout}:s={self.rate}:d=1,{self.filters}"]
        if self.has_video:
            inputs = [*self.video_before, "-f", "lavfi", "-i", "color=gray:s=32x32:r=25:d=1", *inputs]
        ffmpeg(*inputs, "-c:a", *self.codec.split(), *self.options.split(), path)
        return path if self.finish is None else self.finish(path) or path


def joined(rate, channels):
    """Appends a transport stream whose audio has another rate or number of channels, beeping at 1.3 s."""

    def finish(path):
        other = path.with_name("other.ts")
        beep = "|".join([BEEP] * channels)
        ffmpeg("-f", "lavfi", "-i", f"aevalsrc={beep}:s={rate}:d=1", "-c:a", "mp2", "-output_ts_offset", "1", other)
        path.write_bytes(path.read_bytes() + other.read_bytes())

    return finish


GAP = "aselect=not(between(t\\,0.1\\,0.2))"
AUDIOS = {
    # Containers, codecs, priming.
    "aac_mp4": AudioFile("mp4"),
    "aac_mkv": AudioFile("mkv"),
    "aac_ts": AudioFile("ts"),
    "aac_adts": AudioFile("aac", has_video=False),
    "alac": AudioFile("m4a", "alac", has_video=False),
    "mp3": AudioFile("mp3", "libmp3lame", 44100, has_video=False),
    "mp3_mp4": AudioFile("mp4", "libmp3lame", 44100),
    "opus_webm": AudioFile("webm", "libopus"),
    "opus_ogg": AudioFile("ogg", "libopus", has_video=False),
    "vorbis": AudioFile("ogg", "libvorbis", 44100, 2, has_video=False),
    "flac": AudioFile("flac", "flac", has_video=False),
    "ac3": AudioFile("mkv", "ac3"),
    "mp2_mpg": AudioFile("mpg", "mp2"),
    "wma": AudioFile("wmv", "wmav2", 44100, 2),
    "adpcm": AudioFile("wav", "adpcm_ima_wav", 22050, has_video=False),
    "pcm_8_bit": AudioFile("wav", "pcm_u8", 8000, has_video=False),
    "pcm_24_bit": AudioFile("wav", "pcm_s24le", 96000, has_video=False),
    "pcm_float": AudioFile("wav", "pcm_f32le", 24000, has_video=False),
    "pcm_double_mov": AudioFile("mov", "pcm_f64le", 44100),
    "pcm_big_endian": AudioFile("aiff", "pcm_s16be", has_video=False),
    # Rates.
    "24_khz": AudioFile("mp4", rate=24000),
    "44_1_khz": AudioFile("mp4", rate=44100),
    "96_khz": AudioFile("mp4", rate=96000),
    "192_khz": AudioFile("mkv", "flac", 192000),
    # Channels.
    "stereo": AudioFile("mp4", channels=2),
    "2_1": AudioFile("mkv", "flac", channels=3, layout="2.1"),
    "3_0": AudioFile("mkv", "flac", channels=3, layout="3.0"),
    "quad": AudioFile("mkv", "flac", channels=4, layout="quad"),
    "4_0_aac": AudioFile("mp4", channels=4, layout="4.0"),
    "5_0": AudioFile("mp4", channels=5, layout="5.0"),
    "5_1": AudioFile("mp4", channels=6, layout="5.1"),
    "5_1_side": AudioFile("mkv", "ac3", channels=6, layout="5.1(side)"),
    "6_1": AudioFile("mkv", "flac", channels=7, layout="6.1"),
    "7_1": AudioFile("mkv", "flac", channels=8, layout="7.1"),
    "7_channels_unknown": AudioFile("wav", "pcm_s16le", channels=7, has_video=False),
    # Time.
    "late": AudioFile("mkv", "pcm_s16le", before=("-itsoffset", "0.25")),
    "late_mp4": AudioFile("mp4", before=("-itsoffset", "0.25")),
    "early": AudioFile("mkv", "pcm_s16le", video_before=("-itsoffset", "0.2")),
    "early_mp4": AudioFile("mp4", video_before=("-itsoffset", "0.2")),
    "early_ts": AudioFile("ts", video_before=("-itsoffset", "0.2")),
    "edit_list": AudioFile("mp4", finish=again("-c", "copy", before=("-ss", "0.2"))),
    "gap": AudioFile("mkv", "pcm_s16le", filters=GAP),
    "gap_aac_mp4": AudioFile("mp4", filters=GAP),
    "gap_ts": AudioFile("ts", "mp2", filters=GAP),
    "rate_change": AudioFile("ts", "mp2", 44100, has_video=False, finish=joined(48000, 1)),
    "stereo_after_mono": AudioFile("ts", "mp2", has_video=False, finish=joined(48000, 2)),
}
