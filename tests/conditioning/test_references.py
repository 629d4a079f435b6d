import pytest
import torch

from ltx_titan.conditioning import Grid, reference_factors, scale_reference, video_coordinates


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
