import subprocess
import sys


def test_import_leaves_the_process_as_it_was_and_meshes_are_on_the_real_device(tmp_path):
    """In a process of its own: torchtitan reads the device type when it is imported."""
    program = f"""
import gc, logging, torch
import torch.distributed as dist
state = torch.get_rng_state(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
from ltx_titan.titan import DEVICE_TYPE, ParallelDims
assert gc.isenabled() and not dist.is_initialized() and not logging.getLogger().handlers
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
mesh = ParallelDims(dp_replicate=1, dp_shard=-1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1).build_mesh()
assert mesh.device_type == DEVICE_TYPE == ("cuda" if torch.cuda.is_available() else "cpu")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
