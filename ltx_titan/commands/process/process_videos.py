"""`ltx-titan process-videos`: the media half of `process-dataset`, without any text encoder."""

import argparse

from rich.console import Console

from ltx_titan.commands.process.options import ProcessOptions, add_common_arguments, add_media_arguments
from ltx_titan.commands.process.pipeline import process, report_and_status
from ltx_titan.commands.report import Report

DESCRIPTION = """\
Encode the videos, images, audio, references and masks of a data set, and no captions: process-dataset without its text
half, for when captions are still being written or the text encoder runs on another machine. Captions may be missing.
The columns, the buckets and what is written are those of process-dataset; process-captions does the rest, with the same
metadata file and --output-dir.

examples:
  ltx-titan process-videos clips/dataset.jsonl --resolution-buckets "768x448x89" \\
      --model-path ltx-2.3-22b-dev.safetensors
  # in-context training: edge videos of half the size and half the frames as references
  ltx-titan process-videos edges/dataset.csv --resolution-buckets "768x512x97" \\
      --reference-downscale-factor 2 --reference-temporal-scale-factor 2 ...
  # audio only, in lengths that can share a batch
  ltx-titan process-videos audio/dataset.csv --audio-durations "2.0;4.0;8.0" ...
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-videos clips/dataset.jsonl ...
"""


def process_videos(options: ProcessOptions, console: Console | None = None) -> Report:
    """Prepares the media of a data set; see `pipeline.process`."""
    return process(options, console, captions=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan process-videos`."""
    add_common_arguments(parser)
    add_media_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan process-videos`; the exit status is 1 only where nothing at all could be prepared."""
    options = ProcessOptions.from_arguments(arguments)
    return report_and_status(process_videos(options), "process-videos", options.root)
