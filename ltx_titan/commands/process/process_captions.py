"""`ltx-titan process-captions`: the text half of `process-dataset`, without any VAE."""

import argparse

from rich.console import Console

from ltx_titan.commands.process.options import ProcessOptions, add_caption_arguments, add_common_arguments
from ltx_titan.commands.process.pipeline import process, report_and_status
from ltx_titan.commands.report import Report

DESCRIPTION = """\
Encode the captions of a data set to conditions/, and nothing else: process-dataset without its media half, for after
captions were rewritten (with --overwrite), or for a machine whose memory holds the text encoder. Media files are not
opened; a sample is named after its video, or its audio where there are no videos.

Captions are cut at 1,024 tokens. What is stored still has to pass the checkpoint's text connectors, which training
does in every step; with --contexts it has passed them.

examples:
  ltx-titan process-captions clips/dataset.jsonl --model-path ltx-2.3-22b-dev.safetensors \\
      --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized
  # new captions, with a trigger word, for videos that are encoded already
  ltx-titan process-captions clips/dataset.jsonl --overwrite --lora-trigger "SKSDOG" --remove-llm-prefixes ...
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-captions clips/dataset.jsonl ...
"""


def process_captions(options: ProcessOptions, console: Console | None = None) -> Report:
    """Prepares the captions of a data set; see `pipeline.process`."""
    return process(options, console, media=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan process-captions`."""
    add_common_arguments(parser)
    add_caption_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan process-captions`; the exit status is 1 only where nothing at all could be prepared."""
    options = ProcessOptions.from_arguments(arguments)
    return report_and_status(process_captions(options), "process-captions", options.root)
