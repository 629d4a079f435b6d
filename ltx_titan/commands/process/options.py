"""What the `process-*` commands can be told; one dataclass and one set of command-line options for all of them."""

import argparse
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import get_args

import torch

from ltx_titan.codecs import TextPrecision
from ltx_titan.encode.clips import Reshape


@dataclass(frozen=True)
class ProcessOptions:
    """Options of the preparation; the command line has the same names.

    Attributes:
        dataset_path: metadata file (.csv, .json, .jsonl).
        model_path: checkpoint with the text projection, and the VAEs unless they are given.
        text_encoder_path: the text encoder; needed for captions.
        resolution_buckets: `WxHxF;...`; needed where there are videos.
        output_dir: root of the prepared data; None: `.precomputed` beside the metadata file.
        video_vae_path: file of the video VAE; None: the checkpoint.
        audio_vae_path: file of the audio VAE; None: the checkpoint.
        video_column: column of videos; None: `video` or `media_path`.
        caption_column: column of captions; None: `caption`.
        fps: rate that videos are read at, as `24` or `24000/1001`; None: each one's own.
        reshape_mode: where what does not fit a bucket is cut off.
        skip_audio: leave the audio of videos alone.
        audio_durations: `2.0;4.0;...` seconds that audio are cut to in a data set without videos.
        reference_downscale_factor: how much smaller reference videos are than their targets.
        reference_temporal_scale_factor: how many times fewer frames they have.
        lora_trigger: word put in front of every caption.
        remove_llm_prefixes: take phrases such as "The video shows" off captions.
        contexts: store what comes out of the text connectors instead of what goes into them.
        text_encoder_precision: form of the text encoder's weights.
        shard_size: samples per file; None: a `.pt` file for each.
        num_workers: threads that read files ahead.
        device: where the encoders run.
        vae_tiling: encode frames in tiles.
        overwrite: make again what is there.
        dry_run: only report what would be done.
    """

    dataset_path: Path
    model_path: Path
    text_encoder_path: Path | None = None
    resolution_buckets: str | None = None
    output_dir: Path | None = None
    video_vae_path: Path | None = None
    audio_vae_path: Path | None = None
    video_column: str | None = None
    caption_column: str | None = None
    fps: str | None = None
    reshape_mode: Reshape = "center"
    skip_audio: bool = False
    audio_durations: str | None = None
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1
    lora_trigger: str | None = None
    remove_llm_prefixes: bool = False
    contexts: bool = False
    text_encoder_precision: TextPrecision = "full"
    shard_size: int | None = None
    num_workers: int = 2
    device: str = "cpu"
    vae_tiling: bool = False
    overwrite: bool = False
    dry_run: bool = False

    @property
    def root(self) -> Path:
        """Where the prepared data go."""
        return self.output_dir or self.dataset_path.parent / ".precomputed"

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "ProcessOptions":
        """The options of a command line; what a command does not have keeps its default."""
        given = vars(arguments)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def parse_fps(text: str | None) -> Fraction | None:
    """A frame rate: `24`, `23.976` or `24000/1001`.

    Raises:
        ValueError: text of another form, or no positive number.
    """
    if text is None:
        return None
    try:
        fps = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if fps <= 0:
        raise ValueError(f"--fps = {text!r}: expected a positive number or fraction, as 24, 23.976 or 24000/1001")
    return fps


