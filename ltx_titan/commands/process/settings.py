"""A note of how a data root was made, so that a second run with other options does not mix two kinds of samples.

A run skips what is there. Without the note, a run with other buckets would skip everything and look as if it had done
what it was told.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "prepare.json"

Settings = dict[str, dict[str, Any]]
"""Source folder -> what its samples depend on."""


def check_settings(root: Path, settings: Mapping[str, dict[str, Any]]) -> None:
    """Compares how samples are to be made with how those that are there were made.

    Raises:
        ValueError: they differ; with folder, setting and both values.
    """
    before = read_settings(root)
    for folder, values in settings.items():
        for name, value in values.items():
            if folder in before and name in before[folder] and before[folder][name] != value:
                raise ValueError(
                    f"{root / folder}: was prepared with {name} = {before[folder][name]!r}, now it is {value!r}; "
                    f"give another --output-dir, or --overwrite to make all of it again (or delete "
                    f"{root / FILE_NAME} to have both kinds in one set)"
                )


def read_settings(root: Path) -> Settings:
    """How the samples of a data root were made; empty where nobody noted it."""
    path = root / FILE_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it") from error


def write_settings(root: Path, settings: Mapping[str, dict[str, Any]]) -> None:
    """Notes how samples are made, beside what is noted of other folders."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / FILE_NAME
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    merged = dict(sorted({**read_settings(root), **settings}.items()))
    temporary.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
