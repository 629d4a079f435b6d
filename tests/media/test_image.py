import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from ltx_titan.media import MediaError, is_image, read_image


def picture():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 10))
    return image


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    # 6: to be turned a quarter clockwise.
    exif[ExifTags.Base.Orientation] = 6
    picture().save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_image(tmp_path / "a.jpg")
    assert frame.shape == (1, 40, 20, 3)
    assert frame[0, 5, 15].tolist() == pytest.approx([254, 0, 0], abs=8)
    assert frame[0, 35, 5].tolist() == pytest.approx([255, 255, 255], abs=8)


def test_colour_profile_is_converted(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture().save(tmp_path / "a.png", icc_profile=profile.tobytes())
    plain = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert torch.equal(read_image(tmp_path / "a.png")[0, 0, 0], plain)


def test_undeclared_wide_gamut_is_refused(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 65535
    picture().save(tmp_path / "adobe.jpg", exif=exif)
    with pytest.raises(MediaError, match=r"adobe.jpg: EXIF colour space 65535"):
        read_image(tmp_path / "adobe.jpg")


def test_grey_and_transparent_images_become_rgb(tmp_path):
    picture().convert("L").save(tmp_path / "grey.png")
    picture().convert("RGBA").save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "grey.png").shape == (1, 20, 40, 3)
    assert read_image(tmp_path / "alpha.png").shape == (1, 20, 40, 3)


def test_damaged_images_are_named(tmp_path):
    picture().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    for name, reason in [("cut.png", "truncated"), ("empty.jpg", "0 bytes"), ("none.png", "no such file")]:
        with pytest.raises(MediaError, match=rf"{name}: .*{reason}"):
            read_image(tmp_path / name)


def test_images_are_told_by_their_suffix():
    assert is_image("A.JPG")
    assert not is_image("a.mp4")
