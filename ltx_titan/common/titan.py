"""The only module that imports torchtitan, so that the day it is outgrown is one file's change.

Taken: the table of peak rates. Not taken, each for a promise that it does not make: its TensorBoard logger (cannot drop
the points after a resumed step), its checkpoint manager (exact state, names, safety), `ParallelDims` (asks for the
device type on import), metrics, profiling, and the trainer itself.
"""

from torchtitan.tools.utils import get_peak_flops

__all__ = ["get_peak_flops"]
