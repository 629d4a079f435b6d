"""`ltx-titan inspect`: a look at clips or at prepared data before days of training go into them.

It writes nothing but a contact sheet and, if asked, a JSON file.
"""

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ltx_titan.commands.files import AUDIO_SUFFIXES, VIDEO_SUFFIXES, is_table
from ltx_titan.commands.inspection import prepared, raw
from ltx_titan.commands.inspection.prepared import Folders, PreparedSample
from ltx_titan.commands.inspection.raw import RawClip
from ltx_titan.commands.inspection.sheet import Entry, write_sheet
from ltx_titan.commands.report import Report
from ltx_titan.common.files import write_text
from ltx_titan.data import resolve_root
from ltx_titan.encode.buckets import parse_buckets
from ltx_titan.estimate.prediction import SampleTimes, step_times
from ltx_titan.media import IMAGE_SUFFIXES

_STAGE = "looking"
_SCALE_FACTORS = (8, 32, 32)

Item = TypeVar("Item")


@dataclass(frozen=True)
class InspectOptions:
    """What `inspect_data` is told; the command line has the same names.

    Attributes:
        source: folder or table of clips, or root of prepared data.
        sheet: picture to write; None: none.
        json: file to write all findings to; None: none.
        resolution_buckets: `WxHxF;...`, for clips.
        limit: clips on the sheet, spread over all of them.
        columns: clips side by side on the sheet.
        deep: decode everything (clips).
        decode: decode prepared latents for the sheet.
        model_path: checkpoint: its sizes for step times, its decoders for `decode`.
        shape: released model for step times, where there is no checkpoint.
        gpu: for step times.
        mfu: assumed MFU; None: predicted from the GPU's measured rates, as `ltx-titan estimate` does.
        mode: full or lora.
        device: where latents are decoded.
        num_workers: files at once.
    """

    source: Path
    sheet: Path | None = Path("contact-sheet.png")
    json: Path | None = None
    resolution_buckets: str | None = None
    limit: int = 24
    columns: int = 2
    deep: bool = False
    decode: bool = False
    model_path: Path | None = None
    shape: str = "ltx-2.3-22b"
    gpu: str = "H100"
    mfu: float | None = None
    mode: Literal["full", "lora"] = "lora"
    device: str = "cpu"
    num_workers: int = 8


def inspect_data(options: InspectOptions, console: Console | None = None) -> Report:
    """Look at data, print tables and draw a contact sheet.

    Raises:
        ValueError: there is no data, or an option is of no use.
    """
    report = Report(console or Console())
    times = step_times(options.model_path, options.shape, options.gpu, options.mfu, options.mode)
    root = _prepared_root(options.source)
    if root is not None and (folders := prepared.find_samples(root)):
        _prepared(root, folders, options, times, report)
    else:
        _raw(options, times, report)
    return report


def _prepared_root(source: Path) -> Path | None:
    """The root of prepared data that is meant; None for clips, also where the prepared data lies among them."""
    if is_table(source) or not source.is_dir():
        return None
    root = resolve_root(source)
    has_media = any(
        path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES for path in source.iterdir()
    )
    return None if root != source and has_media else root


def _raw(options: InspectOptions, times: SampleTimes, report: Report) -> None:
    buckets = parse_buckets(options.resolution_buckets, _SCALE_FACTORS) if options.resolution_buckets else []
    found = raw.find_clips(options.source)
    with report.progress(_STAGE, len(found)) as bar:
        clips = raw.probe_clips(found, buckets, options.deep, options.num_workers, bar.advance)
    good = [clip for clip in clips if clip.problem is None]
    for clip in clips:
        if clip.problem is None:
            report.add("files", "done")
        else:
            report.fail("files", str(clip.path), clip.problem)
    kinds = Counter(clip.kind for clip in good)
    total_s = sum(clip.duration_s for clip in good)
    header = [
        f"{options.source}: {_counted(kinds)}, {_length(total_s)}",
        _sentence("sizes", Counter(f"{clip.width}x{clip.height}" for clip in good if clip.width)),
        _sentence("frames per second", Counter(f"{clip.fps:.6g}" for clip in good if clip.fps)),
        _spread_sentence("seconds", [clip.duration_s for clip in good if clip.duration_s]),
        _sentence("audio", Counter(_audio(clip) for clip in good if clip.kind != "image")),
    ]
    if buckets:
        header.append(_sentence("buckets", Counter(str(clip.bucket) for clip in good if clip.bucket)))
    _say(report, header)
    if buckets:
        placed = [clip for clip in good if clip.bucket is not None]
        _print_buckets(
            [(str(clip.bucket), clip.fps, clip.video_tokens, clip.audio_tokens) for clip in placed], times, report
        )
    report.notes.update(raw.warnings_of(clips, bool(buckets), is_table(options.source)))
    _write(options, header, clips, raw.sheet_entry, raw.as_record, report)


