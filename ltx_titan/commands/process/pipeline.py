"""The whole preparation: what the options ask for is checked, then one stage runs after the other.

Each stage loads its encoder, does its part and lets go of it, so that VAE and text encoder never share a GPU. Videos
come first: a caption of a file that cannot be read needs no 12 B text encoder. A process does all stages for its share
of the samples, so what a stage needs of an earlier one is there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ltx_titan.codecs import (
    AudioCodec,
    VideoCodec,
    load_audio_codec,
    load_feature_extractor,
    load_text_encoder,
    load_video_codec,
    quantize_text_encoder,
    text_encoder_config,
)
from ltx_titan.commands.process.options import ProcessOptions, parse_durations, parse_fps
from ltx_titan.commands.process.settings import Settings, check_settings, write_settings
from ltx_titan.commands.process.stage import Stage, plan_stage, run_stage
from ltx_titan.commands.process.store import Store
from ltx_titan.commands.report import Report
from ltx_titan.common.ranks import Ranks, join_ranks, own_device
from ltx_titan.encode.audio import AUDIO, REFERENCE_AUDIO, audio_stage
from ltx_titan.encode.buckets import Bucket, parse_buckets
from ltx_titan.encode.captions import TextModels, caption_stage
from ltx_titan.encode.clips import Clip, ClipRules, plan_clip
from ltx_titan.encode.masks import audio_mask_stage, video_mask_stage
from ltx_titan.encode.references import ReferenceScale, reference_stage
from ltx_titan.encode.videos import video_stage
from ltx_titan.media.tables import SampleRow, SampleTable, read_sample_table
from ltx_titan.model.config import caption_projected_before_connector
from ltx_titan.weights import load_text_connectors, scale_factors
from ltx_titan.weights.single_file import open_single_file

_EXTRA_FOLDERS = {
    "reference_video": "reference_latents",
    "reference_audio": "reference_audio_latents",
    "video_mask": "video_masks",
    "audio_mask": "audio_masks",
}


@dataclass(frozen=True)
class _Task:
    """What a run is to do, all of it checked."""

    options: ProcessOptions
    dataset: SampleTable
    rules: ClipRules
    scale: ReferenceScale
    durations_s: tuple[float, ...]
    does_media: bool
    does_captions: bool
    checkpoint: dict[str, Any]

    @property
    def extracts_audio(self) -> bool:
        """A column of audio is a choice against the videos' own."""
        return self.dataset.has_video and not self.options.skip_audio and not self.dataset.has_audio


def process(
    options: ProcessOptions, console: Console | None = None, *, media: bool = True, captions: bool = True
) -> Report:
    """Prepares a data set; files that cannot be used are named in the report and left out.

    Under torchrun each process does its share, and all return the report of the whole.

    Args:
        options: what to do.
        console: where to show progress; the other processes show none.
        media: whether to encode videos, audio, references and masks.
        captions: whether to encode captions.

    Raises:
        ValueError: the metadata file, the options or a checkpoint cannot be used at all.
    """
    with join_ranks() as ranks:
        report = Report((console or Console()) if ranks.is_main else Console(quiet=True))
        task = _check(options, media, captions)
        store = Store(options.root, task.dataset.samples, _folders(task), options.shard_size)
        settings = _settings(task)
        if not options.overwrite:
            check_settings(options.root, settings)
        if ranks.is_main:
            _report_start(task, store, ranks, report)
        if options.dry_run:
            # Headers only: not worth sharing.
            mine = task.dataset.samples if ranks.is_main else ()
        else:
            ranks.wait()  # until all have seen what was there before
            if ranks.is_main:
                store.clean()
                write_settings(options.root, settings)
            ranks.wait()
            mine = store.share(task.dataset.samples, ranks.rank, ranks.world_size)
        _run_stages(task, mine, store, report)
        tallies = ranks.gather(report.tally())
        report.merge(tally for rank, tally in enumerate(tallies) if rank != ranks.rank)
        return report


