import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from ltx_titan.media import MediaError, fit_frames, is_image, read_image, to_uint8


def red_corner():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 10))
    return image


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    # 6: rotate by 90 degrees clockwise for display.
    exif[ExifTags.Base.Orientation] = 6
    red_corner().save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_image(tmp_path / "a.jpg")
    assert frame.shape == (1, 40, 20, 3)
    assert frame[0, 5, 15].tolist() == pytest.approx([254, 0, 0], abs=8)
    assert frame[0, 35, 5].tolist() == pytest.approx([255, 255, 255], abs=8)


def test_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    red_corner().save(tmp_path / "a.png", icc_profile=profile.tobytes())
    plain = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert torch.equal(read_image(tmp_path / "a.png")[0, 0, 0], plain)


def test_undeclared_wide_gamut_is_refused(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 65535
    red_corner().save(tmp_path / "adobe.jpg", exif=exif)
    with pytest.raises(MediaError, match=r"adobe.jpg: EXIF color space 65535"):
        read_image(tmp_path / "adobe.jpg")


def test_grayscale_and_transparent_images_become_rgb(tmp_path):
    red_corner().convert("L").save(tmp_path / "gray.png")
    red_corner().convert("RGBA").save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "gray.png").shape == (1, 20, 40, 3)
    assert read_image(tmp_path / "alpha.png").shape == (1, 20, 40, 3)


def test_damaged_images_are_named(tmp_path):
    red_corner().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    for name, reason in [("cut.png", "truncated"), ("empty.jpg", "0 bytes"), ("none.png", "no such file")]:
        with pytest.raises(MediaError, match=rf"{name}: .*{reason}"):
            read_image(tmp_path / name)


def test_images_are_recognized_by_suffix():
    assert is_image("A.JPG")
    assert not is_image("a.mp4")


def test_wide_frames_are_scaled_to_cover_and_cropped_around_the_center():
    # Three vertical stripes; a square crop from the center excludes the outer ones.
    frames = torch.zeros(2, 60, 180, 3, dtype=torch.uint8)
    frames[:, :, 60:120] = 255
    pixels = fit_frames(frames, 30, 30)
    assert pixels.shape == (3, 2, 30, 30)
    assert pixels[:, :, :, 2:-2].min() > 0.95
    assert fit_frames(frames, 90, 30).min() == -1


def test_range_is_kept_at_sharp_edges():
    frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    frames[:, :, 32:] = 255
    pixels = fit_frames(frames, 48, 32)
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_frames_of_the_right_size_survive_the_round_trip():
    frames = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    assert torch.equal(to_uint8(fit_frames(frames, 16, 16)), frames)


def test_any_aspect_ratio_covers_the_size():
    for height, width in [(101, 57), (33, 999), (720, 1280)]:
        assert fit_frames(torch.zeros(1, height, width, 3, dtype=torch.uint8), 64, 96).shape == (3, 1, 96, 64)
