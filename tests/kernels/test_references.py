"""The references hold what the model computes without kernels, and the docstrings' tables what was measured."""

import json
from pathlib import Path

import pytest
import torch

from ltx_titan.benchmarks.kernel_cases import WIDTHS
from ltx_titan.model.ops import TORCH, rows_of
from ltx_titan_kernels import gated_residual_norm, qk_norm_rope, rms_norm_modulate

MEASUREMENTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels.jsonl"
EPS = 1e-6


def test_plain_operators_of_the_model_equal_the_references():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 9, 24, dtype=torch.bfloat16).unbind(0)
    embedding, table = torch.randn(2, 3, 5, 24), torch.randn(5, 24)
    gate, *parameters = rows_of(table, embedding)
    pairs = [tuple(parameters[:2]), tuple(parameters[2:])]
    index = torch.randint(0, 3, (2, 9))
    modulated = [
        operation(x, *pairs[0], index, EPS) for operation in (TORCH.norm_modulate, rms_norm_modulate.reference)
    ]
    assert torch.equal(*modulated)
    for modulations in ([], pairs, [None, pairs[0]]):
        expected = gated_residual_norm.reference(x, y, gate, modulations, index, EPS)
        for output, tensor in zip(
            TORCH.gated_residual_norm(x, y, gate, modulations, index, EPS), expected, strict=True
        ):
            assert torch.equal(output, tensor)
    angles = torch.randn(2, 3, 9, 4)
    rotation = (angles.cos(), angles.sin())
    arguments = (x, y, *torch.randn(2, 24).bfloat16().unbind(0), rotation, None)
    expected = qk_norm_rope.reference(*arguments, head_dim=8, eps=EPS)
    for output, tensor in zip(TORCH.qk_norm_rope(*arguments, head_dim=8, eps=EPS), expected, strict=True):
        assert torch.equal(output, tensor)


@pytest.mark.parametrize("module", [rms_norm_modulate, gated_residual_norm, qk_norm_rope])
def test_a_table_in_a_docstring_holds_the_rows_of_its_run(module):
    rows = [json.loads(line) for line in MEASUREMENTS.read_text().splitlines()]
    measured = {
        (row["tokens"], row["kernel"], row["provider"]): row
        for row in rows
        if row.get("run") == 6 and row["part"] == "time" and row["width"] == WIDTHS[row["kernel"]]
    }

    def times(row):
        return f"{row['forward_ms'] * 1e3:.1f} / {row['backward_ms'] * 1e3:.1f}"

    expected = set()
    for (tokens, kernel, provider), row in measured.items():
        if provider == "triton, as an operation":
            share = f"{row['forward_of_copy']:.2f} / {row['backward_of_copy']:.2f}"
            compiled = times(measured[tokens, kernel, "torch.compile"])
            expected.add(f"{tokens:,} {kernel} {times(row)} {compiled} {share}")
    table = module.__doc__.split("share of copy\n")[1].split("\n\n")[0]
    found = {" ".join(line.split()) for line in table.splitlines() if line.strip()}
    assert len(found) == 6
    assert found <= expected
