from ltx_titan.optim.build import Optimizers, build_optimizers
from ltx_titan.optim.ema import EMA
from ltx_titan.optim.groups import check_groups, freeze_groups, group_of
from ltx_titan.optim.schedule import lr_factor

__all__ = ["EMA", "Optimizers", "build_optimizers", "check_groups", "freeze_groups", "group_of", "lr_factor"]
