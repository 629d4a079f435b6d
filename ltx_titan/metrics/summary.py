"""The end of a run: its loss curve, drawn from `metrics.jsonl` alone, and a list of what it wrote."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ltx_titan.common.files import atomic_write
from ltx_titan.metrics.loggers import read_metrics

logger = logging.getLogger(__name__)

_CURVES = {"loss": "total", "loss_video": "video", "loss_audio": "audio"}


def summarize_run(folder: Path, *, title: str, files: Mapping[str, Path | None]) -> None:
    """Draws `loss.png`, logs the first and last losses, and lists the run's files.

    Args:
        folder: the job's dump folder, with its `metrics.jsonl`.
        title: of the loss curve.
        files: further files or folders by name; None and missing ones are omitted.
    """
    metrics, curve = folder / "metrics.jsonl", folder / "loss.png"
    records = read_metrics(metrics)
    if any(record.get(key) is not None for record in records for key in _CURVES):
        plot_loss(metrics, curve, title=title)
    for key, label in _CURVES.items():
        # Steps without the stream have no value, so the first value may be that of a later step.
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if not points:
            continue
        # The mean of the last tenth: single steps differ by their sigmas more than by what was learned.
        tail = [loss for _, loss in points[-max(len(points) // 10, 1) :]]
        logger.info(
            "%s: %.4f at step %d, %.4f as the mean of the last %d logged steps%s",
            "loss" if key == "loss" else f"{label} loss",
            points[0][1],
            points[0][0],
            sum(tail) / len(tail),
            len(tail),
            "" if key == "loss" else " with such a loss",
        )
    own = {
        "report": folder / "report.html",
        "loss curve": curve,
        "metrics": metrics,
        "tensorboard": folder / "tensorboard",
        "samples": folder / "samples",
    }
    for name, path in {**own, **files}.items():
        if path is not None and path.exists():
            logger.info("%-12s %s", name, path)


def plot_loss(
    metrics_jsonl: str | Path, png: str | Path, *, title: str = "Training loss", smoothing: float = 0.9
) -> None:
    """Draws the losses of a run over its steps: each as logged, faint, and smoothed on top.

    Args:
        metrics_jsonl: the job's `metrics.jsonl`.
        png: image to write, atomically.
        title: of the plot.
        smoothing: weight of the past in the exponential mean, in [0, 1); 0 draws the losses as they are.

    Raises:
        ValueError: no step with a loss has been logged, or the smoothing is out of range.
    """
    # Here, because the import takes over a second, which each rank would pay at start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1.")
    records = read_metrics(metrics_jsonl)
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, label in _CURVES.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            curves[label] = points
    if not curves:
        raise ValueError(f"{metrics_jsonl}: expected steps with a loss, found {len(records)} lines without one.")

    # An own canvas instead of pyplot, which keeps global state and needs a display on some machines.
    figure = Figure(figsize=(9, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, smoothing), color=f"C{index}", label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="mean squared error of the velocity")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction: the first value is the first mean."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        # The sum of the weights so far is 1 - weight**count; without it the start would be drawn towards 0.
        result.append(mean / (1 - weight**count))
    return result
