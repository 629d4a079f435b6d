"""`report.html`: what a run has done so far, on one page that loads nothing.

Made from the files of the dump folder alone (`metrics.jsonl`, `samples/`, `job.toml`), so that it covers the whole run
also after a resume. Written at each validation and at the end.
"""

import base64
import datetime
import html
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ltx_titan.common.files import write_text
from ltx_titan.config import JobConfig
from ltx_titan.metrics.chart import Curve, line_chart
from ltx_titan.metrics.loggers import read_metrics
from ltx_titan.validation.usage import usage

logger = logging.getLogger(__name__)

EMBEDDED_BYTES = 32 * 2**20
"""Size of all clips up to which they are part of the page; the older ones beyond it are links to their files."""

_STYLE = Path(__file__).parent.parent / "assets" / "report.css"
_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}
# Plays the clips of one sample from their beginning at the same time; only the newest one is audible.
_SCRIPT = """
document.querySelectorAll("button[data-play]").forEach(button => button.addEventListener("click", () => {
  const clips = [...button.closest(".sample").querySelectorAll("video")];
  clips.forEach((clip, i) => { clip.muted = i < clips.length - 1; clip.currentTime = 0; clip.play(); });
}));
"""
# The browser's own guard: nothing but files beside the page can be loaded, whatever a prompt contains.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: 'self' file:; media-src data: 'self' file:"
)


class RunReport:
    """Writes a run's report on rank 0; an error is logged once and never ends the run.

    Args:
        job: the job as resolved.
        last_step: the step after which the run ends.
        prompts: of the validation samples, in order; the others are named by their number.
        is_writer: False on all ranks but 0: `write` then does nothing.
    """

    def __init__(self, job: JobConfig, last_step: int, prompts: Sequence[str] = (), *, is_writer: bool = True) -> None:
        self._job, self._last_step, self._prompts = job, last_step, prompts
        self._is_writer = is_writer

    def write(self, step: int, export: Path | None = None) -> None:
        """Writes `report.html` atomically.

        Args:
            step: optimizer steps taken.
            export: the exported file, once the run has ended.
        """
        if not self._is_writer:
            return
        folder = Path(self._job.job.dump_folder)
        try:
            write_text(folder / "report.html", render(folder, self._job, step, self._last_step, self._prompts, export))
        except Exception as error:  # a report is not worth a run
            self._is_writer = False
            logger.warning("%s: not written any more: %s: %s", folder / "report.html", type(error).__name__, error)