def _run_stages(task: _Task, samples: Iterable[SampleRow], store: Store, report: Report) -> None:
    options, dataset = task.options, task.dataset
    run = partial(
        plan_stage if options.dry_run else run_stage,
        store=store,
        report=report,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
    )
    samples = list(samples)
    clip_of = partial(_clip_of, store=store, rules=task.rules)

    def run_on(stage: Stage, has_file: Callable[[SampleRow], bool]) -> list[SampleRow]:
        """Runs a stage on the samples that have its file; returns all but those that failed."""
        todo = [sample for sample in samples if has_file(sample)]
        if without := len(samples) - len(todo):
            report.notes[f"rows without a file for {stage.name}"] += without
        usable = {sample.key for sample in run(stage, todo)}
        return [sample for sample in samples if sample.key in usable or not has_file(sample)]

    if task.does_media:
        load_video, load_audio = _codec_loaders(options)
        if dataset.has_video:
            samples = run(
                video_stage(task.rules, report, load_video, load_audio if task.extracts_audio else None), samples
            )
        clip_duration_s = (lambda sample: clip_of(sample).duration_s) if dataset.has_video else None
        if dataset.has_audio:
            stage = audio_stage(AUDIO, load_audio, clip_duration_s, task.durations_s)
            samples = run_on(stage, lambda sample: sample.audio is not None)
        extras = {
            "reference_video": lambda: reference_stage(task.rules, task.scale, report, clip_of, load_video),
            "reference_audio": lambda: audio_stage(REFERENCE_AUDIO, load_audio, clip_duration_s, task.durations_s),
            "video_mask": lambda: video_mask_stage(task.rules, clip_of),
            "audio_mask": lambda: audio_mask_stage(partial(_audio_steps, store=store)),
        }
        for column in dataset.extras:
            # A sample without one of them is of use to jobs that do not ask for it.
            run_on(extras[column](), lambda sample, column=column: column in sample.extras)
    if task.does_captions:
        loader = partial(_load_text_models, options)
        stage = caption_stage(loader, _text_bytes(task), options.lora_trigger, options.remove_llm_prefixes)
        run(stage, samples)


