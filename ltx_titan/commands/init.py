"""`ltx-titan init`: a commented job file from a recipe and a few answers.

The recipe is one of `train_configs/`; comments are the descriptions of the keys from the job's schema, so that they say
what the program does. Missing answers are asked for on a terminal, and are an error elsewhere.
"""

import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w

from ltx_titan.common.files import write_text
from ltx_titan.common.options import Flag, Maybe, Overrides, Positional, Repeated, parse_size, placeholder
from ltx_titan.config import JobConfig, load_job, read_tables
from ltx_titan.config.load import models_in

DESCRIPTION = """\
Write a job file in which every key is explained, from a recipe of train_configs/ and a few answers. What is not passed
is asked for on a terminal. --section.key=value sets any other key.

examples:
  ltx-titan init job.toml
  ltx-titan init job.toml --checkpoint ltx-2.3-22b-dev.safetensors --data clips --trigger SKSDOG \\
      --text-encoder gemma-3-12b-it-qat-q4_0-unquantized --prompt "SKSDOG runs along a beach"
  ltx-titan init job.toml --recipe ltx23_lora_i2v --checkpoint FILE --data clips --training.steps=1000
  ltx-titan init --list
"""

_ROOT = Path(__file__).resolve().parents[2]
# In a checkout, and in an installed package.
_RECIPES = (_ROOT / "train_configs", _ROOT / "ltx_titan" / "train_configs")
# Of 2,000 steps, the usual length: eight times.
_VALIDATION_INTERVAL = 250
_WIDTH = 100


@dataclass(frozen=True)
class InitOptions:
    """Options of `ltx-titan init`."""

    out: Annotated[Positional[Path], placeholder("[JOB.toml]")] = Path("job.toml")
    """Job file to write."""

    recipe: str = "ltx23_lora_t2v"
    """Job of train_configs/ to start from; --list shows all."""

    checkpoint: Annotated[Maybe[str], placeholder("FILE")] = None
    """Official checkpoint (.safetensors)."""

    data: Annotated[Maybe[str], placeholder("DIR")] = None
    """Folder that process-dataset wrote, or that contains it as .precomputed."""

    text_encoder: Annotated[Maybe[str], placeholder("PATH")] = None
    """Folder of Gemma, for validation clips."""

    prompt: Repeated[str] = ()
    """Prompt of a validation clip. May be passed several times. Without one the job samples the recipe's clips if
    --text-encoder is passed, and no clips otherwise."""

    size: Annotated[Maybe[str], placeholder("WxHxF")] = None
    """Width, height and frames of validation clips, for example 768x448x89."""

    trigger: Annotated[Maybe[str], placeholder("WORD")] = None
    """Trigger word of the captions."""

    output: Annotated[Maybe[str], placeholder("DIR")] = None
    """Folder of the results. Default: outputs/NAME, after the job file."""

    list: Flag = False
    """List the recipes and end."""

    overwrite: Flag = False
    """Replace an existing file."""

    overrides: Overrides = ()


def run(options: InitOptions) -> int:
    """Writes the job file and prints what to do next; returns the exit status."""
    if options.list:
        for path in recipes():
            print(f"{path.stem:<36} {_title(path)}")
        return 0
    if options.out.suffix != ".toml":
        raise ValueError(f"JOB.toml is {str(options.out)!r}; expected a file name that ends in .toml.")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"{options.out} exists; choose another name, or pass --overwrite.")
    recipe = find_recipe(options.recipe)
    # Read with the overrides, whose form is checked there.
    tables, _ = read_tables(recipe, options.overrides)
    _fill(tables, options)
    write_text(options.out, job_text(tables, recipe))
    print(f"{options.out}: from {recipe.name}")
    try:
        load_job(options.out)
    except ValueError as error:
        print(f"not ready yet:\n{textwrap.indent(str(error), '  ')}")
    print(f"\nnext:\n  ltx-titan doctor {options.out}\n  ltx-titan train {options.out}")
    return 0