def _prepared(root: Path, folders: Folders, options: InspectOptions, times: SampleTimes, report: Report) -> None:
    names = sorted({name for samples in folders.values() for name in samples})
    with report.progress(_STAGE, len(names)) as bar:
        samples = prepared.read_samples(folders, names, options.num_workers, bar.advance)
    good = [sample for sample in samples if not sample.problems]
    for sample in samples:
        if not sample.problems:
            report.add("samples", "done")
        for folder, reason in sample.problems:
            report.fail("samples", f"{folder}/{sample.name}", reason)
    text = [float(sample.text_tokens) for sample in good if sample.text_tokens]
    header = [
        f"{root}: {len(good)} whole samples of {len(samples)}, {_length(sum(sample.duration_s for sample in good))}",
        f"folders: {', '.join(folders)}",
        _sentence("frames per second", Counter(f"{sample.fps:.6g}" for sample in good if sample.fps)),
        _spread_sentence("seconds", [sample.duration_s for sample in good]),
        _sentence("audio", Counter("with" if sample.has_audio else "without" for sample in good)),
        _spread_sentence("text tokens", text) if text else "text: finished contexts",
    ]
    for folder in folders:
        if (found := prepared.statistics_of(folders, folder, good)) is not None:
            mean, deviation = found
            header.append(f"{folder}: mean {mean:.3f}, deviation {deviation:.3f} (about 0 and 1 from the right VAE)")
    header.append(_sentence("buckets", Counter(sample.bucket for sample in good)))
    _say(report, header)
    _print_buckets([(s.bucket, s.fps, s.video_tokens, s.audio_tokens) for s in good], times, report)
    report.notes.update(prepared.warnings_of(samples))
    decoders = _decoders(options) if options.decode else None

    def entry(sample: PreparedSample) -> Entry:
        return prepared.sheet_entry(sample, folders, decoders)

    _write(options, header, samples, entry, prepared.as_record, report)


def _print_buckets(rows: Sequence[tuple[str, float, int, int]], times: SampleTimes, report: Report) -> None:
    """A table of equal shapes: how many, how many tokens, and how long a step takes."""
    groups: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for bucket, fps, video, audio in rows:
        groups[bucket, video, audio].append(fps)
    table = Table(
        "bucket", "samples", "fps", "video tokens", "audio tokens", "s/sample", title="buckets", title_justify="left"
    )
    total_s = 0.0
    for (bucket, video, audio), rates in sorted(groups.items(), key=lambda group: -len(group[1])):
        seconds = times.seconds(video, audio)
        total_s += seconds * len(rates)
        fps = ", ".join(sorted({f"{rate:.6g}" for rate in rates if rate})) or "-"
        table.add_row(bucket, str(len(rates)), fps, str(video), str(audio), f"{seconds:.3g}")
    report.console.print(table)
    _say(report, [f"an epoch takes about {_length(total_s)} of GPU time; s/sample is for {times.assumption}"])


def _write(
    options: InspectOptions, header: Sequence[str], items: Sequence[Item], entry: Any, record: Any, report: Report
) -> None:
    if options.json is not None:
        write_text(options.json, json.dumps([record(item) for item in items], ensure_ascii=False, indent=1) + "\n")
        _say(report, [f"findings: {options.json}"])
    if options.sheet is None:
        return
    shown = _chosen(items, options.limit)
    entries = []
    with report.progress("drawing", len(shown)) as bar:
        for item in shown:
            entries.append(entry(item))
            bar.advance()
    lines = [*header, f"shown: {len(shown)} of {len(items)}"]
    write_sheet(options.sheet, [line for line in lines if line], entries, options.columns)
    _say(report, [f"contact sheet: {options.sheet}"])


