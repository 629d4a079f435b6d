"""Runs of the preparation on the miniature pack."""

import dataclasses
import io
import json

import torch
from rich.console import Console

from ltx_titan.commands.process.options import CaptionOptions, DataOptions, MediaOptions
from ltx_titan.commands.process.pipeline import process
from ltx_titan.data.cache import INDEX_NAME


def write_rows(folder, rows):
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(nano, path, buckets="64x32x17;64x32x1", media=True, captions=True, **options):
    """Prepares a dataset; returns the report and what it printed. `options` are fields of the three option classes."""
    options = {"model_path": nano, "text_encoder_path": nano.parent / "text_encoder", "device": "cpu", **options}
    options |= {"dataset_path": path, "resolution_buckets": buckets}
    groups = []
    for group in (DataOptions, MediaOptions, CaptionOptions):
        names = [field.name for field in dataclasses.fields(group)]
        groups.append(group(**{name: options.pop(name) for name in names if name in options}))
    assert not options, f"no such options: {sorted(options)}"
    console = Console(file=io.StringIO(), width=200)
    report = process(groups[0], groups[1] if media else None, groups[2] if captions else None, console)
    report.print()
    return report, console.file.getvalue()


def load(folder, source, key):
    return torch.load(folder / ".precomputed" / source / key, weights_only=True)


def contents(root):
    """Every file below a folder, by relative path, except the shape index that reading it leaves."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != INDEX_NAME]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
