"""The only module that imports torchtitan, so that the day it is outgrown is one file's change.

torchtitan asks for the device type when it is imported and takes "cuda" where there is no accelerator; meshes built
by its `ParallelDims` would then be CUDA meshes on a CPU. The real type is put in its place here.

Not taken: its TensorBoard logger, which cannot drop the points after a resumed step, and its metrics, profiling and
checkpoint managers, whose promises differ from ours.
"""

import torch
import torchtitan.distributed.parallel_dims as _parallel_dims
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_determinism
from torchtitan.tools.utils import GarbageCollection, get_peak_flops

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
_parallel_dims.device_type = DEVICE_TYPE

__all__ = ["DEVICE_TYPE", "GarbageCollection", "ParallelDims", "get_peak_flops", "set_determinism"]
