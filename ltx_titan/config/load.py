"""Reads and writes job files: TOML text and `--section.key=value` overrides to a `JobConfig`, and back.

Every error of the TOML parser, of pydantic and of the rules becomes one line that names file or override, key, value,
expected values and remedy (`errors.py`).
"""

import codecs
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from ltx_titan.config.effect import warn_without_effect
from ltx_titan.config.errors import EXPECTED_TYPES, MISSING, ConfigError, Problem, as_toml, nearest
from ltx_titan.config.job import JobConfig
from ltx_titan.config.rules import PARAMETER_OWNERS, rule_problems


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads the job file at `path`, applies `overrides`, and validates the result.

    Args:
        path: TOML file.
        overrides: strings `--section.key=value`; the value is TOML, or a bare string if it is not valid TOML;
            `--section.key` alone means true. Later ones take precedence.

    Raises:
        ConfigError: the file cannot be read, or the job is invalid; with every problem found.
    """
    data, origins = read_tables(path, overrides)
    return build_job(data, str(path), origins)


def read_tables(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a job file and applies `overrides`, without validation; returns `data` and `origins` for `build_job`.

    Raises:
        ConfigError: the file cannot be read, or an override is not of the form `--section.key=value`.
    """
    path = Path(path)
    try:
        data = tomllib.loads(_read_text(path))
    except OSError as error:
        problem = Problem("", MISSING, f"a file that can be read ({error.strerror})", "correct the path", str(path))
        raise ConfigError([problem]) from error
    except UnicodeDecodeError as error:
        remedy = f"save it as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        raise ConfigError([Problem("", MISSING, f"UTF-8 ({error})", remedy, str(path))]) from error
    # ValueError: of the parser, and of numbers with thousands of digits.
    except (ValueError, RecursionError) as error:
        problem = Problem("", MISSING, f"valid TOML ({error})", "correct the file there", str(path))
        raise ConfigError([problem]) from error
    origins: dict[str, str] = {}
    for override in overrides:
        origins[_apply_override(data, override)] = f"override {override}"
    return data, origins


def _read_text(path: Path) -> str:
    """Text of a file in UTF-8, or in UTF-16 with a byte-order mark as Windows' editors save it."""
    content = path.read_bytes()
    # TOML knows no byte-order mark: the first key would start with it.
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n")


def build_job(data: Mapping[str, Any], source: str, origins: Mapping[str, str] | None = None) -> JobConfig:
    """Validates a job in the form of nested tables.

    Args:
        data: section -> key -> value.
        source: origin of the values, for error messages.
        origins: different origins of single values, by dotted key.

    Raises:
        ConfigError: with every problem found. Rules between fields are checked only if each field is valid by itself.
    """
    try:
        job = JobConfig.model_validate(data)
    except ValidationError as error:
        problems = [_problem(detail, data) for detail in error.errors(include_url=False)]
        # `from None`: pydantic's own report of the same errors would follow otherwise.
        raise ConfigError([_at(problem, source, origins) for problem in problems]) from None
    if problems := rule_problems(job):
        raise ConfigError([_at(problem, source, origins) for problem in problems])
    warn_without_effect(job)
    return job


def dump_job(job: JobConfig) -> str:
    """Writes `job` as TOML that `load_job` reads back to an equal job; unset and inapplicable keys are omitted."""
    # TOML cannot express None.
    data = job.model_dump(exclude_none=True)
    # Keys of another `name` are omitted: a key that is set without having an effect is an error when it is read.
    for section, owners in PARAMETER_OWNERS.items():
        name = data[section]["name"]
        data[section] = {key: value for key, value in data[section].items() if name in owners.get(key, {name})}
    if job.model.mode == "full":
        del data["lora"]
    return tomli_w.dumps(data)


def plain_job(job: JobConfig) -> dict[str, Any]:
    """Converts `job` to nested tables of JSON values, to be stored with a checkpoint."""
    return job.model_dump(mode="json")


