"""Frames are read as a player shows them: pixel aspect, display matrix, cropping, and which track is the video."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.clips import ClipRules, plan_clip, read_pixels
from ltx_titan.media import MediaError, fit_frames, iter_frames, probe_video, read_video_mask
from tests.media.containers import corner, set_clean_aperture, set_matrix, set_matroska_crop, write_frames

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def quarters(frame):
    """The colors at the centers of the four quarters: top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    at = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    at += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return [tuple(int(value) for value in frame[y, x]) for y, x in at]


def assert_quarters(path, size, *expected):
    info = probe_video(path)
    assert (info.width, info.height) == size
    frame = next(iter_frames(path))
    assert frame.shape == (size[1], size[0], 3)
    for found, color in zip(quarters(frame), expected, strict=True):
        assert found == pytest.approx(color, abs=8)


@pytest.mark.parametrize(
    ("sar", "size"), [("4/3", (128, 64)), ("8/9", (96, 72)), ("2/1", (192, 64)), ("1/1", (96, 64))]
)
def test_pixels_are_made_square(tmp_path, sar, size):
    path = write_frames(tmp_path / "a.mp4", [corner()] * 3, sar=sar)
    assert_quarters(path, size, WHITE, BLACK, RED, BLACK)


@pytest.mark.parametrize(
    ("matrix", "size", "expected"),
    [
        ((0, 1, -1, 0), (64, 96), (RED, WHITE, BLACK, BLACK)),
        ((-1, 0, 0, -1), (96, 64), (BLACK, RED, BLACK, WHITE)),
        ((0, -1, 1, 0), (64, 96), (BLACK, BLACK, WHITE, RED)),
        ((-1, 0, 0, 1), (96, 64), (BLACK, WHITE, BLACK, RED)),
        ((1, 0, 0, -1), (96, 64), (RED, BLACK, WHITE, BLACK)),
        ((0, 1, 1, 0), (64, 96), (WHITE, RED, BLACK, BLACK)),
    ],
    ids=["90", "180", "270", "mirrored", "upside_down", "transposed"],
)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix, size, expected):
    path = set_matrix(write_frames(tmp_path / "a.mp4", [corner()] * 3), *matrix)
    assert_quarters(path, size, *expected)


def test_other_angles_are_refused_with_a_command(tmp_path):
    path = set_matrix(write_frames(tmp_path / "tilted.mp4", [corner()] * 3), 0.707, 0.707, -0.707, 0.707)
    with pytest.raises(MediaError, match=r"tilted\.mp4: .*multiples of 90 degrees; .*ffmpeg -i tilted\.mp4"):
        probe_video(path)


def test_pixel_aspect_is_that_of_the_stored_frame_when_rotated(tmp_path):
    path = set_matrix(write_frames(tmp_path / "a.mp4", [corner()] * 3, sar="4/3"), 0, 1, -1, 0)
    assert_quarters(path, (64, 128), RED, WHITE, BLACK, BLACK)


def test_clean_aperture_of_mp4_is_applied(tmp_path):
    path = write_frames(tmp_path / "a.mp4", [corner()] * 3)
    # 48 x 32 pixels around a center 24 left and 16 above the middle: the white quarter alone.
    set_clean_aperture(path, 48, 32, -24, -16)
    assert_quarters(path, (48, 32), WHITE, WHITE, WHITE, WHITE)


def test_cropping_of_matroska_is_applied(tmp_path):
    path = write_frames(tmp_path / "a.mkv", [corner()] * 3)
    set_matroska_crop(path, left=0, top=32, right=56, bottom=0)
    assert_quarters(path, (40, 32), RED, RED, RED, RED)


def test_masks_and_clips_see_the_same_geometry(tmp_path):
    path = set_matrix(write_frames(tmp_path / "a.mp4", [corner()] * 9, sar="4/3"), -1, 0, 0, 1)
    rules = ClipRules([Bucket(128, 64, 9)], (8, 32, 32))
    pixels = read_pixels(path, plan_clip(path, rules), rules, path)
    assert pixels[:, 0, 10, 100].tolist() == pytest.approx([1, 1, 1], abs=0.05)
    mask = read_video_mask(path, 9, 128, 64, (8, 32, 32))
    assert mask[0].tolist() == [[False, False, True, True], [False, False, False, False]]


def test_scaled_size_is_truncated_like_the_reference():
    # 384 x 216 into 128 x 96: 170.67 columns become 170, of which the crop starts at (170 - 128) / 2 = 21.
    ramp = torch.arange(384).mul(255).div(383).round().to(torch.uint8).view(1, 1, 384, 1).expand(1, 216, 384, 3)
    pixels = torch.nn.functional.interpolate(
        ramp.permute(0, 3, 1, 2).float() / 255, size=(96, 170), mode="bicubic", antialias=True
    )
    expected = pixels[0, :, :, 21:149].clamp(0, 1) * 2 - 1
    assert torch.equal(fit_frames(ramp, 128, 96)[:, 0], expected)


def test_tiled_photo_is_refused_with_a_remedy(tmp_path):
    # The file type box of a HEIC photo; phones write tiles, of which FFmpeg would show one.
    photo = tmp_path / "IMG_1.HEIC"
    photo.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MediaError, match=r"IMG_1\.HEIC: is a HEIF photo.*heif-convert IMG_1\.HEIC"):
        plan_clip(photo, ClipRules([Bucket(64, 64, 1)], (8, 32, 32)))


def test_photo_named_as_a_film_is_refused(tmp_path):
    path = write_frames(tmp_path / "a.mp4", [corner()] * 3)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ftypisom", b"ftypheic", 1))
    with pytest.raises(MediaError, match=r"a\.mp4: is a HEIF or AVIF photo"):
        probe_video(path)


def test_cover_image_is_not_the_video(tmp_path):
    film, cover, joined = tmp_path / "film.mp4", tmp_path / "cover.png", tmp_path / "joined.mp4"
    write_frames(film, [corner()] * 5)
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(cover)
    with av.open(str(film)) as one, av.open(str(cover)) as two, av.open(str(joined), "w") as out:
        pictures = out.add_stream_from_template(two.streams.video[0])
        pictures.disposition = av.stream.Disposition.attached_pic
        video = out.add_stream_from_template(one.streams.video[0])
        for source, target in ((two, pictures), (one, video)):
            for packet in source.demux():
                if packet.size:
                    packet.stream = target
                    out.mux(packet)
    info = probe_video(joined)
    assert (info.width, info.height, info.frames) == (96, 64, 5)
    assert quarters(next(iter_frames(joined)))[2] == pytest.approx(RED, abs=8)
