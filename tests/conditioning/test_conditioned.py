import pytest
import torch
from pydantic import TypeAdapter

from ltx_titan.conditioning import (
    Clip,
    Grid,
    StreamTokens,
    conditioned_tokens,
    reference_factors,
    scale_reference,
    video_coordinates,
)
from ltx_titan.config.streams import VideoCondition

GRID = Grid(4, 3, 5)
ADAPTER = TypeAdapter(VideoCondition)


def clean_cells(condition, file_mask=None, grid=GRID):
    found = conditioned_tokens(ADAPTER.validate_python(condition), grid, (8, 32, 32), file_mask, torch.device("cpu"))
    return found.view(-1, *grid)


def test_time_conditions_give_whole_frames_at_their_end_of_the_clip():
    assert clean_cells({"type": "first_frame"}).sum(dim=(2, 3)).tolist() == [[15, 0, 0, 0]]
    assert clean_cells({"type": "prefix", "temporal_boundary": 2}).sum(dim=(2, 3)).tolist() == [[15, 15, 0, 0]]
    assert clean_cells({"type": "suffix", "temporal_boundary": 1}).sum(dim=(2, 3)).tolist() == [[0, 0, 0, 15]]


def test_keyframes_are_whole_frames_at_any_time():
    def frames(at, length=1, count=7, starts=None):
        condition = ADAPTER.validate_python({"type": "keyframe", "at": at, "length": length})
        found = conditioned_tokens(condition, Grid(count, 2, 3), (8, 32, 32), starts=starts).view(-1, count, 6)
        assert torch.equal(found.any(dim=2), found.all(dim=2))
        return [row.nonzero().flatten().tolist() for row in found.all(dim=2)]

    assert frames([0, "middle", -1]) == [[0, 3, 6]]
    assert frames(["first", "last"], length=2) == [[0, 1, 5, 6]]
    assert frames([2, 9, -9]) == [[2]]
    assert frames(["middle"], length=9) == [[*range(7)]]
    starts = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert frames(["random"], length=2, starts=starts) == [[0, 1], [3, 4], [5, 6]]
    assert frames(["random"], length=9, starts=starts) == 3 * [[*range(7)]]
    # Without a draw: what is clean wherever it starts.
    assert frames(["random"]) == [[]]
    assert frames(["random"], length=5) == [[2, 3, 4]]


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
def test_a_boundary_beyond_the_clip_gives_all_of_it(kind):
    assert clean_cells({"type": kind, "temporal_boundary": 9}).all()


def test_a_region_is_rounded_down_to_cells_and_clamped_to_the_frame():
    found = clean_cells({"type": "spatial_crop", "spatial_region": [33, 70, 95, 5000]})
    assert found.nonzero()[:, 2].unique().tolist() == [1]
    assert found.nonzero()[:, 3].unique().tolist() == [2, 3, 4]
    assert found.sum() == 4 * 1 * 3


def test_a_region_outside_a_smaller_clip_conditions_nothing():
    assert not clean_cells({"type": "spatial_crop", "spatial_region": [0, 320, 96, 480]}).any()


def test_a_mask_gives_strictly_above_one_half():
    mask = torch.tensor([0.0, 0.5, 0.51, 1.0])[None].expand(2, -1)
    assert clean_cells({"type": "mask", "mask_dir": "m"}, mask, Grid(4, 1, 1)).flatten(1).tolist() == 2 * [
        [False, False, True, True]
    ]


def test_a_mask_of_the_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"video_masks: a mask has shape \[4, 3, 4\], 48 elements.*60 latent cells"):
        clean_cells({"type": "mask", "mask_dir": "video_masks"}, torch.zeros(2, 4, 3, 4))


@pytest.mark.parametrize(
    ("target", "reference", "factors"),
    [
        ((3, 4, 6), (3, 4, 6), (1, 1)),
        ((3, 4, 6), (3, 2, 3), (2, 1)),
        ((7, 4, 6), (3, 2, 3), (2, 3)),
        ((1, 4, 6), (3, 4, 6), (1, 1)),
        ((5, 4, 6), (1, 4, 6), (1, 1)),
    ],
)
def test_factors_follow_from_shapes(target, reference, factors):
    assert reference_factors(target, reference) == factors


@pytest.mark.parametrize(
    ("target", "reference", "problem"),
    [
        ((3, 4, 6), (3, 3, 3), "must be a multiple"),
        ((3, 4, 6), (3, 8, 12), "must be a multiple"),
        ((3, 4, 6), (3, 2, 6), "by the same factor"),
        ((6, 4, 6), (3, 4, 6), "5 and 2"),
        ((3, 4, 6), (5, 4, 6), "2 and 4"),
    ],
)
def test_factors_that_are_not_whole_are_refused(target, reference, problem):
    with pytest.raises(ValueError, match=problem) as error:
        reference_factors(target, reference)
    assert " x ".join(map(str, target)) in str(error.value)


def test_a_slower_reference_covers_the_frames_it_was_made_from():
    # Every second of 24 frames per second: reference frame 1 stands for the target's pixel frames 1 to 16.
    target = video_coordinates(Grid(5, 2, 2), torch.tensor([24.0]))
    reference = video_coordinates(Grid(3, 1, 1), torch.tensor([12.0]))
    scaled = scale_reference(reference, target, 2, 2).positions
    expected = torch.tensor([[0, 1], [1, 17], [17, 33]]) / 24
    torch.testing.assert_close(scaled[0, 0], expected)
    assert scaled[0, 1:].unique().tolist() == [0, 64]


def clip(grid, value, fps=24.0):
    return Clip(torch.full((1, grid.num_tokens, 2), value), grid, video_coordinates(grid, torch.tensor([fps])))


def joined(references_first):
    target, same, half = Grid(2, 2, 2), Grid(2, 2, 2), Grid(2, 1, 1)
    tokens = StreamTokens(clip(target, 0.0), references_first=references_first, marks_first_frame=True)
    return tokens.add_reference(clip(same, 1.0)).add_reference(clip(half, 2.0))


def test_training_prepends_references_and_sampling_appends_them():
    first, last = joined(True), joined(False)
    order = [2.0] * 2 + [1.0] * 8 + [0.0] * 8
    assert first.with_references(first.target.tokens)[0, :, 0].tolist() == order
    assert last.with_references(last.target.tokens)[0, :, 0].tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 2


def test_masks_markers_and_positions_follow_the_order_of_the_tokens():
    first, last = joined(True), joined(False)
    # From [half, same, target] to [target, same, half].
    moved = [*range(10, 18), *range(2, 10), *range(2)]
    assert torch.equal(first.coordinates.positions[:, :, moved], last.coordinates.positions)
    assert torch.equal(first.clean_mask[:, moved], last.clean_mask)
    assert torch.equal(first.keyframes_mask[:, moved], last.keyframes_mask)
    assert last.keyframes_mask[0, :, 0].tolist() == [1.0] * 4 + [0.0] * 14
    assert last.clean_mask[0].tolist() == [False] * 8 + [True] * 10
    for tokens in (first, last):
        assert tokens.num_tokens == 18
        assert tokens.select_target(tokens.with_references(tokens.target.tokens)).eq(0).all()
