from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from ltx_titan.media import Audio, MediaError, read_audio_mask, read_video_mask, write_video, write_wav

FACTORS = (8, 32, 32)


def half_white(path, width, height, left):
    """An image that is white from column `left` to the right edge."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, left:] = 255
    Image.fromarray(pixels).save(path)
    return path


def test_image_mask_applies_to_every_frame(tmp_path):
    mask = read_video_mask(half_white(tmp_path / "m.png", 128, 64, 64), 17, 128, 64, FACTORS)
    assert mask.shape == (3, 2, 4)
    assert torch.equal(mask, torch.tensor([False, False, True, True]).expand(3, 2, 4))


def test_mask_is_cropped_like_its_clip(tmp_path):
    # Twice as wide as the clip: the outer quarters are cropped, the white half starts at the center.
    mask = read_video_mask(half_white(tmp_path / "m.png", 256, 64, 128), 1, 128, 64, FACTORS)
    assert torch.equal(mask, torch.tensor([False, False, True, True]).expand(1, 2, 4))


def test_cell_is_conditioned_if_most_of_it_is_white(tmp_path):
    assert read_video_mask(half_white(tmp_path / "a.png", 64, 32, 50), 1, 64, 32, FACTORS).tolist() == [
        [[False, False]]
    ]
    assert read_video_mask(half_white(tmp_path / "b.png", 64, 32, 40), 1, 64, 32, FACTORS).tolist() == [[[False, True]]]


def test_frames_of_a_video_mask_map_to_latent_frames(tmp_path):
    frames = torch.zeros(17, 64, 64, 3, dtype=torch.uint8)
    frames[8] = 255
    write_video(tmp_path / "m.mp4", frames, 24)
    # Frame 0 is the first latent frame, frames 1 to 8 the second.
    assert read_video_mask(tmp_path / "m.mp4", 17, 64, 64, FACTORS)[:, 0, 0].tolist() == [False, True, False]


def test_too_short_a_video_mask_is_named(tmp_path):
    write_video(tmp_path / "m.mp4", torch.zeros(9, 64, 64, 3, dtype=torch.uint8), 24)
    with pytest.raises(MediaError, match=r"m\.mp4: has 9 frames, its clip 17"):
        read_video_mask(tmp_path / "m.mp4", 17, 64, 64, FACTORS)


def test_audio_mask_from_a_tensor_or_from_loudness(tmp_path):
    torch.save({"mask": torch.tensor([1, 1, 0, 0])}, tmp_path / "m.pt")
    assert read_audio_mask(tmp_path / "m.pt", 8, 25).tolist() == [True] * 4 + [False] * 4
    waveform = torch.zeros(1, 800)
    waveform[:, 400:] = 0.9
    write_wav(tmp_path / "m.wav", Audio(waveform, 16000))
    assert read_audio_mask(tmp_path / "m.wav", 4, 80).tolist() == [False, False, True, True]


def test_file_without_a_mask_is_named(tmp_path):
    torch.save({"other": torch.zeros(2)}, tmp_path / "m.pt")
    with pytest.raises(MediaError, match="holds no mask"):
        read_audio_mask(tmp_path / "m.pt", 4, 25)


def test_transparent_image_is_refused_as_a_mask_and_an_opaque_alpha_channel_is_not(tmp_path):
    pixels = np.zeros((64, 128, 4), dtype=np.uint8)
    pixels[:, 64:] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(MediaError, match=r"m\.png: has transparent pixels, expected white where .*; save it as gray"):
        read_video_mask(tmp_path / "m.png", 1, 128, 64, FACTORS)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask = read_video_mask(tmp_path / "m.png", 1, 128, 64, FACTORS)
    assert torch.equal(mask, torch.tensor([False, False, True, True]).expand(1, 2, 4))


def test_audio_mask_has_the_time_of_its_audio(tmp_path):
    # Four seconds, of which the first is loud; its audio has been cut to two.
    waveform = torch.zeros(1, 64000)
    waveform[:, :16000] = 0.9 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    write_wav(tmp_path / "m.wav", Audio(waveform, 16000))
    assert read_audio_mask(tmp_path / "m.wav", 50, 25).tolist() == [True] * 25 + [False] * 25
    with pytest.raises(MediaError, match=r"m\.wav: lasts 4\.00 s, its audio 8\.00 s; use a longer mask"):
        read_audio_mask(tmp_path / "m.wav", 200, 25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older than torch 1.6"])
def test_a_damaged_audio_mask_is_a_media_error_or_another_mask(tmp_path, is_zip):
    path = tmp_path / "m.pt"
    torch.save({"mask": torch.ones(4)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + b"\x85" + whole[position + 1 :])
        with suppress(MediaError):
            assert read_audio_mask(path, 4, 25).shape == (4,)


def test_a_sparse_audio_mask_is_named(tmp_path):
    torch.save(torch.eye(3).to_sparse(), tmp_path / "m.pt")
    with pytest.raises(MediaError, match="holds no mask; expected a dense tensor"):
        read_audio_mask(tmp_path / "m.pt", 4, 25)
