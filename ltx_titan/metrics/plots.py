"""Pictures of a run, drawn from its `metrics.jsonl` alone, so that they can be made again at any time."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ltx_titan.metrics.loggers import read_metrics

_CURVES = {"loss": "total", "loss_video": "video", "loss_audio": "audio"}


def plot_loss(
    metrics_jsonl: str | Path, png: str | Path, *, title: str = "Training loss", smoothing: float = 0.9
) -> None:
    """Draws the losses of a run over its steps: each as logged, faint, and smoothed on top.

    Args:
        metrics_jsonl: the job's `metrics.jsonl`.
        png: picture to write; it appears when complete.
        title: the picture's title.
        smoothing: weight of the past in the exponential mean, in [0, 1); 0 draws the losses as they are.

    Raises:
        ValueError: no step with a loss has been logged, or the smoothing is out of range.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}, expected 0 <= smoothing < 1.")
    records = read_metrics(metrics_jsonl)
    curves = {}
    for key, label in _CURVES.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            curves[label] = points
    if not curves:
        raise ValueError(f"{metrics_jsonl}: no losses to plot ({len(records)} lines).")

    # A canvas of its own: pyplot would keep global state, and want a display on some machines.
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, smoothing), color=f"C{index}", label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="mean squared error of the velocity")
    axes.grid(alpha=0.3)
    axes.legend()

    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    temporary = png.with_name(png.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(png)


def smooth(values: tuple[float, ...], weight: float) -> list[float]:
    """Exponential mean, corrected for its start: the first value is the first mean."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result
