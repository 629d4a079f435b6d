"""Colors as a player shows them, or a refusal that names the command: transfer, primaries, range, depth, alpha."""

import shlex
import subprocess

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ltx_titan.media import MediaError, iter_frames, probe_video, read_image
from tests.media.containers import write_frames
from tests.media.registry import FFMPEG

GRAY = np.full((64, 64, 3), 128, np.uint8)


def flat(path):
    return next(iter_frames(path))[32, 32].tolist()


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_a_command(tmp_path, transfer, name):
    path = write_frames(
        tmp_path / "phone.mkv",
        [GRAY] * 2,
        pix_fmt="yuv420p10le",
        codec="ffv1",
        color_primaries=9,
        color_trc=transfer,
        colorspace=9,
    )
    with pytest.raises(
        MediaError, match=rf"phone\.mkv: is HDR with the transfer function {name}.*ffmpeg -i phone\.mkv"
    ):
        probe_video(path)


@pytest.mark.parametrize("transfer", [8, 9], ids=["linear", "logarithmic"])
def test_scene_referred_footage_is_refused(tmp_path, transfer):
    path = write_frames(tmp_path / "a.mkv", [GRAY] * 2, codec="ffv1", pix_fmt="yuv420p", color_trc=transfer)
    with pytest.raises(MediaError, match=r"its color transfer function is (linear|logarithmic), expected BT\.709"):
        probe_video(path)


def limited(rgb, kr, kb):
    """8-bit limited-range Y, Cb, Cr of encoded RGB in [0, 1]."""
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    return [219 * y + 16, 224 * (rgb[2] - y) / (2 - 2 * kb) + 128, 224 * (rgb[0] - y) / (2 - 2 * kr) + 128]


# Rows: BT.709 primaries in BT.2020 (ITU-R BT.2087) and in Display P3 with D65.
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


@pytest.mark.parametrize(
    ("primaries", "matrix", "to_wide", "weights"),
    [(9, 9, TO_BT2020, (0.2627, 0.0593)), (12, 1, TO_P3, (0.2126, 0.0722))],
    ids=["bt2020", "display_p3"],
)
def test_wide_primaries_are_converted(tmp_path, primaries, matrix, to_wide, weights):
    expected = np.array([0.75, 0.1, 0.1])
    linear = np.where(expected < 0.081, expected / 4.5, ((expected + 0.099) / 1.099) ** (1 / 0.45))
    wide = to_wide @ linear
    encoded = np.where(wide < 0.018, 4.5 * wide, 1.099 * wide**0.45 - 0.099)
    planes = limited(encoded, *weights)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p10le"
        tags = {"color_primaries": primaries, "color_trc": 1, "colorspace": matrix, "color_range": 1}
        frame = av.VideoFrame(64, 64, "yuv444p10le")
        for plane, value in zip(frame.planes, planes, strict=True):
            np.frombuffer(plane, np.uint16)[:] = round(4 * value)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert flat(path) == pytest.approx((255 * expected).tolist(), abs=3)


@pytest.mark.parametrize(("color_range", "stored"), [(1, 235), (2, 255)], ids=["limited", "full"])
def test_white_of_either_range_is_white(tmp_path, color_range, stored):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = color_range
        frame = av.VideoFrame(64, 64, "yuv420p")
        for plane, value in zip(frame.planes, (stored, 128, 128), strict=True):
            np.frombuffer(plane, np.uint8)[:] = value
        frame.color_range = color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert flat(path) == pytest.approx([255, 255, 255], abs=1)


def test_transparent_video_is_shown_over_white(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, 128
    path = write_frames(tmp_path / "a.mkv", [pixels] * 2, codec="ffv1", pix_fmt="bgra")
    assert probe_video(path).has_alpha
    assert flat(path) == pytest.approx([255, 127, 127], abs=1)


def test_transparent_stills_are_shown_over_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "gray.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "a.png")[0, 0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)
    assert read_image(tmp_path / "gray.png")[0, 0, 0].tolist() == [255, 255, 255]
    assert read_image(tmp_path / "palette.png")[0, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_tones(tmp_path, suffix):
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}")[0, 0, 0].tolist() == [128, 128, 128]


def test_float_stills_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match=r"a\.tif: holds floats.*16-bit PNG"):
        read_image(tmp_path / "a.tif")


def test_hdr_and_linear_stills_are_refused(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"cICP", bytes([9, 16, 0, 1]))
    Image.new("RGB", (8, 8)).save(tmp_path / "pq.png", pnginfo=chunks)
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", (100000).to_bytes(4, "big"))
    Image.new("RGB", (8, 8)).save(tmp_path / "linear.png", pnginfo=chunks)
    with pytest.raises(MediaError, match=r"pq\.png: is tagged with primaries 9 and transfer 16"):
        read_image(tmp_path / "pq.png")
    with pytest.raises(MediaError, match=r"linear\.png: its gAMA chunk states 1"):
        read_image(tmp_path / "linear.png")


def test_animations_and_pages_are_not_one_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(MediaError, match=r"a\.webp: holds 3 frames, expected one image"):
        read_image(tmp_path / "a.webp")
    with pytest.raises(MediaError, match=r"a\.tif: holds 3 pages"):
        read_image(tmp_path / "a.tif")


def test_thumbnail_page_of_a_tiff_is_not_the_image(tmp_path):
    thumbnail, whole = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (8, 8), "blue")
    whole.encoderinfo = {"tiffinfo": {}}
    # Tag 254, NewSubfileType: 1 is a reduced version.
    thumbnail.save(tmp_path / "a.tif", save_all=True, append_images=[whole], tiffinfo={254: 1})
    assert read_image(tmp_path / "a.tif")[0].shape == (8, 8, 3)
    assert read_image(tmp_path / "a.tif")[0, 0, 0].tolist() == [0, 0, 255]


def test_second_picture_of_a_phone_is_not_the_image(tmp_path):
    first, second = Image.new("RGB", (16, 16), "blue"), Image.new("RGB", (8, 8), "red")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg")[0, 0, 0].tolist() == pytest.approx([0, 0, 255], abs=4)


@pytest.mark.parametrize("transfer", [16, 18], ids=["pq", "hlg"])
def test_printed_command_maps_sdr_white_to_white(tmp_path, transfer):
    # 203 nit, the reference white of ITU-R BT.2408, is 58 % of PQ and 75 % of HLG.
    white = 0.5807 if transfer == 16 else 0.75
    path = tmp_path / "phone.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p10le"
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        for plane, value in zip(frame.planes, (64 + 876 * white, 512, 512), strict=True):
            np.frombuffer(plane, np.uint16)[:] = round(value)
        for name, value in {"color_primaries": 9, "color_trc": transfer, "colorspace": 9, "color_range": 1}.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError) as refused:
        probe_video(path)
    command = shlex.split(str(refused.value)[str(refused.value).index("ffmpeg ") :])
    subprocess.run([FFMPEG, "-v", "error", *command[1:]], check=True, cwd=tmp_path)
    assert flat(tmp_path / "phone_sdr.mp4") == pytest.approx([255, 255, 255], abs=3)