def _chosen(items: Sequence[Item], limit: int) -> list[Item]:
    """Some items, spread over all of them; those with problems first among equals would hide the rest."""
    if len(items) <= limit:
        return list(items)
    return [items[int(place)] for place in torch.linspace(0, len(items) - 1, limit).round()]


def _decoders(options: InspectOptions) -> Any:
    from ltx_titan.validation.decode import load_decoders

    if options.model_path is None:
        raise ValueError("--decode needs --model-path: the checkpoint with the VAEs")
    return load_decoders(options.model_path, options.model_path, options.device)


def _say(report: Report, lines: Sequence[str]) -> None:
    for line in lines:
        if line:
            report.console.print(escape(line), highlight=False, soft_wrap=True)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts.most_common()) or "nothing"


def _sentence(name: str, counts: Counter[str], limit: int = 6) -> str:
    if not counts:
        return ""
    parts = [f"{value} ({count})" for value, count in counts.most_common(limit)]
    more = f", {len(counts) - limit} more" if len(counts) > limit else ""
    return f"{name}: {', '.join(parts)}{more}"


def _spread_sentence(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{name}: {min(values):.4g} to {max(values):.4g}, half of them above {statistics.median(values):.4g}"


def _audio(clip: RawClip) -> str:
    if not clip.channels:
        return "none"
    return (
        f"{ {1: 'mono', 2: 'stereo'}.get(clip.channels, f'{clip.channels} channels') } {clip.sample_rate / 1000:g} kHz"
    )


def _length(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"


DESCRIPTION = """\
Look at clips or at prepared data before training on them: a contact sheet (PNG) with frames, audio and caption of
each, and tables of counts, sizes, rates, lengths, buckets, tokens and estimated step times. Broken files are named.

SOURCE is a folder or a table of clips, or the root of prepared data. With --resolution-buckets, clips are shown as
training will see them: cut to their bucket, first frames only. Prepared latents are shown in false colours, or
decoded with --decode and --model-path. --deep decodes every frame of clips, which finds damage behind a good header.

examples:
  ltx-titan inspect clips/
  ltx-titan inspect clips/dataset.jsonl --resolution-buckets "768x448x89;448x768x89" --deep
  ltx-titan inspect clips/.precomputed --sheet prepared.png --gpu H100 --mfu 0.45 --mode full
  ltx-titan inspect clips/.precomputed --decode --model-path ltx-2.3-22b-dev.safetensors --limit 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan inspect`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or table of clips, or prepared data")
    parser.add_argument(
        "--sheet", type=Path, default=Path("contact-sheet.png"), help="picture to write (default: contact-sheet.png)"
    )
    parser.add_argument("--no-sheet", dest="sheet", action="store_const", const=None, help="tables only")
    parser.add_argument("--json", type=Path, help="write what is known of every file as JSON")
    parser.add_argument("--resolution-buckets", metavar="WxHxF;...", help="as for process-dataset")
    parser.add_argument("--limit", type=int, default=24, metavar="N", help="clips on the sheet (default: 24)")
    parser.add_argument("--columns", type=int, default=2, help="clips side by side on the sheet (default: 2)")
    parser.add_argument("--deep", action="store_true", help="decode every frame and all audio of clips")
    parser.add_argument("--decode", action="store_true", help="decode prepared latents for the sheet")
    parser.add_argument("--num-workers", type=int, default=8, help="files at once (default: 8)")
    step = parser.add_argument_group("step times")
    step.add_argument("--model-path", type=Path, help="checkpoint to be trained (also the VAEs for --decode)")
    step.add_argument(
        "--shape", default="ltx-2.3-22b", help="released model, without a checkpoint: ltx-2.3-22b (default)"
    )
    step.add_argument("--gpu", default="H100", help="A100, H100 (default), H200, B200, ...")
    step.add_argument("--mfu", type=float, help="assume this MFU (default: predicted, as by ltx-titan estimate)")
    step.add_argument("--mode", choices=("full", "lora"), default="lora", help="what is trained (default: lora)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where latents are decoded (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan inspect`; the exit status is 1 where nothing can be used."""
    options = InspectOptions(**{name: getattr(arguments, name) for name in InspectOptions.__dataclass_fields__})
    report = inspect_data(options)
    report.print("inspect")
    return 0 if report.succeeded() else 1
