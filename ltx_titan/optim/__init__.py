from ltx_titan.optim.build import Optimizers, build_optimizers
from ltx_titan.optim.ema import EMA
from ltx_titan.optim.schedule import lr_factor

__all__ = ["EMA", "Optimizers", "build_optimizers", "lr_factor"]
