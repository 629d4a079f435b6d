import pytest
import torch
from pydantic import TypeAdapter

from ltx_titan.conditioning import Grid, conditioned_tokens
from ltx_titan.config.conditions import VideoCondition

GRID = Grid(4, 3, 5)
ADAPTER = TypeAdapter(VideoCondition)


def given(condition, file_mask=None, grid=GRID):
    found = conditioned_tokens(ADAPTER.validate_python(condition), grid, (8, 32, 32), file_mask, torch.device("cpu"))
    return found.view(-1, *grid)


def test_time_conditions_give_whole_frames_at_their_end_of_the_clip():
    assert given({"type": "first_frame"}).sum(dim=(2, 3)).tolist() == [[15, 0, 0, 0]]
    assert given({"type": "prefix", "temporal_boundary": 2}).sum(dim=(2, 3)).tolist() == [[15, 15, 0, 0]]
    assert given({"type": "suffix", "temporal_boundary": 1}).sum(dim=(2, 3)).tolist() == [[0, 0, 0, 15]]


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
def test_a_boundary_beyond_the_clip_gives_all_of_it(kind):
    assert given({"type": kind, "temporal_boundary": 9}).all()


def test_a_region_is_rounded_down_to_cells_and_clamped_to_the_frame():
    found = given({"type": "spatial_crop", "spatial_region": [33, 70, 95, 5000]})
    assert found.nonzero()[:, 2].unique().tolist() == [1]
    assert found.nonzero()[:, 3].unique().tolist() == [2, 3, 4]
    assert found.sum() == 4 * 1 * 3


def test_a_region_beside_a_smaller_clip_gives_nothing():
    assert not given({"type": "spatial_crop", "spatial_region": [0, 320, 96, 480]}).any()


def test_a_mask_gives_strictly_above_one_half():
    mask = torch.tensor([0.0, 0.5, 0.51, 1.0])[None].expand(2, -1)
    assert given({"type": "mask", "mask_dir": "m"}, mask, Grid(4, 1, 1)).flatten(1).tolist() == 2 * [
        [False, False, True, True]
    ]


def test_a_mask_of_the_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"video_masks: a mask has shape \[4, 3, 4\], 48 elements.*60 latent cells"):
        given({"type": "mask", "mask_dir": "video_masks"}, torch.zeros(2, 4, 3, 4))
