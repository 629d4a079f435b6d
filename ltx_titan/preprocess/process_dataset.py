"""`ltx-titan process-dataset`: clips and captions in, latents and text features out.

One stage is one file, and each loads its encoder, does its part and lets go of it, so that VAE and text encoder never
share a GPU. Videos come first: a caption of a file that cannot be read needs no 12 B text encoder.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ltx_titan.codecs import (
    AudioCodec,
    load_audio_codec,
    load_feature_extractor,
    load_text_encoder,
    load_video_codec,
    open_single_file,
    text_encoder_config,
    video_scale_factors,
)
from ltx_titan.preprocess.buckets import Bucket, parse_buckets
from ltx_titan.preprocess.captions import caption_is_done, process_captions
from ltx_titan.preprocess.report import Report
from ltx_titan.preprocess.rows import Dataset, Sample, read_dataset
from ltx_titan.preprocess.sounds import process_sounds, sound_is_done
from ltx_titan.preprocess.videos import process_videos, video_is_done


@dataclass(frozen=True)
class ProcessOptions:
    """What `process_dataset` is told; the command line has the same names.

    Attributes:
        dataset_path: metadata file (.csv, .json, .jsonl).
        model_path: checkpoint with the text projection, and the VAEs unless they are given.
        text_encoder_path: folder of Gemma 3.
        resolution_buckets: `WxHxF;...`; needed where there are videos.
        output_dir: root of the prepared data; None: `.precomputed` beside the metadata file.
        video_vae_path: file of the video VAE; None: the checkpoint.
        audio_vae_path: file of the audio VAE; None: the checkpoint.
        video_column: column of videos; None: `video` or `media_path`.
        caption_column: column of captions; None: `caption`.
        lora_trigger: word put in front of every caption.
        skip_audio: leave the sound of videos alone.
        device: where the encoders run.
        vae_tiling: encode frames in tiles.
        overwrite: make again what is there.
    """

    dataset_path: Path
    model_path: Path
    text_encoder_path: Path
    resolution_buckets: str | None = None
    output_dir: Path | None = None
    video_vae_path: Path | None = None
    audio_vae_path: Path | None = None
    video_column: str | None = None
    caption_column: str | None = None
    lora_trigger: str | None = None
    skip_audio: bool = False
    device: str = "cpu"
    vae_tiling: bool = False
    overwrite: bool = False


def process_dataset(options: ProcessOptions, console: Console | None = None) -> Report:
    """Prepare a data set; files that cannot be used are named in the report and left out.

    Raises:
        ValueError: the metadata file, the buckets or a checkpoint cannot be used at all.
    """
    report = Report(console or Console())
    dataset = read_dataset(options.dataset_path, options.video_column, options.caption_column)
    output = options.output_dir or options.dataset_path.parent / ".precomputed"
    buckets, time_factor = _check(options, dataset)
    for item, reason in dataset.rejected:
        report.fail("rows", item, reason)

    samples = list(dataset.samples)
    if dataset.has_video:
        # A column of sounds is a choice against the videos' own.
        with_sound = not options.skip_audio and not dataset.has_audio
        samples = _run_stage(
            "videos",
            samples,
            lambda sample: video_is_done(sample, output, with_sound),
            lambda todo: _videos(todo, with_sound, options, buckets, output, report),
            options,
            report,
        )
    if dataset.has_audio:
        without_file = [sample for sample in samples if sample.audio is None]
        samples = without_file + _run_stage(
            "sounds",
            [sample for sample in samples if sample.audio is not None],
            lambda sample: sound_is_done(sample, output),
            lambda todo: process_sounds(todo, output, _audio_codec(options), time_factor, report),
            options,
            report,
        )
    _run_stage(
        "captions",
        samples,
        lambda sample: caption_is_done(sample, output),
        lambda todo: _captions(todo, options, output, report),
        options,
        report,
    )
    return report


def _run_stage(
    stage: str,
    samples: list[Sample],
    is_done: Callable[[Sample], bool],
    process: Callable[[list[Sample]], list[Sample]],
    options: ProcessOptions,
    report: Report,
) -> list[Sample]:
    """Run a stage on what is not there yet; its encoder is loaded only if there is anything. Returns what is usable."""
    usable, todo = [], []
    for sample in samples:
        if not options.overwrite and is_done(sample):
            report.add(stage, "skipped")
            usable.append(sample)
        else:
            todo.append(sample)
    if todo:
        usable += process(todo)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return usable


def _check(options: ProcessOptions, dataset: Dataset) -> tuple[list[Bucket], int]:
    """Everything that can be wrong is found here, before an encoder is loaded; returns buckets and time factor."""
    open_single_file(options.model_path)
    text_encoder_config(options.text_encoder_path)
    factors = video_scale_factors(open_single_file(options.video_vae_path or options.model_path).config)
    if not dataset.has_video:
        return [], factors[0]
    if options.resolution_buckets is None:
        raise ValueError(
            "--resolution-buckets: needed for a data set with videos, as in --resolution-buckets '768x448x89'"
        )
    return parse_buckets(options.resolution_buckets, factors), factors[0]


def _videos(
    samples: list[Sample],
    with_sound: bool,
    options: ProcessOptions,
    buckets: list[Bucket],
    output: Path,
    report: Report,
) -> list[Sample]:
    path = options.video_vae_path or options.model_path
    dtype = _dtype(options.device)
    video_codec = load_video_codec(path, options.device, dtype, part="encoder", tiling=options.vae_tiling)
    audio_codec = _audio_codec(options) if with_sound else None
    return process_videos(samples, output, video_codec, audio_codec, buckets, report)


def _captions(samples: list[Sample], options: ProcessOptions, output: Path, report: Report) -> list[Sample]:
    dtype = _dtype(options.device)
    text_encoder = load_text_encoder(options.text_encoder_path, options.device, dtype)
    extractor = load_feature_extractor(options.model_path, text_encoder, options.device, dtype)
    process_captions(samples, output, text_encoder, extractor, report, options.lora_trigger)
    return samples


def _audio_codec(options: ProcessOptions) -> AudioCodec:
    return load_audio_codec(options.audio_vae_path or options.model_path, options.device, part="encoder")


def _dtype(device: str) -> torch.dtype:
    """Of video VAE and text encoder: results are stored in 16 bits; a CPU computes faster in 32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


