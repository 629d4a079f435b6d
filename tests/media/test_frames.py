import torch

from ltx_titan.media import fit_frames, to_uint8


def test_wide_frames_are_scaled_to_cover_and_cut_around_the_centre():
    # Three vertical stripes; the outer ones lie outside of a square cut from the middle.
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


def test_odd_aspect_ratio_always_covers():
    for height, width in [(101, 57), (33, 999), (720, 1280)]:
        assert fit_frames(torch.zeros(1, height, width, 3, dtype=torch.uint8), 64, 96).shape == (3, 1, 96, 64)
