"""`ltx-titan process-dataset`: clips and captions in, latents and text features out."""

import argparse

from rich.console import Console

from ltx_titan.commands.process.options import (
    ProcessOptions,
    add_caption_arguments,
    add_common_arguments,
    add_media_arguments,
)
from ltx_titan.commands.process.pipeline import process, report_and_status
from ltx_titan.commands.report import Report

DESCRIPTION = """\
Prepare a data set for training: encode videos (or still images), their audio and their captions once, so that training
reads latents and text features instead of running the encoders in every step.

The metadata file has one row per sample (.csv, .json: a list of objects, .jsonl). Paths are relative to its folder.
  video or media_path   a video or image                                   -> latents/, audio_latents/
  caption               what is to be seen and heard                       -> conditions/
  audio                 an audio file, used instead of the video's own      -> audio_latents/
  reference_video       for in-context training: an edge video, a sketch   -> reference_latents/
  reference_audio       likewise, a voice                                  -> reference_audio_latents/
  video_mask            image or video, white = given, black = generated   -> video_masks/
  audio_mask            audio (loud = given) or .pt tensor                 -> audio_masks/
A data set of audio only has audio and caption. Columns that are not there are not needed.

Each clip goes to the bucket with the closest aspect ratio that it has enough frames for; it is scaled to cover it,
cut around the centre, and its first frames are taken at its own frame rate. Files that cannot be read are named at the
end and left out.

A run that was stopped, by whatever, goes on where it was when it is started again. Several GPUs: start the same command
under torchrun, each process then has its own and does its share.

examples:
  # what would happen, per bucket, and what would be left out and why; loads no model
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "768x448x89;448x768x89" --dry-run \\
      --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized
  # on all eight GPUs of a machine
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-dataset clips/dataset.jsonl ...
  # still images for a LoRA with a trigger word
  ltx-titan process-dataset photos/dataset.csv --resolution-buckets "960x544x1" --lora-trigger "SKSDOG" ...
  # phone videos of varying frame rate; a 24 GB GPU
  ltx-titan process-dataset phone/dataset.csv --resolution-buckets "768x448x89" --fps 24 \\
      --text-encoder-precision int8 --vae-tiling ...
  # half a million clips: few large files, finished contexts
  torchrun ... process-dataset big/dataset.jsonl --shard-size 64 --contexts ...
"""


def process_dataset(options: ProcessOptions, console: Console | None = None) -> Report:
    """Prepares everything that the columns of a metadata file ask for; see `pipeline.process`."""
    return process(options, console)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan process-dataset`."""
    add_common_arguments(parser)
    add_media_arguments(parser)
    add_caption_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan process-dataset`; the exit status is 1 only where nothing at all could be prepared."""
    options = ProcessOptions.from_arguments(arguments)
    return report_and_status(process_dataset(options), "process-dataset", options.root)
