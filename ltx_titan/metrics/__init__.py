from ltx_titan.metrics.loggers import MetricsLogger, read_metrics
from ltx_titan.metrics.profiling import profile_steps
from ltx_titan.metrics.spikes import StepGuard
from ltx_titan.metrics.step import Means, StepMetrics, Sums, peak_memory_gib, reset_peak_memory
from ltx_titan.metrics.summary import plot_loss, summarize_run
from ltx_titan.metrics.wandb import start_wandb

__all__ = [
    "Means",
    "MetricsLogger",
    "StepGuard",
    "StepMetrics",
    "Sums",
    "peak_memory_gib",
    "plot_loss",
    "profile_steps",
    "read_metrics",
    "reset_peak_memory",
    "start_wandb",
    "summarize_run",
]
