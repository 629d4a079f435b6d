from ltx_titan.metrics.loggers import MetricsLogger, StepMetrics, read_metrics
from ltx_titan.metrics.memory import peak_memory_gib, reset_peak_memory
from ltx_titan.metrics.plots import plot_loss
from ltx_titan.metrics.profiling import profile_steps
from ltx_titan.metrics.wandb import start_wandb

__all__ = [
    "MetricsLogger",
    "StepMetrics",
    "peak_memory_gib",
    "plot_loss",
    "profile_steps",
    "read_metrics",
    "reset_peak_memory",
    "start_wandb",
]