DESCRIPTION = """\
Prepare a data set for training: encode videos (or still images), their sound and their captions once, so that training
reads latents and text features instead of running the encoders in every step.

The metadata file has one row per sample (.csv, .json: a list of objects, .jsonl) with the columns
  video or media_path   a video or image, relative to the metadata file's folder
  caption               what is to be seen and heard
  audio                 optional: a sound file, used instead of the video's own sound
A data set of sound only has audio and caption.

Each clip goes to the bucket with the closest aspect ratio that it has enough frames for; it is scaled to cover it,
cut around the centre, and its first frames are taken at its own frame rate. A run that was stopped goes on where it
was. Files that cannot be read are named at the end and left out.

examples:
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "768x448x89;448x768x89" \\
      --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized
  ltx-titan process-dataset photos/dataset.csv --resolution-buckets "960x544x1" --lora-trigger "SKSDOG" ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan process-dataset`."""
    parser.add_argument("dataset_path", type=Path, metavar="DATASET", help="metadata file: .csv, .json or .jsonl")
    parser.add_argument(
        "--resolution-buckets",
        metavar="WxHxF;...",
        help="shapes in pixels and frames; width and height multiples of 32, frames 1, 9, 17, 25, ...; one frame for "
        "still images. Every bucket more makes batches harder to fill",
    )
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint (.safetensors) to be trained")
    parser.add_argument("--text-encoder-path", type=Path, required=True, help="local folder of Gemma 3")
    parser.add_argument("--video-vae-path", type=Path, help="video VAE file of a split pack (default: the checkpoint)")
    parser.add_argument("--audio-vae-path", type=Path, help="audio VAE file of a split pack (default: the checkpoint)")
    parser.add_argument("--output-dir", type=Path, help="where to write (default: .precomputed beside the metadata)")
    parser.add_argument("--video-column", help="column of videos (default: video or media_path)")
    parser.add_argument("--caption-column", help="column of captions (default: caption)")
    parser.add_argument("--lora-trigger", metavar="WORD", help="put this word in front of every caption")
    parser.add_argument("--skip-audio", action="store_true", help="do not encode the sound of videos")
    parser.add_argument(
        "--vae-tiling", action="store_true", help="encode large frames in tiles: less memory, faint seams"
    )
    parser.add_argument("--overwrite", action="store_true", help="encode again what is there already")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the encoders run (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan process-dataset`; the exit status is 1 only where nothing at all could be prepared."""
    options = ProcessOptions(**{name: getattr(arguments, name) for name in ProcessOptions.__dataclass_fields__})
    report = process_dataset(options)
    report.print()
    report.console.print(
        f"prepared data: {options.output_dir or options.dataset_path.parent / '.precomputed'}", highlight=False
    )
    return 0 if report.succeeded() else 1