def render(
    folder: Path, job: JobConfig, step: int, last_step: int, prompts: Sequence[str] = (), export: Path | None = None
) -> str:
    """Renders the page; see `RunReport`. Text from users is escaped.

    Raises:
        OSError, ValueError: a file of the folder cannot be read.
    """
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    records = [record for record in records if record["step"] <= step]
    title = job.job.description or folder.name
    sections = [
        _heading(title, job, step, last_step, records),
        _clips(folder, step, prompts),
        _curves(records),
        _speed(records),
        _sources(records),
        _usage(job, export),
        _job_text(folder),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>\n{''.join(sections)}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _heading(title: str, job: JobConfig, step: int, last_step: int, records: Sequence[Mapping[str, Any]]) -> str:
    what = "full fine-tuning" if job.model.mode == "full" else f"LoRA of rank {job.lora.rank}"
    base = Path(job.model.checkpoint_path).name if job.model.checkpoint_path else job.model.shape or "random weights"
    state = f"finished after {step:,} steps" if step >= last_step else f"step {step:,} of {last_step:,}"
    written = datetime.datetime.now().strftime("%d %B %Y, %H:%M")
    samples, epochs = _last(records, "data/samples"), _last(records, "data/epochs")
    tiles = {
        "loss": _number(_tail_mean(records, "loss"), ".3f"),
        "samples seen": _number(samples, ",.0f"),
        "epochs": _number(epochs, ".1f"),
        "training time": _duration(training_seconds(records)),
        "seconds per step": _number(_median(records, "step_time_s"), ".2f"),
        "peak memory": _number(_most(records, "peak_mem_gib"), ".1f", " GiB"),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value != "-")
    return (
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="soft">{html.escape(base)}, {what}: {state}. Written on {written}.</p>'
        f'<dl class="tiles">{cells}</dl>'
    )


@dataclass(frozen=True)
class _Clip:
    """One file of `samples/step-N`."""

    step: int
    path: Path
    num_bytes: int


def find_clips(folder: Path, step: int) -> dict[int, list[_Clip]]:
    """Finds the validation clips up to a step: by number of the sample, ordered by step."""
    found: dict[int, list[_Clip]] = {}
    for path in sorted(folder.glob("samples/step-*/sample-*")):
        number, at = path.stem.removeprefix("sample-"), path.parent.name.removeprefix("step-")
        # Later steps are those of an earlier run, which this one resumed before.
        if path.suffix in _KINDS and number.isdigit() and at.isdigit() and int(at) <= step:
            found.setdefault(int(number), []).append(_Clip(int(at), path, path.stat().st_size))
    return {number: sorted(clips, key=lambda clip: clip.step) for number, clips in sorted(found.items())}


def _clips(folder: Path, step: int, prompts: Sequence[str]) -> str:
    found = find_clips(folder, step)
    if not found:
        return ""
    embedded = _chosen([clip for clips in found.values() for clip in clips])
    parts = ["<h2>Validation clips</h2>"]
    count = sum(len(clips) for clips in found.values())
    if len(embedded) < count:
        parts.append(
            f'<p class="soft">The newest {len(embedded)} of {count} clips are part of this page '
            f"({EMBEDDED_BYTES / 2**20:.0f} MiB at most); the others need the folder samples/ beside it.</p>"
        )
    for number, clips in found.items():
        prompt = prompts[number - 1] if number <= len(prompts) else f"sample {number}"
        figures = "".join(_figure(clip, folder, is_embedded=clip.path in embedded) for clip in clips)
        videos = sum(clip.path.suffix == ".mp4" for clip in clips)
        button = '<button type="button" data-play>Play together</button>' if videos > 1 else ""
        parts.append(
            f'<div class="card sample"><div class="row"><h3 class="prompt">{html.escape(prompt)}</h3>{button}</div>'
            f'<div class="strip">{figures}</div></div>'
        )
    return "".join(parts)


def _chosen(clips: Sequence[_Clip]) -> set[Path]:
    """Clips to embed: the newest first, until the page is large enough."""
    chosen, total = set(), 0
    for clip in sorted(clips, key=lambda clip: -clip.step):
        total += clip.num_bytes
        if total > EMBEDDED_BYTES:
            break
        chosen.add(clip.path)
    return chosen


def _figure(clip: _Clip, folder: Path, *, is_embedded: bool) -> str:
    kind = _KINDS[clip.path.suffix]
    if is_embedded:
        source = f"data:{kind};base64,{base64.b64encode(clip.path.read_bytes()).decode()}"
    else:
        source = quote(clip.path.relative_to(folder).as_posix())
    caption = "before training" if clip.step == 0 else f"step {clip.step:,}"
    match clip.path.suffix:
        case ".mp4":
            media = f'<video controls loop playsinline preload="metadata" src="{source}"></video>'
        case ".wav":
            media = f'<audio controls preload="metadata" src="{source}"></audio>'
        case _:
            media = f'<img alt="{caption}" src="{source}">'
    return f"<figure>{media}<figcaption>{caption}</figcaption></figure>"


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    charts: dict[str, tuple[tuple[str, str], ...]] = {
        "Loss": (("loss", "total"), ("loss_video", "video"), ("loss_audio", "audio")),
        "Held-out loss": (("held_out/total", "total"), ("held_out/video", "video"), ("held_out/audio", "audio")),
        "Similarity of clips and prompts": (("quality/text_video", "video"), ("quality/text_audio", "audio")),
        "Learning rate": (("lr", "learning rate"),),
        "Gradient norm": (("grad_norm", "before clipping"),),
        "Seconds per step": (("step_time_s", "seconds"),),
        "Peak memory, GiB": (("peak_mem_gib", "GiB"),),
    }
    keys_of_sources = dict.fromkeys(
        key for record in records for key in record if key.startswith("data/") and key.endswith("/loss")
    )
    charts["Loss by source"] = tuple((key, key.split("/")[1]) for key in keys_of_sources)
    cards = []
    for name, keys in charts.items():
        curves = [Curve(label, _points(records, key)) for key, label in keys]
        chart = line_chart(name, curves, is_smoothed=name in ("Loss", "Loss by source", "Gradient norm"))
        if chart:
            cards.append(f'<div class="card"><h3>{name}</h3>{chart}</div>')
    if not cards:
        return ""
    note = "Each step draws its own sigmas, so single losses vary: read the smoothed line, from left to right by step."
    return f'<h2>Curves</h2><p class="soft">{note}</p><div class="charts">{"".join(cards)}</div>'


def _speed(records: Sequence[Mapping[str, Any]]) -> str:
    rows = {
        "seconds per step": ("step_time_s", ".3f", 1.0),
        "tokens per second": ("tokens_per_s", ",.0f", 1.0),
        "TFLOP/s per GPU": ("tflops_per_gpu", ",.3g", 1.0),
        "MFU": ("mfu", ".3g", 100.0),
        "peak memory, GiB": ("peak_mem_gib", ".2f", 1.0),
    }
    lines = []
    for name, (key, form, factor) in rows.items():
        values = [factor * value for _, value in _points(records, key)]
        if values:
            unit = " %" if name == "MFU" else ""
            cells = (min(values), statistics.median(values), max(values))
            lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell:{form}}{unit}</td>' for cell in cells)}</tr>")
    if not lines:
        return ""
    head = "<thead><tr><th></th><th>lowest</th><th>median</th><th>highest</th></tr></thead>"
    note = "Over the logged steps, the first ones with compilation included; validation and saves are not part of them."
    table = f'<div class="card"><table>{head}{"".join(lines)}</table></div>'
    return f'<h2>Speed and memory</h2>{table}<p class="soft">{note}</p>'


