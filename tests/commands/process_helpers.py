"""Runs of the preparation on the miniature pack."""

import io
import json

import torch
from rich.console import Console

from ltx_titan.commands.process.options import ProcessOptions
from ltx_titan.commands.process.pipeline import process
from ltx_titan.data.cache import INDEX_NAME


def write_rows(folder, rows):
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(nano, path, buckets="64x32x17;64x32x1", media=True, captions=True, **options):
    """Process a data set; returns the report and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    options = ProcessOptions(path, nano, nano.parent / "text_encoder", resolution_buckets=buckets, **options)
    report = process(options, console, media=media, captions=captions)
    report.print()
    return report, console.file.getvalue()


def load(folder, source, key):
    return torch.load(folder / ".precomputed" / source / key, weights_only=True)


def contents(root):
    """Every file below a folder, by relative path, but for the index that reading it leaves."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != INDEX_NAME]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
