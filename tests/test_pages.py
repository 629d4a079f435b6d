"""Facts of README and docs that no command shows: measured figures, names of files, job keys."""

import json
import re
from itertools import zip_longest
from pathlib import Path

import pytest
from pydantic import BaseModel

from ltx_titan.config import JobConfig
from ltx_titan.config.load import models_in

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files whose name looks like a key, such as `metrics.jsonl`.
SUFFIXES = ("jsonl", "toml", "png", "safetensors", "html")
# Of another project: torchtitan's language models.
OTHERS = {"model.layers"}
# Where a wheel has the job files.
IN_WHEELS = {"ltx_titan/train_configs"}


def numbers(cell: str) -> list[str]:
    return re.findall(r"[\d.]+", cell)


def rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_every_row_of_the_table_of_measurements_was_measured():
    rows = []
    for path in (ROOT / "docs/benchmarks").glob("*.jsonl"):
        rows += [row for row in map(json.loads, path.open(encoding="utf-8")) if row.get("mfu") and "step_time_s" in row]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| s/step | MFU | GiB |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 5
    for line in table:
        *_, seconds, mfu, memory, _ = line.split("|")
        # Two cases may share a line, and their memory.
        for s, share, gib in zip_longest(numbers(seconds), numbers(mfu), numbers(memory), fillvalue=numbers(memory)[0]):
            found = [
                row
                for row in rows
                if rounded(row["step_time_s"], s) == s
                and rounded(100 * row["mfu"], share) == share
                and rounded(row["peak_mem_gib"], gib) == gib
            ]
            assert found, f"{line}: no row of docs/benchmarks has {s} s, {share} % and {gib} GiB"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_exist(page):
    top = "|".join(("ltx_titan", "kernels", "tests", "docs", "train_configs"))
    for name in re.findall(rf"`((?:{top})/[\w./*-]+)`", page.read_text(encoding="utf-8")):
        assert name in IN_WHEELS or any(ROOT.glob(name.rstrip("/"))), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_job_keys_that_a_page_names_exist(page):
    known, sections = keys(JobConfig), JobConfig.model_fields.keys()
    # `training.steps`, `--training.steps=3`, `training.steps = 3`, `[validation.quality]`, `[[video.conditions]]`
    for name in re.findall(r"`(?:--|\[+)?([a-z]\w*(?:\.\w+(?:\[\])?)+)\b", page.read_text(encoding="utf-8")):
        key = name.replace("[]", "")
        if key.partition(".")[0] in sections and not key.endswith(SUFFIXES) and key not in OTHERS:
            assert key in known, f"{page.name}: {name}"


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all keys of a table and of the tables below it."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(prefix + name)
        for below in models_in(field.annotation):
            found |= keys(below, f"{prefix}{name}.")
    return found
