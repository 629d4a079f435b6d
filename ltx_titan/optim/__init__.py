from ltx_titan.optim.schedule import lr_factor

__all__ = ["lr_factor"]
