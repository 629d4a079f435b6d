"""torchtitan as `common/titan.py` uses it, on this torch version."""

import subprocess
import sys

import pytest

from ltx_titan.common.hardware import GPUS
from ltx_titan.common.titan import peak_flops

DEVICES = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "a100-80": "NVIDIA A100-SXM4-80GB",
    "h20": "NVIDIA H20",
    "b200": "NVIDIA B200",
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_run_and_an_estimate_have_the_same_peak(name, monkeypatch):
    def no_lspci(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_lspci)  # its answer would replace the name on a machine with an H100
    assert peak_flops(DEVICES[name]) == GPUS[name].peak


def test_the_peak_of_an_unknown_device_is_unknown():
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    assert peak_flops(None) is None


def test_a_rank_starts_without_it_and_importing_it_has_no_side_effects():
    """In a separate process, because an import runs once per process."""
    program = """
import gc, logging, sys, torch
import ltx_titan.train
slow = ("torchtitan", "torch._inductor.lowering", "diffusers", "transformers", "torchao", "matplotlib", "av", "PIL")
assert not [name for name in slow if name in sys.modules]
import torch.distributed as dist
state = torch.get_rng_state(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
from torchtitan.tools.utils import get_peak_flops
assert gc.isenabled() and not dist.is_initialized() and not logging.getLogger().handlers
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