def recipes() -> list[Path]:
    """The job files of `train_configs/`."""
    return sorted(path for folder in _RECIPES for path in folder.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """Path of a recipe.

    Args:
        name: of a job file of train_configs/, with or without `.toml`, or a path.

    Raises:
        ValueError: there is none of that name.
    """
    if Path(name).is_file():
        return Path(name)
    found = {path.stem: path for path in recipes()}
    stem = name.removesuffix(".toml")
    if stem not in found:
        raise ValueError(f"--recipe {name}: expected one of {', '.join(found)}, or a job file.")
    return found[stem]


def job_text(tables: dict[str, Any], recipe: Path) -> str:
    """The job file: every key under its description."""
    lines = [f"# Made by `ltx-titan init` from {recipe.name}: {_title(recipe)}", "# All keys: docs/configuration.md"]
    for section, values in tables.items():
        (model,) = models_in(JobConfig.model_fields[section].annotation)
        descriptions = {key: field.description or "" for key, field in model.model_fields.items()}
        lines += ["", *_comment(JobConfig.model_fields[section].description or ""), f"[{section}]"]
        lines += _table(section, values, descriptions)
    return "\n".join(lines) + "\n"


def _table(path: str, values: dict[str, Any], descriptions: dict[str, str]) -> Iterator[str]:
    """Lines of a table below its header: keys, then tables within it, which would swallow keys after them."""
    for key, value in values.items():
        if not _is_table(value):
            yield from _comment(descriptions.get(key, ""))
            yield tomli_w.dumps({key: ""}).partition("=")[0] + f"= {_value(value)}"
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ("", *_comment(descriptions.get(key, "")), f"[{path}.{key}]")
            yield from _table(f"{path}.{key}", value, {})
        elif _is_table(value):
            for index, entry in enumerate(value):
                yield from ("", *(_comment(descriptions.get(key, "")) if index == 0 else ()), f"[[{path}.{key}]]")
                yield from _table(f"{path}.{key}", entry, {})


def _value(value: Any) -> str:
    """A value as TOML, lists on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return tomli_w.dumps({"key": value}).partition("=")[2].strip()


def _fill(tables: dict[str, Any], options: InitOptions) -> None:
    """Sets the answers in a job's tables."""
    model, data, job = (tables.setdefault(section, {}) for section in ("model", "data", "job"))
    # A key that --section.key=value sets needs no answer.
    if "model.checkpoint_path" not in _overridden(options):
        question = "checkpoint of the base model (.safetensors)"
        model["checkpoint_path"] = options.checkpoint or _ask("--checkpoint", question)
    has_root = data.get("source", "precomputed") == "precomputed" and not data.get("sources")
    if has_root and "data.root" not in _overridden(options):
        data["root"] = options.data or _ask("--data", "folder of the prepared clips")
    if "job.dump_folder" not in _overridden(options):
        job["dump_folder"] = options.output or f"outputs/{options.out.stem}"
    trigger = options.trigger or _ask(None, "trigger word of the captions (empty: none)")
    if trigger:
        job["trigger"] = trigger
    prompts = list(options.prompt)
    if not prompts and (prompt := _ask(None, "prompt of a validation clip (empty: sample no clips)")):
        prompts = [prompt]
    if prompts:
        validation = tables.setdefault("validation", {})
        validation.setdefault("interval", _VALIDATION_INTERVAL)
        if "validation.text_encoder_path" not in _overridden(options):
            encoder = options.text_encoder or _ask("--text-encoder", "folder of Gemma, the text encoder")
            validation["text_encoder_path"] = encoder
        validation["samples"] = [{"prompt": prompt} for prompt in prompts]
    elif options.text_encoder and "validation" in tables:
        tables["validation"]["text_encoder_path"] = options.text_encoder
    elif not any(name.startswith("validation.") for name in _overridden(options)):
        tables.pop("validation", None)  # it cannot run without the text encoder
    if options.size is not None:
        tables.setdefault("validation", {})["video_dims"] = list(parse_size(options.size, "--size"))


def _overridden(options: InitOptions) -> set[str]:
    return {override.removeprefix("--").partition("=")[0].replace("-", "_") for override in options.overrides}


def _ask(option: str | None, question: str) -> str:
    """Asks on a terminal.

    Args:
        option: that passes the answer; None if an empty answer is allowed.
        question: what to enter.

    Raises:
        ValueError: there is no terminal, and the answer is needed.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while is_terminal:
        answer = input(f"{question}: ").strip()
        if answer or option is None:
            return answer
    if option is None:
        return ""
    raise ValueError(f"{option} is missing: expected the {question}; pass it, or run the command on a terminal.")


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), _WIDTH):
        yield f"# {line}"


def _title(path: Path) -> str:
    """Description of a job."""
    job = tomllib.loads(path.read_text(encoding="utf-8")).get("job", {})
    return str(job.get("description", ""))