def job_changes(before: Mapping[str, Any], after: JobConfig) -> list[str]:
    """Lines `section.key: old -> new` for every difference, in the order of the sections.

    Args:
        before: result of `plain_job`. It is not validated again: its files may have been deleted since.
        after: the current job.
    """
    old, new = _flat(before), _flat(plain_job(after))
    return [
        f"{key}: {as_toml(old.get(key))} -> {as_toml(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Writes one override into `data`; returns its dotted key."""
    name, has_value, text = override.partition("=")
    key = name.removeprefix("--")
    parts = key.split(".")
    if not name.startswith("--") or len(parts) < 2 or not all(parts):
        problem = Problem("", MISSING, "the form --section.key=value", "name section and key", f"override {override}")
        raise ConfigError([problem])
    # Applied to the tables, before validation, so that an override is checked exactly like a value of the file.
    table = data
    for depth, part in enumerate(parts[:-1], start=1):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            problem = Problem(
                ".".join(parts[:depth]),
                table,
                f"a table that {parts[depth]} could be a key of",
                f"override {'.'.join(parts[:depth])} as a whole",
                f"override {override}",
            )
            raise ConfigError([problem])
    table[parts[-1]] = _override_value(text) if has_value else True
    return key


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break in the text would set further keys; such a text is a plain string.
    return parsed["value"] if parsed.keys() == {"value"} else text


def _at(problem: Problem, source: str, origins: Mapping[str, str] | None) -> Problem:
    """Adds the origin of the value to `problem`."""
    origin = source
    for key, override in (origins or {}).items():
        # An override is the origin of its key, of everything below it, and of an error of a table around it. The last
        # one wins.
        if problem.key == key or problem.key.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{problem.key}."):
            origin = override if problem.key else source
    return Problem(problem.key, problem.found, problem.expected, problem.remedy, origin)


def _problem(detail: Mapping[str, Any], data: Mapping[str, Any]) -> Problem:
    """Converts one pydantic error."""
    key, models = _locate(detail["loc"], data)
    kind, message = detail["type"], detail["msg"]
    context = detail.get("ctx", {})
    leaf = str(detail["loc"][-1])
    # For a missing key pydantic's input is the table around it.
    found = MISSING if kind == "missing" else detail["input"]
    if kind == "extra_forbidden":
        section = key.rpartition(".")[0]
        what = f"a key of {section}" if section else "a section of a job"
        fields = [name for model in models for name in model.model_fields]
        return Problem(key, found, what, nearest(leaf, fields))
    if kind in ("literal_error", "union_tag_invalid"):
        options = str(context.get("expected", context.get("expected_tags", "")))
        # pydantic reports the table, but it is the table's `type` that has to be corrected.
        if kind == "union_tag_invalid":
            key, found = f"{key}.type", context.get("tag", found)
        # Formatted by pydantic as 'a', 'b' or 'c'.
        names = [option.strip("'") for option in options.replace(" or ", ", ").split(", ")]
        return Problem(key, found, f"one of {', '.join(names)}", nearest(str(found), names))
    if kind == "union_tag_not_found":
        return Problem(f"{key}.type", MISSING, "the type of the condition", "add it")
    if kind == "value_error":
        # Raised by one of our validators, whose messages are complete.
        return Problem(key, found, "", str(context["error"]))
    expected = EXPECTED_TYPES.get(kind) or message.removeprefix("Input should be ")
    return Problem(key, found, expected, _remedy(kind, found, key, models, leaf))


def _remedy(kind: str, found: Any, key: str, models: list[type[BaseModel]], leaf: str) -> str:
    if kind == "string_type":
        return f"""put it in quotes (in an override: '--{key}="..."')"""
    if kind in ("int_type", "float_type", "bool_type") and isinstance(found, str):
        return "write it without quotes"
    field = next((model.model_fields[leaf] for model in models if leaf in model.model_fields), None)
    if field is not None and not field.is_required() and field.default is not None:
        if isinstance(field.default, BaseModel):
            return f"write [{key}] with its keys below it"
        return f"change it (default {as_toml(field.default)})"
    return f"add {key} = ..." if found is MISSING else "change it"


def _locate(loc: Sequence[int | str], data: Any) -> tuple[str, list[type[BaseModel]]]:
    """Dotted key of a pydantic location, and the models that its last part may be a field of.

    The tag of a discriminated union is part of the location but not of the file; it selects the model instead.
    """
    key = ""
    models: list[type[BaseModel]] = [JobConfig]
    owners = models
    for part in loc:
        # An index into a list does not change the candidates for the next key.
        if isinstance(part, int):
            key += f"[{part}]"
            data = data[part] if isinstance(data, list) and part < len(data) else None
            continue
        if isinstance(data, dict) and part not in data and data.get("type") == part:
            models = [model for model in models if part in get_args(model.model_fields["type"].annotation)]
            continue
        key += f".{part}" if key else part
        owners = models
        models = [
            found
            for model in owners
            if part in model.model_fields
            for found in models_in(model.model_fields[part].annotation)
        ]
        data = data.get(part) if isinstance(data, dict) else None
    return key, owners


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """All section classes in a type annotation, in unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in models_in(argument)]
