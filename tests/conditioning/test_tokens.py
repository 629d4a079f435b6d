import pytest
import torch

from ltx_titan.conditioning import (
    Coordinates,
    Grid,
    audio_coordinates,
    audio_steps,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_coordinates,
    video_grid,
)
from tests.golden_cases import load_case

CASE = load_case("patchify_positions")
TOLERANCE = CASE.entry["tolerance"]["all"]
VIDEOS = [pytest.param(e, id=e["name"]) for e in CASE.entry["video"]]
AUDIOS = [pytest.param(e, id=e["name"]) for e in CASE.entry["audio"]]


def grid_of(entry):
    return video_grid(*entry["pixel_frames_height_width"], tuple(entry["scale_factors"]))


def expected(entry, name):
    return CASE.tensors[f"output.{entry['name']}.{name}"]


@pytest.mark.parametrize("entry", VIDEOS)
def test_video_shape_equals_the_reference(entry):
    assert [1, entry["channels"], *grid_of(entry)] == expected(entry, "latent_shape").tolist()


@pytest.mark.parametrize("entry", VIDEOS)
def test_video_positions_equal_the_reference(entry):
    grid, factors, patch_size = grid_of(entry), tuple(entry["scale_factors"]), entry["patch_size"]
    positions = video_coordinates(grid, torch.tensor([entry["fps"]]), factors, patch_size=patch_size).positions
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions, expected(entry, "positions"), **TOLERANCE)
    # At one frame per second, seconds are pixel frames; with factors of one, pixels are latent cells.
    one = torch.ones(1)
    pixels = video_coordinates(grid, one, factors, patch_size=patch_size).positions
    assert torch.equal(pixels, expected(entry, "pixel_bounds").float())
    plain = video_coordinates(grid, one, factors, patch_size=patch_size, causal=False).positions
    assert torch.equal(plain, expected(entry, "pixel_bounds_no_causal_fix").float())
    cells = video_coordinates(grid, one, (1, 1, 1), patch_size=patch_size, causal=False).positions
    assert torch.equal(cells, expected(entry, "latent_bounds").float())


@pytest.mark.parametrize("entry", [p for p in VIDEOS if f"input.{p.id}.latent" in CASE.tensors])
def test_video_tokens_equal_the_reference_and_come_back(entry):
    latent, patch_size = CASE.tensors[f"input.{entry['name']}.latent"], entry["patch_size"]
    tokens = patchify_video(latent, patch_size)
    assert torch.equal(tokens, expected(entry, "tokens"))
    assert torch.equal(unpatchify_video(tokens, grid_of(entry), patch_size), expected(entry, "roundtrip"))


@pytest.mark.parametrize("entry", AUDIOS)
def test_audio_shape_and_positions_equal_the_reference(entry):
    clock = {key: entry[key] for key in ("sample_rate", "hop_length", "downsample")}
    steps = audio_steps(entry["duration"], **clock)
    assert [1, entry["channels"], steps, entry["mel_bins"]] == expected(entry, "latent_shape").tolist()
    coordinates = audio_coordinates(steps, 1, **clock, causal=entry["is_causal"], shift=entry["shift"])
    assert coordinates.positions.dtype == torch.float32
    torch.testing.assert_close(coordinates.positions, expected(entry, "positions"), **TOLERANCE)


@pytest.mark.parametrize("entry", [p for p in AUDIOS if f"input.{p.id}.latent" in CASE.tensors])
def test_audio_tokens_equal_the_reference_and_come_back(entry):
    tokens = patchify_audio(CASE.tensors[f"input.{entry['name']}.latent"])
    assert torch.equal(tokens, expected(entry, "tokens"))
    assert torch.equal(unpatchify_audio(tokens, entry["channels"]), expected(entry, "roundtrip"))


def test_each_sample_has_the_times_of_its_own_frame_rate():
    grid, rates = Grid(4, 2, 3), torch.tensor([24.0, 23.976, 50.0])
    together = video_coordinates(grid, rates).positions
    for sample, rate in enumerate(rates):
        assert torch.equal(together[sample : sample + 1], video_coordinates(grid, rate[None]).positions)
    assert together[2, 0, -1, 1] == 25 / 50


@pytest.mark.parametrize(
    "coordinates",
    [
        video_coordinates(Grid(5, 3, 4), torch.tensor([23.976, 29.97])),
        audio_coordinates(9, 2),
        Coordinates.concatenate(
            [
                video_coordinates(Grid(2, 1, 2), torch.tensor([12.0, 15.0])),
                video_coordinates(Grid(3, 2, 2), torch.tensor([24.0, 30.0])),
            ]
        ),
    ],
    ids=["video", "audio", "reference"],
)
def test_midpoints_are_bitwise_those_of_the_positions(coordinates):
    positions = coordinates.positions
    midpoints = (positions[..., 0] + positions[..., 1]) / 2
    for axis, values in enumerate(coordinates.midpoints):
        assert torch.equal(values[coordinates.index[:, axis]], midpoints[:, axis])


def test_coordinate_tables_are_as_small_as_the_axes():
    coordinates = video_coordinates(Grid(5, 3, 4), torch.tensor([24.0, 24.0]))
    assert [len(values) for values in coordinates.midpoints] == [2 * 5, 3, 4]


def test_sizes_that_do_not_fit_the_codec_are_refused():
    with pytest.raises(ValueError, match=r"has 16 frames.*1 \+ a multiple of 8"):
        video_grid(16, 64, 64, (8, 32, 32))
    with pytest.raises(ValueError, match=r"is 72x64 pixels.*multiples of 32x32"):
        video_grid(17, 64, 72, (8, 32, 32))
