"""Recognizes jobs of ai-toolkit, musubi-tuner and diffusion-pipe by their structure, and converts them.

Each trainer has a module with one table of rules for each section of its files. What a table cannot say, since it
depends on several keys, is in functions below. A key that is in no table is noted as unknown: these trainers add keys
often.
"""

import tomllib
from pathlib import Path

from ltx_titan.commands.imported import Imported
from ltx_titan.commands.ltx_schema import Table, parse_yaml
from ltx_titan.commands.peers.ai_toolkit import convert_ai_toolkit
from ltx_titan.commands.peers.conversion import Conversion
from ltx_titan.commands.peers.diffusion_pipe import convert_diffusion_pipe
from ltx_titan.commands.peers.musubi import convert_musubi
from ltx_titan.config.errors import MISSING, ConfigError, Problem

_MUSUBI_KEYS = {"dit", "ltx2_checkpoint", "network_module", "network_dim", "dataset_config", "timestep_sampling"}


def import_peer(text: str, origin: str, ranks: int) -> Imported | None:
    """Converts a job of another trainer; returns None for YAML that may be a job of the LTX Trainer.

    Args:
        text: YAML or TOML.
        origin: path of the file; files that it names are looked for beside it, too.
        ranks: number of processes of the original job.

    Raises:
        ConfigError: the file is TOML of an unknown structure, or one of its values cannot be read.
    """
    data = _parse_toml(text, origin)
    c = Conversion(origin, ranks)
    if data is None:
        data = parse_yaml(text, origin)
        config = data.get("config")
        processes = config.get("process") if isinstance(config, dict) else None
        if not isinstance(processes, list) or not processes:
            return None
        convert_ai_toolkit(data, c)
    elif "directory" in data or {"model", "optimizer"} <= data.keys():
        convert_diffusion_pipe(data, c)
    elif "datasets" in data or _MUSUBI_KEYS & _flat_keys(data):
        convert_musubi(data, c)
    else:
        theirs = "musubi-tuner ([[datasets]], network_dim) or diffusion-pipe ([model] and [optimizer], [[directory]])"
        what = f"a file of {theirs}"
        raise ConfigError([Problem("", MISSING, what, "name another file", origin)])
    if c.problems:
        raise ConfigError(c.problems)
    return c.result


def _flat_keys(data: Table) -> set[str]:
    """Keys of a table and of the tables in it."""
    return set(data).union(*(value for value in data.values() if isinstance(value, dict)))


def _parse_toml(text: str, origin: str) -> Table | None:
    """Tables of a TOML file; None for another format."""
    try:
        # A file of comments is valid TOML as well as YAML.
        return tomllib.loads(text) or None
    except tomllib.TOMLDecodeError as error:
        if Path(origin).suffix != ".toml":
            return None
        raise ConfigError([Problem("", MISSING, f"valid TOML ({error})", "correct it there", origin)]) from error