def _check(options: ProcessOptions, media: bool, captions: bool) -> _Task:
    """Everything that can be wrong is found here, before an encoder is loaded."""
    dataset = read_sample_table(options.dataset_path, options.video_column, options.caption_column, captions)
    checkpoint = open_single_file(options.model_path).config
    if captions:
        if options.text_encoder_path is None:
            raise ValueError("--text-encoder-path: needed to encode captions")
        text_encoder_config(options.text_encoder_path)
    for name, least in (("shard_size", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} = {value}: expected {least} or more")
    if not media:
        return _Task(options, dataset, ClipRules((), (1, 1, 1)), ReferenceScale(), (), media, captions, checkpoint)
    factors = scale_factors(open_single_file(options.video_vae_path or options.model_path).config)
    if dataset.has_video and options.resolution_buckets is None:
        raise ValueError(
            "--resolution-buckets: needed for a data set with videos, as in --resolution-buckets '768x448x89'"
        )
    buckets = parse_buckets(options.resolution_buckets, factors) if dataset.has_video else []
    rules = ClipRules(buckets, factors, parse_fps(options.fps), options.reshape_mode)
    scale = ReferenceScale(options.reference_downscale_factor, options.reference_temporal_scale_factor)
    scale.check(rules)
    durations_s = parse_durations(options.audio_durations)
    if durations_s and dataset.has_video:
        raise ValueError("--audio-durations: the videos say how long audio are; leave it out")
    for column in ("reference_video", "video_mask"):
        if column in dataset.extras and not dataset.has_video:
            raise ValueError(f"{options.dataset_path}: has a column {column!r}, but none of videos that it goes with")
    return _Task(options, dataset, rules, scale, durations_s, media, captions, checkpoint)


def _folders(task: _Task) -> list[str]:
    """Source folders that the run reads or writes."""
    folders = []
    if task.does_media:
        folders += ["latents"] if task.dataset.has_video else []
        # Audio masks belong to audio that may have been made before.
        folders += ["audio_latents"] if not task.options.skip_audio or task.dataset.has_audio else []
        folders += [_EXTRA_FOLDERS[column] for column in task.dataset.extras]
        folders += ["audio_latents"] if "audio_mask" in task.dataset.extras else []
    return [*dict.fromkeys(folders), *(["conditions"] if task.does_captions else [])]


def _settings(task: _Task) -> Settings:
    """What the samples of each folder depend on, for the note in the data root."""
    options = task.options
    rules = {
        "resolution_buckets": sorted(str(bucket) for bucket in task.rules.buckets),
        "fps": None if task.rules.fps is None else str(task.rules.fps),
        "reshape_mode": task.rules.reshape,
    }
    video = {**rules, "video_vae": (options.video_vae_path or options.model_path).name}
    audio = {
        **(rules if task.dataset.has_video else {"audio_durations": list(task.durations_s)}),
        "audio_vae": (options.audio_vae_path or options.model_path).name,
        "from_videos": task.extracts_audio,
    }
    scale = {"downscale": task.scale.space, "temporal_scale": task.scale.time}
    captions = {
        "model": options.model_path.name,
        "text_encoder": options.text_encoder_path.name if options.text_encoder_path else None,
        "precision": options.text_encoder_precision,
        "lora_trigger": (options.lora_trigger or "").strip() or None,
        "remove_llm_prefixes": options.remove_llm_prefixes,
        "form": "contexts" if options.contexts else "features",
    }
    every = {
        "latents": video,
        "audio_latents": audio,
        "reference_latents": {**video, **scale},
        "reference_audio_latents": {key: value for key, value in audio.items() if key != "from_videos"},
        "video_masks": rules,
        "conditions": captions,
    }
    writes_audio = task.extracts_audio or task.dataset.has_audio
    return {
        folder: every[folder]
        for folder in _folders(task)
        if folder in every and (folder != "audio_latents" or writes_audio)
    }


def _report_start(task: _Task, store: Store, ranks: Ranks, report: Report) -> None:
    for item, reason in task.dataset.rejected:
        report.fail("rows", item, reason)
    for path in store.damaged:
        report.notes[f"damaged shard, made again: {path}"] += 1
    if task.options.shard_size and store.num_groups() < ranks.world_size:
        report.notes["processes without work; a smaller --shard-size would give them some"] += (
            ranks.world_size - store.num_groups()
        )


def _clip_of(sample: SampleRow, store: Store, rules: ClipRules) -> Clip:
    """Shape of a sample's clip: that of its latents, or what it will be where they are not there yet."""
    if not store.has("latents", sample.key):
        assert sample.video is not None
        return plan_clip(sample.video, rules)
    fields = store.read("latents", sample.key)
    time, down, right = rules.scale_factors
    bucket = Bucket(fields["width"] * right, fields["height"] * down, (fields["num_frames"] - 1) * time + 1)
    return Clip(bucket, Fraction(fields["fps"]).limit_denominator(100_000))


def _audio_steps(sample: SampleRow, store: Store) -> int | None:
    if not store.has("audio_latents", sample.key):
        return None
    return int(store.read("audio_latents", sample.key)["num_time_steps"])


def _codec_loaders(options: ProcessOptions) -> tuple[Callable[[], VideoCodec], Callable[[], AudioCodec]]:
    def load_video() -> VideoCodec:
        device, path = own_device(options.device), options.video_vae_path or options.model_path
        return load_video_codec(path, device, _dtype(device), part="encoder", tiling=options.vae_tiling)

    def load_audio() -> AudioCodec:
        return load_audio_codec(
            options.audio_vae_path or options.model_path, own_device(options.device), part="encoder"
        )

    return load_video, load_audio


def _load_text_models(options: ProcessOptions) -> TextModels:
    device = own_device(options.device)
    dtype = _dtype(device)
    assert options.text_encoder_path is not None
    # Whole only on the host where it is to be quantised: the device may be too small for it.
    loads_on = device if options.text_encoder_precision == "full" else "cpu"
    encoder = load_text_encoder(options.text_encoder_path, loads_on, dtype)
    encoder = quantize_text_encoder(encoder, options.text_encoder_precision, device)
    extractor = load_feature_extractor(options.model_path, encoder, device, dtype)
    if not options.contexts:
        return TextModels(encoder, extractor, None)
    connectors = load_text_connectors(options.model_path, device, dtype)
    if not connectors.fills_padding:
        raise ValueError(f"{options.model_path}: its connectors keep padding; leave --contexts out")
    return TextModels(encoder, extractor, connectors)


def _text_bytes(task: _Task) -> int:
    """Size of a caption's file: 1,024 tokens for both streams, in 16 bits."""
    transformer = task.checkpoint.get("transformer") or {}
    widths = [transformer.get("cross_attention_dim", 4096), transformer.get("audio_cross_attention_dim", 2048)]
    if not caption_projected_before_connector(transformer):
        widths = [transformer.get("caption_channels", 3840)] * 2
    return 1024 * sum(widths) * 2


def _dtype(device: str) -> torch.dtype:
    """Of video VAE and text encoder: results are stored in 16 bits; a CPU computes faster in 32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def report_and_status(report: Report, title: str, root: Path) -> int:
    """Prints a report; returns the exit status, 1 only where nothing at all could be prepared."""
    report.print(title)
    if not report.plans:
        report.console.print(f"prepared data: {root}", highlight=False, soft_wrap=True)
    return 0 if report.succeeded() else 1
