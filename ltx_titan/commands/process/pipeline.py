"""The whole preparation: checks the options, then runs one stage after the other.

Videos come first: the caption of a file that cannot be read needs no 12 B text encoder. A process runs all stages on
its share of the rows, so the outputs that a later stage needs of an earlier one are always stored.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from ltx_titan.codecs import text_encoder_config
from ltx_titan.commands.process.changes import Changes, report_changes
from ltx_titan.commands.process.loop import Run, Stage, run_stages
from ltx_titan.commands.process.options import (
    CaptionOptions,
    DataOptions,
    MediaOptions,
    parse_durations,
    parse_fps,
)
from ltx_titan.commands.process.stages import (
    AudioMaskStage,
    AudioStage,
    CaptionStage,
    ReferenceAudioStage,
    ReferenceVideoStage,
    Targets,
    VideoMaskStage,
    VideoStage,
)
from ltx_titan.commands.process.store import Settings, Store
from ltx_titan.commands.process.windows import with_stored_windows, with_windows
from ltx_titan.commands.report import Report
from ltx_titan.common.ranks import Ranks, check_device, join_ranks
from ltx_titan.data.fingerprints import model_digest
from ltx_titan.encode.buckets import Bucket, parse_buckets
from ltx_titan.encode.captions import text_bytes
from ltx_titan.encode.clips import ClipRules, read_header
from ltx_titan.encode.encoders import EncoderFiles
from ltx_titan.encode.propose_buckets import Source, explain, propose_buckets
from ltx_titan.encode.references import ReferenceScale
from ltx_titan.encode.windows import parse_windows
from ltx_titan.media import MediaError
from ltx_titan.tables.samples import SampleRow, SampleTable, read_sample_table, split_window_key, table_folder
from ltx_titan.weights import read_config, scale_factors

# Column -> folder of its output.
_EXTRA_FOLDERS = {
    "reference_video": "reference_latents",
    "reference_audio": "reference_audio_latents",
    "video_mask": "video_masks",
    "audio_mask": "audio_masks",
}


@dataclass(frozen=True)
class _Task:
    """The checked work of a run."""

    data: DataOptions
    media: MediaOptions | None
    captions: CaptionOptions | None
    table: SampleTable
    files: EncoderFiles
    checkpoint: dict[str, Any]
    rules: ClipRules
    scale: ReferenceScale
    durations_s: tuple[float, ...]

    @property
    def extracts_audio(self) -> bool:
        """Whether the audio of videos is encoded; a column of audio replaces it."""
        if self.media is None or self.media.skip_audio:
            return False
        return self.table.has_video and not self.table.has_audio

    @property
    def unused_folders(self) -> list[str]:
        """Source folders that exist for columns which the table does not have (any more)."""
        if self.media is None:
            return []
        others = [folder for column, folder in _EXTRA_FOLDERS.items() if column not in self.table.extras]
        return [folder for folder in others if (self.data.root / folder).is_dir()]

    @property
    def folders(self) -> list[str]:
        """Source folders that the run reads or writes."""
        folders = []
        if self.media is not None:
            if self.table.has_video:
                folders.append("latents")
            if not self.media.skip_audio or self.table.has_audio:
                folders.append("audio_latents")
            folders += [_EXTRA_FOLDERS[column] for column in self.table.extras]
            # Audio masks take the shape of audio that an earlier run may have made.
            if "audio_mask" in self.table.extras and "audio_latents" not in folders:
                folders.append("audio_latents")
        if self.captions is not None:
            folders.append("conditions")
        return folders


def process(
    data: DataOptions,
    media: MediaOptions | None = None,
    captions: CaptionOptions | None = None,
    console: Console | None = None,
) -> Report:
    """Prepares a dataset; files that cannot be used are reported and skipped.

    Under torchrun each process does its share, and all return the report of the whole.

    Args:
        data: the dataset and its output.
        media: encodes videos, audio, references and masks; None does not.
        captions: encodes captions; None does not.
        console: shows progress; only on the main process.

    Raises:
        ValueError: the table, the options or a checkpoint cannot be used at all.
    """
    with join_ranks() as ranks:
        report = Report((console or Console()) if ranks.is_main else Console(quiet=True))
        task = _check(data, media, captions, ranks)
        store = Store(
            data.root,
            task.table.samples,
            task.folders + task.unused_folders,
            _settings(task),
            table=_table_description(task),
            shard_size=data.shard_size,
            other_options=data.overwrite or data.overwrite_changed,
            rank=ranks.rank,
        )
        if ranks.is_main:
            for item, reason in task.table.rejected:
                report.fail("rows", item, reason)
            for row in task.table.samples:
                if row.start:
                    report.note(["samples that start later in their video (--windows)"], row.key.as_posix())
            for path in store.damaged:
                report.notes[f"damaged shard, made again: {path}"] += 1
            idle = ranks.world_size - store.num_groups()
            if data.shard_size and idle > 0:
                report.notes["processes without work; a smaller --shard-size would give them some"] += idle
        if data.dry_run:
            # Headers only: not worth sharing.
            rows = list(task.table.samples) if ranks.is_main else []
        else:
            rows = store.begin(task.table.samples, ranks)
        changes, stages = Changes(store, data.dataset_path), _stages(task, store)
        orphans = changes.orphans(stages, task.table.samples, task.unused_folders) if ranks.is_main else {}
        if not data.overwrite:
            changes.compare(stages, rows, data.dry_run)
        if ranks.is_main:
            if not data.dry_run:
                for folder, keys in orphans.items():
                    store.fingerprints[folder].mark(keys, "orphan")
            _report_orphans(orphans, task, report)
        report_changes(ranks.gather(changes.notes), ranks, report)
        run_stages(stages, rows, Run(store, changes, report, data.num_workers, data.overwrite, data.dry_run))
        tallies = ranks.gather(report.tally())
        report.merge(tally for rank, tally in enumerate(tallies) if rank != ranks.rank)
        # After all ranks have recorded their last sample.
        if ranks.is_main and not data.dry_run:
            store.finish(orphans, data.prune)
        return report


def report_and_status(report: Report, title: str, data: DataOptions) -> int:
    """Prints a report; returns the exit status, 1 if nothing at all could be prepared, or anything with `--strict`."""
    report.print(title)
    if not report.plans:
        report.console.print(f"prepared data: {data.root}", highlight=False, soft_wrap=True)
    return report.status(data.strict)


def _report_orphans(orphans: Mapping[str, Sequence[str]], task: _Task, report: Report) -> None:
    """Notes the samples that no row asks for; a dry run that would remove them lists their files."""
    what = "removed" if task.data.prune else "kept out of training (--prune removes them)"
    together: dict[tuple[str, ...], list[str]] = {}
    for folder, keys in orphans.items():
        # Of a removed row, all folders have the same samples.
        if keys:
            together.setdefault(tuple(keys), []).append(folder)
    for keys, folders in together.items():
        is_windowed = task.media is not None and task.media.windows != "1"
        reason = " or its windows" if is_windowed or any(split_window_key(key)[1] for key in keys) else ""
        note = f"{', '.join(folders)}: no longer in {task.data.dataset_path.name}{reason}, {what}"
        for key in keys:
            report.note([note], key)
        if task.data.prune and task.data.dry_run:
            for folder in folders:
                for key in keys:
                    report.write(f"would be removed: {task.data.root / folder / key}")


def _stages(task: _Task, store: Store) -> list[Stage[Any, Any]]:
    """The stages of a run: the columns of main files, their extras, then captions."""
    rules, files, device = task.rules, task.files, task.data.device
    stages: list[Stage[Any, Any]] = []
    if task.media is not None:
        targets, layout = Targets(store, rules), task.media.reference_layout
        # Without videos there is no clip whose duration audio could follow.
        audio_targets = targets if task.table.has_video else None
        if task.table.has_video:
            stages.append(VideoStage(rules, files, device, task.extracts_audio, layout))
        if task.table.has_audio:
            stages.append(AudioStage(files, device, audio_targets, task.durations_s, layout))
        extras: dict[str, Callable[[], Stage[Any, Any]]] = {
            "reference_video": lambda: ReferenceVideoStage(rules, task.scale, files, device, targets),
            "reference_audio": lambda: ReferenceAudioStage(files, device, audio_targets, task.durations_s, layout),
            "video_mask": lambda: VideoMaskStage(rules, targets),
            "audio_mask": lambda: AudioMaskStage(targets),
        }
        stages += [extras[column]() for column in task.table.extras]
    if task.captions is not None:
        stages.append(
            CaptionStage(
                files=files,
                device=device,
                precision=task.captions.precision,
                size_bytes=text_bytes(task.checkpoint.get("transformer") or {}),
                trigger=task.captions.lora_trigger,
                removes_prefixes=task.captions.remove_llm_prefixes,
                with_contexts=task.captions.contexts,
            )
        )
    return stages


def _check(data: DataOptions, media: MediaOptions | None, captions: CaptionOptions | None, ranks: Ranks) -> _Task:
    """Finds all errors of a run before an encoder is loaded."""
    caption_column = captions.caption_column if captions else None
    table = read_sample_table(data.dataset_path, data.video_column, caption_column, captions is not None)
    check_device(data.device)
    checkpoint = read_config(data.model_path)
    if captions is not None:
        text_encoder_config(captions.text_encoder_path)
    if data.shard_size is not None and data.shard_size < 1:
        raise ValueError(f"--shard-size = {data.shard_size}: expected 1 or more")
    if data.num_workers < 0:
        raise ValueError(f"--num-workers = {data.num_workers}: expected 0 or more")
    if media is not None and media.reference_layout:
        for option, is_set in (("--shard-size", data.shard_size), ("--contexts", captions and captions.contexts)):
            if is_set:
                raise ValueError(
                    f"--reference-layout: Lightricks' trainer cannot read files of {option}; omit one of the two"
                )
    files = EncoderFiles(
        checkpoint=data.model_path,
        text_encoder=captions.text_encoder_path if captions else None,
        video_vae=media.video_vae_path if media else None,
        audio_vae=media.audio_vae_path if media else None,
        vae_tiling=media.vae_tiling if media else False,
    )
    if media is None:
        # Captions alone: no rule of clips is ever read.
        rules = ClipRules(buckets=(), scale_factors=(1, 1, 1))
        table = with_stored_windows(table, data.root)
        return _Task(data, media, captions, table, files, checkpoint, rules, ReferenceScale(), ())
    windows = parse_windows(media.windows, media.window_stride)
    factors = scale_factors(read_config(files.video_path))
    buckets: list[Bucket] = []
    if table.has_video:
        if media.resolution_buckets is None:
            raise ValueError(
                "--resolution-buckets: needed for a dataset with videos, as in --resolution-buckets '768x448x89'"
            )
        if media.resolution_buckets == "auto":
            buckets = _proposed_buckets(table.samples, factors, parse_fps(media.fps), ranks)
        else:
            buckets = parse_buckets(media.resolution_buckets, factors)
    rules = ClipRules(buckets, factors, parse_fps(media.fps), media.reshape_mode, *_limits(media), windows)
    scale = ReferenceScale(media.reference_downscale_factor, media.reference_temporal_scale_factor)
    scale.check(rules)
    durations_s = parse_durations(media.audio_durations)
    if durations_s and table.has_video:
        raise ValueError("--audio-durations: the clips of the videos specify the duration of audio; omit it")
    for column in ("reference_video", "video_mask"):
        if column in table.extras and not table.has_video:
            raise ValueError(f"{data.dataset_path}: has a column {column!r}, but no column of videos for it")
    if not windows.is_first:
        if not table.has_video:
            raise ValueError(f"--windows {media.windows}: {data.dataset_path} has no column of videos; omit it")
        if "audio_mask" in table.extras:
            raise ValueError(
                f"--windows {media.windows}: {data.dataset_path} has a column 'audio_mask', and an audio mask spans a "
                "whole sample, whatever its window; cut the clips (ltx-titan split-scenes), or remove the column"
            )
        table = with_windows(table, rules, data.root, ranks)
    return _Task(data, media, captions, table, files, checkpoint, rules, scale, durations_s)


def _proposed_buckets(
    rows: Sequence[SampleRow], factors: tuple[int, int, int], fps: Fraction | None, ranks: Ranks
) -> list[Bucket]:
    """Buckets for `--resolution-buckets auto`, which are explained; every process reads its share of the headers."""
    sources = []
    videos = [row.video for row in rows if row.video is not None]
    for path in videos[ranks.rank :: ranks.world_size]:
        # A file that cannot be read is rejected later, with its reason.
        with suppress(MediaError, OSError):
            header = read_header(path)
            frames = header.frames if fps is None or header.frames == 1 else int(header.frames * fps / header.fps)
            sources.append(Source(header.width, header.height, max(frames, 1)))
    # Sorted: the order of the buckets must not depend on the number of processes.
    proposals = propose_buckets(sorted(source for share in ranks.gather(sources) for source in share), factors)
    if ranks.is_main:
        print("\n".join(explain(proposals)))
    return [proposal.bucket for proposal in proposals]


def _table_description(task: _Task) -> dict[str, Any]:
    """Path and columns of the table, by which later commands find it."""
    table, root = Path(os.path.abspath(task.data.dataset_path)), Path(os.path.abspath(task.data.root))
    # Relative if they would be moved together.
    path = os.path.relpath(table, root) if root.is_relative_to(table_folder(table)) else str(table)
    caption_column = task.captions.caption_column if task.captions else None
    columns = {"video_column": task.data.video_column, "caption_column": caption_column}
    return {"path": path} | {name: column for name, column in columns.items() if column is not None}


def _limits(media: MediaOptions) -> tuple[float, float]:
    """Limits of enlargement and cropping; those that exclude nothing without the options."""
    if media.max_enlargement is not None and not media.max_enlargement > 0:
        raise ValueError(f"--max-enlargement = {media.max_enlargement}: expected a factor above 0")
    if media.max_crop is not None and not 0 <= media.max_crop <= 1:
        raise ValueError(f"--max-crop = {media.max_crop}: expected a share of the area, 0 to 1")
    enlargement = inf if media.max_enlargement is None else media.max_enlargement
    return enlargement, 1.0 if media.max_crop is None else media.max_crop


def _settings(task: _Task) -> Settings:
    """Options that the samples of each folder depend on, for the note in the data root."""
    settings: Settings = {}
    rules = {
        # Sorted: the order in which buckets are listed changes no sample.
        "resolution_buckets": sorted(str(bucket) for bucket in task.rules.buckets),
        "fps": None if task.rules.fps is None else str(task.rules.fps),
        "reshape_mode": task.rules.reshape,
    }
    digests = _model_digests(task)
    video = {**rules, "video_vae": task.files.video_path.name, "video_vae_digest": digests.get("video_vae")}
    audio = {
        **(rules if task.table.has_video else {"audio_durations": list(task.durations_s)}),
        "audio_vae": task.files.audio_path.name,
        "audio_vae_digest": digests.get("audio_vae"),
        "reference_layout": task.media is not None and task.media.reference_layout,
    }
    # Names of the files rather than paths: a dataset may be continued on another machine.
    settings["latents"] = video
    if task.extracts_audio or task.table.has_audio:
        settings["audio_latents"] = {**audio, "from_videos": task.extracts_audio}
    settings["reference_latents"] = {**video, "downscale": task.scale.space, "temporal_scale": task.scale.time}
    settings["reference_audio_latents"] = audio
    settings["video_masks"] = rules
    if task.captions is not None:
        settings["conditions"] = {
            "model": task.files.checkpoint.name,
            "model_digest": digests["model"],
            "text_encoder": task.captions.text_encoder_path.name,
            "text_encoder_digest": digests["text_encoder"],
            "precision": task.captions.precision,
            "lora_trigger": (task.captions.lora_trigger or "").strip() or None,
            "remove_llm_prefixes": task.captions.remove_llm_prefixes,
            "form": "contexts" if task.captions.contexts else "features",
        }
    return {folder: settings[folder] for folder in task.folders if folder in settings}


def _model_digests(task: _Task) -> dict[str, str]:
    """Digests of the models that encode: another file of the same name gives other latents."""
    paths: dict[str, Path] = {}
    if task.media is not None:
        paths |= {"video_vae": task.files.video_path, "audio_vae": task.files.audio_path}
    if task.captions is not None:
        paths |= {"model": task.files.checkpoint, "text_encoder": task.captions.text_encoder_path}
    return {name: model_digest(path) for name, path in paths.items()}
