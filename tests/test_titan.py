import subprocess
import sys


def test_import_leaves_the_process_as_it_was_and_knows_the_gpus():
    """In a process of its own, because what torchtitan does on import it does once."""
    program = """
import gc, logging, torch
import torch.distributed as dist
state = torch.get_rng_state(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
from ltx_titan.common.titan import get_peak_flops
assert gc.isenabled() and not dist.is_initialized() and not logging.getLogger().handlers
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
assert get_peak_flops("NVIDIA H100 80GB HBM3") == get_peak_flops("NVIDIA H200") == 989e12
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
