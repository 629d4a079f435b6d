"""`ltx-titan inspect`: checks clips or prepared data before days of training are spent on them.

It writes a contact sheet and, on request, a JSON file, and changes nothing else.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from ltx_titan.commands.inspection import prepared, raw
from ltx_titan.commands.inspection.prepared import Folders, InspectedSample
from ltx_titan.commands.inspection.sheet import Entry, write_sheet
from ltx_titan.commands.report import Report
from ltx_titan.common.files import json_text, write_text
from ltx_titan.common.options import Flag, Maybe, Positional, default_device, placeholder
from ltx_titan.common.tensors import evenly_spaced
from ltx_titan.data import resolve_root
from ltx_titan.data.stale import stale_samples
from ltx_titan.encode.buckets import parse_buckets
from ltx_titan.encode.propose_buckets import Source, explain, propose_buckets
from ltx_titan.estimate.prediction import SampleTimes, step_times
from ltx_titan.tables.folders import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ltx_titan.tables.samples import is_table
from ltx_titan.validation.decode import Decoders, load_decoders

DESCRIPTION = """\
Check clips or prepared data before training: a contact sheet (PNG) with frames, audio and caption of each clip, and
tables of counts, sizes, frame rates, durations, buckets, tokens and estimated step times. Broken files are reported.

SOURCE is a folder or a table of clips, or the root of prepared data. With --resolution-buckets, clips are shown as
training sees them: cropped to their bucket, first frames only. Prepared latents are shown in false colors, or decoded
with --decode and --model-path. --deep decodes every frame of clips, which finds damage behind an intact header.

examples:
  ltx-titan inspect clips/
  ltx-titan inspect clips/dataset.jsonl --resolution-buckets "768x448x89;448x768x89" --deep
  ltx-titan inspect clips/.precomputed --sheet prepared.png --gpu H100 --mfu 0.45 --mode full
  ltx-titan inspect clips/.precomputed --decode --model-path ltx-2.3-22b-dev.safetensors --limit 8