def _sources(records: Sequence[Mapping[str, Any]]) -> str:
    """Samples and epochs of each source, for a job with several."""
    last = records[-1] if records else {}
    names = [key.split("/")[1] for key in last if key.startswith("data/") and key.count("/") == 2]
    names = list(dict.fromkeys(names))
    if not names:
        return ""
    seen = max(last["data/samples"], 1)
    lines = []
    for name in names:
        samples, epochs = last[f"data/{name}/samples"], last[f"data/{name}/epochs"]
        cells = "".join(f"<td>{cell}</td>" for cell in (f"{samples:,}", f"{samples / seen:.1%}", f"{epochs:.2f}"))
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    head = "<thead><tr><th></th><th>samples</th><th>share</th><th>epochs</th></tr></thead>"
    return f'<h2>Data</h2><div class="card"><table>{head}{"".join(lines)}</table></div>'


def training_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Time of all logged steps, without validation and saves; None without a step."""
    total, before = 0.0, 0
    for record in records:
        # A line's step time is the mean since the previous line.
        total += (record.get("step_time_s") or 0.0) * (record["step"] - before)
        before = record["step"]
    return total or None


def _usage(job: JobConfig, export: Path | None) -> str:
    if export is None:
        return ""
    parts = [f'<h2>Use the result</h2><p class="soft">The result is <code>{html.escape(str(export))}</code>.</p>']
    for recipe in usage(job, export):
        code = f"<pre>{html.escape(recipe.code)}</pre>" if recipe.code else ""
        parts.append(f'<h3>{html.escape(recipe.program)}</h3><p class="soft">{html.escape(recipe.text)}</p>{code}')
    return "".join(parts)


def _job_text(folder: Path) -> str:
    path = folder / "job.toml"
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8"))
    note = f'<p class="soft">With all defaults; <code>ltx-titan train {html.escape(str(path))}</code> repeats it.</p>'
    return f"<h2>The job</h2>{note}<details><summary>job.toml</summary><pre>{text}</pre></details>"


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]


def _last(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    points = _points(records, key)
    return points[-1][1] if points else None


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    points = _points(records, key)
    return statistics.median(value for _, value in points) if points else None


def _most(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return max((value for _, value in _points(records, key)), default=None)


def _tail_mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of the last tenth, as in the lines at the end of a run."""
    values = [value for _, value in _points(records, key)]
    return statistics.mean(values[-max(len(values) // 10, 1) :]) if values else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
