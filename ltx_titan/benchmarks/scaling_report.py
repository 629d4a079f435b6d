"""`ltx-titan bench scaling`: the scaling table and plot of measured columns, beside the estimate of all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_titan.benchmarks.scaling import describe, find_gpu, read_rows
from ltx_titan.benchmarks.scaling_cases import COLUMNS, Case, all_cases, predict
from ltx_titan.common.files import atomic_write, write_text
from ltx_titan.common.hardware import Gpu
from ltx_titan.common.options import Maybe, Overrides, Positional
from ltx_titan.estimate.command import assumptions
from ltx_titan.estimate.prediction import Estimate

DESCRIPTION = """\
Make table and plot of the rows of `python -m ltx_titan.benchmarks.scaling`: measured columns of 1, 2, 4 and 8 GPUs with
the estimate's error, and predictions for these and for 64 and 512 GPUs. What was not measured is shown as missing.

example:
  ltx-titan bench scaling scaling.jsonl docs/benchmarks/ltx23_full_step.toml --out scaling.md --plot scaling.png
"""

_PREDICTED = (*COLUMNS, 64, 512)
_MISSING = "missing"


@dataclass(frozen=True)
class ReportOptions:
    """Options of `ltx-titan bench scaling`."""

    rows: Positional[Path]
    """Rows, as JSON lines. A file that does not exist has none."""

    job: Positional[Path]
    """Job file with which they were measured."""

    gpu: Maybe[str] = None
    """Kind of GPU, as in `ltx-titan estimate`. Default: that of the rows."""

    layers: Maybe[int] = None
    """As when they were measured."""

    out: Maybe[Path] = None
    """File for the table, as Markdown. Default: standard output."""

    plot: Maybe[Path] = None
    """File for the plot, as PNG."""

    overrides: Overrides = ()


@dataclass(frozen=True)
class Line:
    """A case with all that is known of it.

    Attributes:
        case: the case.
        rows: measured, failed and omitted rows by number of GPUs.
        estimates: predictions by number of GPUs.
        twin: the case without replicas, if this one has them; its smallest column is then the base of efficiencies.
    """

    case: Case
    rows: dict[int, dict[str, Any]]
    estimates: dict[int, Estimate]
    twin: "Line | None" = None

    def measured(self, gpus: int, field: str) -> float | None:
        """A field of a measured row; None if it is missing."""
        row = self.rows.get(gpus, {})
        return row.get(field) if "step_time_s" in row else None

    def predicted(self, gpus: int, field: str) -> float | None:
        """A field of the estimate, that of the row if there is one; None if it does not fit."""
        row = self.rows.get(gpus, {})
        if "step_time_s" in row:
            return row["estimate"][field]
        found = self.estimates.get(gpus)
        return describe(found)[field] if found is not None and found.fits else None

    @property
    def base(self) -> int | None:
        """The smallest column that the case fits, which efficiencies refer to."""
        return next((gpus for gpus, found in self.estimates.items() if found.fits), None)

    def efficiency(self, gpus: int, *, measured: bool) -> float | None:
        """Tokens/s/GPU over those of the smallest column; None if either is missing."""
        reference = self.twin or self
        if reference.base is None:
            return None
        own, base = (
            (line.measured if measured else line.predicted)(column, "tokens_per_s_per_gpu")
            for line, column in ((self, gpus), (reference, reference.base))
        )
        return own / base if own and base else None


def collect(rows: Iterable[dict], job: Path, gpu: Gpu, layers: int | None, overrides: tuple[str, ...]) -> list[Line]:
    """Assigns the rows of a kind of GPU to its cases.

    Raises:
        ValueError: a row belongs to no case, or columns of a case were measured with different settings.
    """
    by_case: dict[str, dict[int, dict]] = {}
    settings: dict[str, list[str]] = {}
    # Measured rows last, so that they win over failures of the same case.
    for row in sorted(rows, key=lambda row: "step_time_s" in row):
        if row["gpu"] != gpu.name:
            continue
        by_case.setdefault(row["case"], {})[row["ranks"]] = row
        if "step_time_s" in row:
            own = [one for one in row["settings"] if not one.startswith(("--parallelism.", "--training.global_batch"))]
            if own != settings.setdefault(row["case"], own):
                raise ValueError(
                    f"{row['case']}: expected the same settings in all columns, found {own} and "
                    f"{settings[row['case']]}; delete one of the rows."
                )
    lines: dict[str, Line] = {}
    for case in all_cases(job, gpu, layers, overrides):
        estimates = predict(job, case, _PREDICTED, gpu, overrides)
        # The twin of a case comes before it.
        twin = lines[case.twin] if case.family == "hsdp" else None
        lines[case.name] = Line(case, by_case.pop(case.name, {}), estimates, twin)
    if by_case:
        raise ValueError(f"rows of {', '.join(by_case)}: no such case on {gpu.name}; pass the --layers of that run.")
    return list(lines.values())


def table(lines: list[Line], gpu: Gpu) -> str:
    """The measured table, or the list of missing columns, as Markdown."""
    measured = {gpus for line in lines for gpus in line.rows if line.measured(gpus, "step_time_s")}
    absent = [str(gpus) for gpus in COLUMNS if gpus not in measured]
    text = [f"## Measured on {gpu.name}", ""]
    if absent:
        text += [f"Missing columns: {', '.join(absent)} GPUs.", ""]
    if not measured:
        return "\n".join(text)
    of = {row["device"]: row for line in lines for row in line.rows.values() if "step_time_s" in row}
    for device, row in of.items():
        commits = sorted({r["commit"] for line in lines for r in line.rows.values() if r["device"] == device})
        text.append(f"{device}, torch {row['torch']}, triton {row['triton']}, commit {', '.join(commits)}.")
    text += [
        "",
        "Efficiency: tokens/s/GPU over those of the smallest column that the case (with replicas: the one without) "
        "fits, which is 1 GPU except for full fine-tuning of all blocks; with one clip over all GPUs (strong) also the "
        "speedup. Estimate: its prediction, and how far the measurement is above it. Columns that do not fit by the "
        "estimate are omitted.",
        "",
        "| case | GPUs | s/step | tokens/s/GPU | MFU | GiB | efficiency | estimate s | | estimate GiB | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        for gpus, found in line.estimates.items():
            if gpus in COLUMNS and (found.fits or line.measured(gpus, "step_time_s")):
                text.append(_measured_line(line, gpus))
    text += ["", *_replicas(lines)]
    return "\n".join(text)


def _measured_line(line: Line, gpus: int) -> str:
    row = line.rows.get(gpus, {})
    cells = [line.case.name, str(gpus)]
    if "step_time_s" not in row:
        error = row.get("error", "").split("\n")[0][:60].replace("|", "/")
        cells += [f"failed: {error}" if error else _MISSING, "", "", "", ""]
    else:
        efficiency = line.efficiency(gpus, measured=True)
        speedup = f", {efficiency * gpus:.2f} x" if efficiency and line.case.family == "strong" else ""
        cells += [
            f"{row['step_time_s']:.3f}",
            f"{row['tokens_per_s_per_gpu']:,.0f}",
            _percent(row["mfu"]),
            _number(row["peak_mem_gib"], ".1f"),
            _percent(efficiency) + speedup,
        ]
    for field, form in (("step_time_s", ".3f"), ("peak_mem_gib", ".1f")):
        predicted, found = line.predicted(gpus, field), line.measured(gpus, field)
        cells += [_number(predicted, form), f"{found / predicted - 1:+.0%}" if found and predicted else ""]
    return f"| {' | '.join(cells)} |"


def _replicas(lines: list[Line]) -> list[str]:
    """Replicas against sharding over all GPUs, where both were measured."""
    text = ["| replicas against FSDP over all GPUs | GPUs | replicas s | FSDP s | speedup | estimated |"]
    text.append("|---|---:|---:|---:|---:|---:|")
    for line in lines:
        twin = line.twin
        if twin is None:
            continue
        for gpus in COLUMNS:
            own, other = (one.measured(gpus, "step_time_s") for one in (line, twin))
            guess, guessed = (one.predicted(gpus, "step_time_s") for one in (line, twin))
            speedups = [f"{b / a:.2f}" if a and b else _MISSING for a, b in ((own, other), (guess, guessed))]
            if guess and guessed:
                times = [_number(seconds, ".3f") for seconds in (own, other)]
                text.append(f"| {line.case.name} | {gpus} | {' | '.join(times)} | {' | '.join(speedups)} |")
    return text


def predictions(lines: list[Line], gpu: Gpu) -> str:
    """The estimate for all numbers of GPUs, measured or not, as Markdown."""
    text = [
        f"## Predicted for {gpu.name}, not measured",
        "",
        "Seconds a step, MFU, GiB of tensors on a GPU; efficiency, against the smallest column that fits. -: it does "
        "not fit, or there is no such mesh.",
        "",
        f"| case | {' | '.join(f'{gpus} GPUs' if gpus > 1 else '1 GPU' for gpus in _PREDICTED)} |",
        "|---|" + "---|" * len(_PREDICTED),
    ]
    for line in lines:
        cells = []
        for gpus in _PREDICTED:
            found = line.estimates.get(gpus)
            if found is None or not found.fits:
                cells.append("-")
                continue
            one = describe(found)
            cell = f"{one['step_time_s']:.3f}, {one['mfu']:.1%}, {one['peak_mem_gib']:.0f}"
            efficiency = line.efficiency(gpus, measured=False)
            cells.append(cell if efficiency is None else f"{cell}; {efficiency:.0%}")
        text.append(f"| {line.case.name} | {' | '.join(cells)} |")
    listed = assumptions(gpu, next(iter(lines[0].estimates.values())).setup)
    return "\n".join([*text, "", "Assumptions:", "", *(f"- {line}" for line in listed), ""])


def draw(lines: list[Line], gpu: Gpu, png: Path) -> None:
    """Draws efficiencies over the number of GPUs: measured as points, the estimate dashed."""
    # Here, because the import takes over a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10))
    FigureCanvasAgg(figure)
    weak = [line for line in lines if line.case.family == "weak"]
    panels = {
        "weak scaling, full fine-tuning": [line for line in weak if line.case.mode == "full" and line.base == 1],
        "weak scaling, LoRA": [line for line in weak if line.case.mode != "full"],
        "weak scaling, full fine-tuning of all blocks": [line for line in weak if line.base != 1],
        "one clip over all GPUs, and replicas": [line for line in lines if line.case.family != "weak"],
    }
    for axes, (title, chosen) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for index, line in enumerate(chosen):
            # Missing columns stay gaps: no line is drawn over them.
            measured = {gpus: line.efficiency(gpus, measured=True) for gpus in COLUMNS}
            estimated = {gpus: line.efficiency(gpus, measured=False) for gpus in line.estimates}
            has_points = any(measured.values())
            for shares, label, style in (
                (estimated, f"{line.case.name} (estimate)", {"linestyle": "--", "alpha": 0.5}),
                (measured, line.case.name, {"marker": "o"}),
            ):
                percents = [100 * share if share else float("nan") for share in shares.values()]
                label = label if (shares is measured) == has_points else "_"
                axes.plot(list(shares), percents, color=f"C{index}", label=label, **style)
        axes.set(title=title, xlabel="GPUs", ylabel="efficiency, %", xscale="log", ylim=(0, 110))
        axes.set_xticks(_PREDICTED, labels=[str(gpus) for gpus in _PREDICTED])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if chosen:
            axes.legend(fontsize="small", loc="lower left")
    figure.suptitle(f"Scaling on {gpu.name}: measured (points) and estimated (dashed)")
    figure.tight_layout()
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def run(options: ReportOptions) -> int:
    """Runs `ltx-titan bench scaling`; returns the exit status.

    Raises:
        ValueError: the kind of GPU is not clear, or a row belongs to no case.
    """
    rows = read_rows(options.rows)
    kinds = sorted({row["gpu"] for row in rows})
    if options.gpu is None and len(kinds) != 1:
        raise ValueError(f"{options.rows}: expected rows of one kind of GPU, found {kinds or 'none'}; pass --gpu.")
    gpu = find_gpu(options.gpu or kinds[0], "")
    lines = collect(rows, options.job, gpu, options.layers, options.overrides)
    text = f"{table(lines, gpu)}\n\n{predictions(lines, gpu)}"
    if options.out is None:
        print(text)
    else:
        write_text(options.out, text)
    if options.plot is not None:
        draw(lines, gpu, options.plot)
    return 0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