"""

_STAGE = "checking"
_SCALE_FACTORS = (8, 32, 32)

Item = TypeVar("Item")


@dataclass(frozen=True)
class InspectOptions:
    """Options of `ltx-titan inspect`."""

    source: Positional[Path]
    """Folder or table of clips, or root of prepared data."""

    sheet: Path = Path("contact-sheet.png")
    """Contact sheet to write."""

    no_sheet: Flag = False
    """Print tables only."""

    json: Maybe[Path] = None
    """File (.json) for the findings of every file."""

    resolution_buckets: Annotated[Maybe[str], placeholder("WxHxF;...|auto")] = None
    """Buckets to sort clips into, as for process-dataset; `auto` proposes some, as it would."""

    limit: Annotated[int, placeholder("N")] = 24
    """Clips on the sheet, evenly spaced over all of them."""

    columns: int = 2
    """Columns of the sheet."""

    deep: Flag = False
    """Decode every frame and all audio of clips."""

    decode: Flag = False
    """Decode prepared latents for the sheet."""

    num_workers: int = 8
    """Files in parallel."""

    model_path: Maybe[Path] = None
    """Checkpoint to be trained: for step times, and for the VAEs of --decode."""

    shape: str = "ltx-2.3-22b"
    """Released model for step times without a checkpoint."""

    gpu: str = "H100"
    """GPU for step times: A100, H100, H200, B200, ..."""

    mfu: Maybe[float] = None
    """MFU to assume for step times; by default they are predicted, as by ltx-titan estimate."""

    mode: Literal["full", "lora"] = "lora"
    """Full or LoRA fine-tuning, for step times."""

    strict: Flag = False
    """Exit with status 1 if any file failed; otherwise only if nothing could be done."""

    device: str = field(default_factory=default_device)
    """Device that latents are decoded on."""


def run(options: InspectOptions) -> int:
    """Runs the command; the exit status is 1 if no file or sample is usable, or if one is not with `--strict`."""
    report = inspect_data(options)
    report.print("inspect")
    return report.status(options.strict)


def inspect_data(options: InspectOptions, console: Console | None = None) -> Report:
    """Checks data, prints tables and draws a contact sheet.

    Raises:
        ValueError: there is no data, or an option is invalid.
    """
    report = Report(console or Console())
    # First, because it checks options: reading a large dataset takes minutes.
    times = step_times(options.model_path, options.shape, options.gpu, options.mfu, options.mode)
    root = _prepared_root(options.source)
    if root is not None and (folders := prepared.find_samples(root)):
        _inspect_prepared(root, folders, options, times, report)
    else:
        _inspect_clips(options, times, report)
    return report


def _prepared_root(source: Path) -> Path | None:
    """The root of prepared data, or None for clips, including a folder of clips that also contains prepared data."""
    if is_table(source) or not source.is_dir():
        return None
    root = resolve_root(source)
    has_media = any(
        path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES for path in source.iterdir()
    )
    # A folder of clips with `.precomputed` in it: the user named the clips.
    return None if root != source and has_media else root


def _inspect_clips(options: InspectOptions, times: SampleTimes, report: Report) -> None:
    is_auto = options.resolution_buckets == "auto"
    buckets = []
    if options.resolution_buckets and not is_auto:
        buckets = parse_buckets(options.resolution_buckets, _SCALE_FACTORS)
    found, problems = raw.find_clips(options.source)
    for item, reason in problems:
        report.fail("rows", item, reason)
    with report.progress(_STAGE, len(found)) as bar:
        clips = raw.probe_clips(found, buckets, options.deep, options.num_workers, bar.advance)
    if is_auto:
        sources = sorted(Source(clip.width, clip.height, clip.frames) for clip in clips if clip.frames)
        proposals = propose_buckets(sources, _SCALE_FACTORS)
        _write_lines(report, explain(proposals))
        buckets = [proposal.bucket for proposal in proposals]
        clips = [raw.with_bucket(clip, buckets) for clip in clips]
    good = [clip for clip in clips if clip.problem is None]
    for clip in clips:
        if clip.problem is None:
            report.add("files", "done")
        else:
            report.fail("files", str(clip.path), clip.problem)
    kinds = Counter(clip.kind for clip in good)
    total_s = sum(clip.duration_s for clip in good)
    header = [
        f"{options.source}: {_counted(kinds)}, {_duration(total_s)}",
        _sentence("sizes", Counter(f"{clip.width}x{clip.height}" for clip in good if clip.width)),
        _sentence("frames per second", Counter(f"{clip.fps:.6g}" for clip in good if clip.fps)),
        _range_sentence("seconds", [clip.duration_s for clip in good if clip.duration_s]),
        _sentence("audio", Counter(clip.audio_format for clip in good if clip.kind != "image")),
    ]
    if buckets:
        header.append(_sentence("buckets", Counter(str(clip.bucket) for clip in good if clip.bucket)))
        header.append(f"unused: {raw.unused_share(good):.0%} of all video is after the frames that a bucket uses")
    _write_lines(report, header)
    if buckets:
        bucketed = [clip for clip in good if clip.bucket is not None]
        _print_buckets(
            [(str(clip.bucket), clip.fps, clip.video_tokens, clip.audio_tokens) for clip in bucketed], times, report
        )
    _note(report, raw.warnings_of(clips, _has_captions(options.source, found)))
    _write_outputs(options, header, clips, raw.sheet_entry, raw.as_record, report)


def _has_captions(source: Path, clips: Sequence[tuple[Path, str | None]]) -> bool:
    return is_table(source) or any(caption is not None for _, caption in clips)


def _inspect_prepared(
    root: Path, folders: Folders, options: InspectOptions, times: SampleTimes, report: Report
) -> None:
    # Of all folders, so that a sample that one of them lacks is reported.
    names = sorted({name for samples in folders.values() for name in samples})
    with report.progress(_STAGE, len(names)) as bar:
        samples = prepared.read_samples(folders, names, options.num_workers, bar.advance)
    good = [sample for sample in samples if not sample.problems]
    for sample in samples:
        if not sample.problems:
            report.add("samples", "done")
        for folder, reason in sample.problems:
            report.fail("samples", f"{folder}/{sample.name}", reason)
    total_s = sum(sample.duration_s for sample in good)
    text = [float(sample.text_tokens) for sample in good if sample.text_tokens]
    header = [
        f"{root}: {len(good)} complete samples of {len(samples)}, {_duration(total_s)}",
        f"folders: {', '.join(folders)}",
        _sentence("frames per second", Counter(f"{sample.fps:.6g}" for sample in good if sample.fps)),
        _range_sentence("seconds", [sample.duration_s for sample in good]),
        _sentence("audio", Counter("with" if sample.has_audio else "without" for sample in good)),
        _range_sentence("text tokens", text) if text else "text: contexts after the connectors",
    ]
    for folder in folders:
        if (found := prepared.statistics_of(folders, folder, good)) is not None:
            mean, std = found
            header.append(f"{folder}: mean {mean:.3f}, standard deviation {std:.3f} (about 0 and 1 for the right VAE)")
    header.append(_sentence("buckets", Counter(sample.bucket for sample in good)))
    _write_lines(report, header)
    _print_buckets([(s.bucket, s.fps, s.video_tokens, s.audio_tokens) for s in good], times, report)
    _note(report, prepared.warnings_of(samples))
    _note(report, stale_samples(root, folders))
    # After the checks: a missing checkpoint should not hide their result.
    decoders = _decoders(options) if options.decode else None

    def entry(sample: InspectedSample) -> Entry:
        return prepared.sheet_entry(sample, folders, decoders)

    _write_outputs(options, header, samples, entry, prepared.as_record, report)


def _note(report: Report, found: Mapping[str, Sequence[str]]) -> None:
    for note, items in found.items():
        for item in items:
            report.note([note], item)


def _print_buckets(rows: Sequence[tuple[str, float, int, int]], times: SampleTimes, report: Report) -> None:
    """Prints a table of equal shapes with their numbers of samples and tokens, and the time of a step."""
    # By tokens and not by frame rate, which changes neither time nor memory of a step.
    groups: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for bucket, fps, video, audio in rows:
        groups[bucket, video, audio].append(fps)
    table = Table(
        "bucket", "samples", "fps", "video tokens", "audio tokens", "s/sample", title="buckets", title_justify="left"
    )
    total_s = 0.0
    # The largest bucket first: it decides how long training takes.
    for (bucket, video, audio), rates in sorted(groups.items(), key=lambda group: -len(group[1])):
        seconds = times.seconds(video, audio)
        total_s += seconds * len(rates)
        shown = ", ".join(sorted({f"{rate:.6g}" for rate in rates if rate})) or "-"
        table.add_row(bucket, str(len(rates)), shown, str(video), str(audio), f"{seconds:.3g}")
    report.console.print(table)
    _write_lines(
        report, [f"an epoch takes about {_duration(total_s)} of GPU time; s/sample assumes {times.assumption}"]
    )


def _write_outputs(
    options: InspectOptions,
    header: Sequence[str],
    items: Sequence[Item],
    entry: Callable[[Item], Entry],
    record: Callable[[Item], Mapping[str, Any]],
    report: Report,
) -> None:
    """Writes the findings and the contact sheet."""
    if options.json is not None:
        write_text(options.json, json_text([record(item) for item in items], indent=1) + "\n")
        report.write(f"findings: {options.json}")
    if options.no_sheet:
        return
    shown = [items[index] for index in evenly_spaced(len(items), options.limit)]
    entries = []
    with report.progress("drawing", len(shown)) as bar:
        for item in shown:
            entries.append(entry(item))
            bar.advance()
    lines = [*header, f"shown: {len(shown)} of {len(items)}"]
    write_sheet(options.sheet, [line for line in lines if line], entries, options.columns)
    report.write(f"contact sheet: {options.sheet}")


def _decoders(options: InspectOptions) -> Decoders:
    if options.model_path is None:
        raise ValueError("--decode needs --model-path: the checkpoint with the VAEs")
    return load_decoders(options.model_path, options.model_path, options.device)


def _write_lines(report: Report, lines: Sequence[str]) -> None:
    for line in lines:
        if line:
            report.write(line)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts.most_common()) or "nothing"


def _sentence(name: str, counts: Counter[str], limit: int = 6) -> str:
    if not counts:
        return ""
    parts = [f"{value} ({count})" for value, count in counts.most_common(limit)]
    more = f", {len(counts) - limit} more" if len(counts) > limit else ""
    return f"{name}: {', '.join(parts)}{more}"


def _range_sentence(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{name}: {min(values):.4g} to {max(values):.4g}, median {statistics.median(values):.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"
