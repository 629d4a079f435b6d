import pytest
import torch

from ltx_titan.model.rope import distinct_coordinates, frequency_grid, midpoints, rotary_tables, rotate
from tests.golden_cases import load_case

CASE = load_case("rope_tables")


def _rotation(table):
    positions = CASE.tensors[table["positions"]]
    if table["use_middle_indices_grid"]:
        coordinates = midpoints(positions)
    else:
        coordinates = positions if positions.ndim == 3 else positions[..., 0]
    values, index = distinct_coordinates(coordinates.float())
    return rotary_tables(
        values,
        index,
        width=table["dim"],
        heads=table["num_attention_heads"],
        max_positions=table["max_pos"],
        theta=table["theta"],
        double_precision=table["frequencies_precision"] == "float64",
    ).expand()


@pytest.mark.parametrize("table", CASE.entry["tables"], ids=lambda t: t["name"])
def test_tables_equal_the_reference(table):
    expected = CASE.under(f"output.{table['name']}.")
    axes = CASE.tensors[table["positions"]].shape[1]
    grid = frequency_grid(table["theta"], table["dim"] // (2 * axes), table["frequencies_precision"] == "float64")
    torch.testing.assert_close(grid, expected["freq_grid"], rtol=1e-6, atol=0)
    strict = CASE.entry["tolerance"]["cos_sin"]["strict_atol"]
    for actual, name in zip(_rotation(table), ("cos", "sin"), strict=True):
        if table["rope_type"] == "interleaved":  # the reference repeats each angle and keeps the heads joined
            actual = actual.transpose(1, 2).flatten(2).repeat_interleave(2, dim=-1)
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=strict)


@pytest.mark.parametrize(
    "table", [t for t in CASE.entry["tables"] if f"input.{t['name']}.x" in CASE.tensors], ids=lambda t: t["name"]
)
def test_rotation_equals_the_reference(table):
    x = CASE.tensors[f"input.{table['name']}.x"].unflatten(-1, (table["num_attention_heads"], -1)).transpose(1, 2)
    rotated = rotate(x, _rotation(table), interleaved=table["rope_type"] == "interleaved")
    expected = CASE.tensors[f"output.{table['name']}.rotated"]
    torch.testing.assert_close(rotated.transpose(1, 2).flatten(2), expected, rtol=1e-5, atol=1e-5)


def test_numbers_of_a_real_token():
    # Token 5 of a 3 x 2 x 2 clip at 24 fps under the full-size model (32 heads of 128).
    positions = torch.tensor([[[[1 / 24, 9 / 24]], [[0.0, 32.0]], [[32.0, 64.0]]]])
    values, index = distinct_coordinates(midpoints(positions))
    rotation = rotary_tables(
        values, index, width=4096, heads=32, max_positions=(20, 2048, 2048), theta=10000.0, double_precision=True
    ).expand()
    assert rotation.cos.shape == (1, 32, 1, 64)
    head0 = torch.tensor([1, 1, 0.0327190, 0.0245411, 0.0735645, 0.0117813, 0.0034890, 0.0532196])
    torch.testing.assert_close(rotation.cos[0, 0, 0, :8], head0, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rotation.cos[0, 31, 0, -3:], torch.tensor([0.8659424, 0.9238892, 0.3825485]), rtol=0, atol=2e-3
    )