def parse_durations(text: str | None) -> tuple[float, ...]:
    """Seconds, `2.0;4.0;8.0`; none for None.

    Raises:
        ValueError: text of another form, or no positive numbers.
    """
    if text is None:
        return ()
    try:
        seconds = tuple(float(part) for part in text.split(";") if part.strip())
    except ValueError:
        seconds = ()
    if not seconds or not all(0 < duration < float("inf") for duration in seconds):
        raise ValueError(f"--audio-durations = {text!r}: expected positive seconds, as in '2.0;4.0;8.0'")
    return seconds


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every `process-*` command."""
    parser.add_argument("dataset_path", type=Path, metavar="DATASET", help="metadata file: .csv, .json or .jsonl")
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint (.safetensors) to be trained")
    parser.add_argument(
        "--output-dir", type=Path, help="root of the prepared data (default: .precomputed beside the metadata file)"
    )
    parser.add_argument(
        "--video-column", metavar="NAME", help="column of videos (default: video or media_path); samples are named so"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="put N samples into each file instead of writing one file for each: for sets of 100,000 clips and more. "
        "64 is a good number; training reads either form. GPUs share whole shards",
    )
    parser.add_argument(
        "--num-workers", type=int, default=2, help="threads that decode files ahead of the encoder (default: 2)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make again what is there already")
    parser.add_argument(
        "--dry-run", action="store_true", help="load no model, write nothing: report what would be done, and what not"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the encoders run (default: cuda if there is one; under torchrun each process takes its own GPU)",
    )


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that encode videos and audio."""
    group = parser.add_argument_group("videos and audio")
    group.add_argument(
        "--resolution-buckets",
        metavar="WxHxF;...",
        help="shapes in pixels and frames; width and height multiples of 32, frames 1, 9, 17, 25, ...; one frame for "
        "still images. Every bucket more makes batches harder to fill",
    )
    group.add_argument(
        "--fps",
        metavar="RATE",
        help="read every video at this rate (24, 23.976, 24000/1001), by dropping or repeating frames; needed for "
        "phone videos of varying rate (default: the rate of each video, which the model is told)",
    )
    group.add_argument(
        "--reshape-mode",
        choices=get_args(Reshape),
        default="center",
        help="where what does not fit the bucket is cut off; random: at a place that differs between samples",
    )
    group.add_argument("--skip-audio", action="store_true", help="do not encode the audio of videos")
    group.add_argument(
        "--audio-durations",
        metavar="S;...",
        help="without videos: cut each audio to the longest of these seconds that it reaches, as in '2.0;4.0;8.0'; "
        "equal lengths can share a batch (default: encode each as long as it is)",
    )
    group.add_argument(
        "--reference-downscale-factor", type=int, default=1, metavar="N", help="make reference videos N times smaller"
    )
    group.add_argument(
        "--reference-temporal-scale-factor",
        type=int,
        default=1,
        metavar="N",
        help="keep every N-th frame of reference videos, after the first",
    )
    group.add_argument("--video-vae-path", type=Path, help="video VAE file of a split pack (default: the checkpoint)")
    group.add_argument("--audio-vae-path", type=Path, help="audio VAE file of a split pack (default: the checkpoint)")
    group.add_argument(
        "--vae-tiling", action="store_true", help="encode large frames in tiles: less memory, faint seams"
    )


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that encode captions."""
    group = parser.add_argument_group("captions")
    group.add_argument("--text-encoder-path", type=Path, required=True, help="local folder of Gemma 3")
    group.add_argument("--caption-column", metavar="NAME", help="column of captions (default: caption)")
    group.add_argument("--lora-trigger", metavar="WORD", help="put this word in front of every caption")
    group.add_argument(
        "--remove-llm-prefixes",
        action="store_true",
        help="take 'The video shows', 'Caption:' and the like off captions",
    )
    group.add_argument(
        "--contexts",
        action="store_true",
        help="store contexts, as they leave the text connectors, so that training needs no connectors in memory (4 GB "
        "for LTX-2.3); other trainers do not read them",
    )
    group.add_argument(
        "--text-encoder-precision",
        choices=get_args(TextPrecision),
        default="full",
        help="form of the text encoder's weights: full 24 GB, int8 or float8 13 GB, int4 8 GB of GPU memory; less is "
        "less exact",
    )
    group.add_argument(
        "--load-text-encoder-in-8bit",
        action="store_const",
        dest="text_encoder_precision",
        const="int8",
        help="the same as --text-encoder-precision int8",
    )
