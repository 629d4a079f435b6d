"""Reads the golden vectors: inputs, weights and outputs of the reference implementation (tests/golden/README.md)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One case: its manifest entry and its tensors."""

    entry: dict
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The case's weights under their official names."""
        return self.under("weight.")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@cache
def _entries() -> tuple[dict, ...]:
    return tuple(json.loads((GOLDEN / "manifest.json").read_text())["cases"])


def case_names(kind: str) -> list[str]:
    """Names of the cases of one kind."""
    return [entry["name"] for entry in _entries() if entry["kind"] == kind]


def load_case(name: str) -> Case:
    """The case called `name`."""
    entry = next(entry for entry in _entries() if entry["name"] == name)
    return Case(entry, load_file(GOLDEN / entry["file"]))


def assert_close_to_max(actual: Tensor, expected: Tensor, rtol_to_max: float, what: str) -> None:
    """Fails unless the largest difference is within `rtol_to_max` of the largest expected magnitude."""
    difference = (actual.float() - expected.float()).abs().max()
    bound = rtol_to_max * expected.float().abs().max()
    assert torch.isfinite(difference), f"{what}: not finite"
    assert difference <= bound, f"{what}: max difference {difference:.3e} > {bound:.3e}"
