"""A job that was converted from another trainer, with notes about what was not."""

import re
from dataclasses import dataclass, field
from typing import Any

import tomli_w

from ltx_titan.commands.ltx_schema import Table
from ltx_titan.config.errors import MISSING, ConfigError, as_toml
from ltx_titan.config.job import JobConfig
from ltx_titan.config.load import build_job

_ELSEWHERE = re.compile(
    r"model\.checkpoint_path|model\.adapter_path|data\.root|data\.sources\[\d+\]\.root|metrics\.wandb"
)
"""Keys whose value a job may have only on the machine that runs it."""


@dataclass
class Imported:
    """A converted job.

    Attributes:
        job: section -> key -> value, as in a job file.
        notes: keys that were not converted, or whose meaning differs; one line each.
        commands: command lines that prepare the data of the job.
    """

    job: dict[str, Table] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Sets `section.key`."""
        section, name = key.split(".")
        self.job.setdefault(section, {})[name] = value

    def note(self, key: str, value: Any, reason: str) -> None:
        """Notes what happened to a key of the other trainer."""
        self.notes.append(f"{key} = {as_toml(value)}: {reason}")

    def toml(self) -> str:
        """Formats the job file."""
        sections = [name for name in JobConfig.model_fields if name in self.job]
        return tomli_w.dumps({name: self.job[name] for name in sections})

    def text(self) -> str:
        """Formats the job file below comments with the command lines that prepare its data."""
        lines = ["# Prepare the data first:", *(f"#   {line}" for line in self.commands)] if self.commands else []
        return "\n".join([*lines, "", self.toml()])


def check_job(result: Imported, origin: str) -> Imported:
    """Returns `result`, with a note of each file that is not on this machine.

    Raises:
        ConfigError: as `load_job`, except for those files.
    """
    try:
        build_job(result.job, origin)
    except ConfigError as error:
        # A job is often converted on a laptop and run on a cluster.
        elsewhere = [p for p in error.problems if p.found is not MISSING and _ELSEWHERE.fullmatch(p.key)]
        if len(elsewhere) < len(error.problems):
            raise ConfigError(p for p in error.problems if p not in elsewhere) from None
        for problem in elsewhere:
            reason = "not on this machine"
            if problem.key == "metrics.wandb":
                reason += f": {problem.remedy}"
            result.note(problem.key, problem.found, reason)
    return result
