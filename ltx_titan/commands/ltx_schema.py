"""Parses a job of the LTX Trainer: YAML text to sections with known keys and values of the right type.

Numbers in quotes are accepted, as by the LTX Trainer: YAML reads `1e-4` as a string. The tables below contain that
trainer's defaults, because an omitted key means its default and not ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ltx_titan.config.errors import MISSING, ConfigError, Problem, nearest
from ltx_titan.config.optimization import ADAPTER_KEYS, unsupported_adapter

Table = dict[str, Any]


class Key(NamedTuple):
    """One key of a section.

    Attributes:
        kind: int, float, bool, str, list or dict, or a tuple of the allowed strings.
        default: default of the LTX Trainer.
        nullable: whether `null` is a valid value.
    """

    kind: type[Any] | tuple[str, ...]
    default: Any = None
    nullable: bool = False


_PATH = Key(str, None, True)

SECTIONS: dict[str, dict[str, Key]] = {
    "model": {
        "model_path": Key(str),
        "text_encoder_path": _PATH,
        "video_vae_path": _PATH,
        "audio_vae_path": _PATH,
        "training_mode": Key(("lora", "full"), "lora"),
        "load_checkpoint": _PATH,
    },
    "lora": {
        "rank": Key(int, 64),
        "alpha": Key(float, 64.0),
        "dropout": Key(float, 0.0),
        "target_modules": Key(list, ["to_k", "to_q", "to_v", "to_out.0"]),
    },
    "optimization": {
        "learning_rate": Key(float, 5e-4),
        "steps": Key(int, 3000),
        "batch_size": Key(int, 2),
        "gradient_accumulation_steps": Key(int, 1),
        "max_grad_norm": Key(float, 1.0),
        "optimizer_type": Key(("adamw", "adamw8bit"), "adamw"),
        "scheduler_type": Key(("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step"), "linear"),
        "scheduler_params": Key(dict, {}),
        "enable_gradient_checkpointing": Key(bool, False),
    },
    "acceleration": {
        "mixed_precision_mode": Key(("no", "fp16", "bf16"), "bf16", True),
        "quantization": Key(("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "fp8uz-quanto"), None, True),
        "load_text_encoder_in_8bit": Key(bool, False),
        "offload_optimizer_during_validation": Key(bool, False),
    },
    "data": {"preprocessed_data_root": Key(str), "num_dataloader_workers": Key(int, 2)},
    "checkpoints": {
        "interval": Key(int, None, True),
        "keep_last_n": Key(int, 1),
        "precision": Key(("bfloat16", "float32"), "bfloat16"),
        "no_resume": Key(bool, False),
        "save_training_state": Key(("full", "minimal", "off"), "minimal"),
    },
    "flow_matching": {
        "timestep_sampling_mode": Key(("uniform", "shifted_logit_normal"), "shifted_logit_normal"),
        "timestep_sampling_params": Key(dict, {}),
    },
    "hub": {"push_to_hub": Key(bool, False), "hub_model_id": Key(str, None, True)},
    "wandb": {
        "enabled": Key(bool, False),
        "project": Key(str, "ltxv-trainer"),
        "entity": Key(str, None, True),
        "tags": Key(list, []),
        "log_validation_videos": Key(bool, True),
    },
    "validation": {
        "samples": Key(list, []),
        "negative_prompt": Key(str),
        "video_dims": Key(list),
        "frame_rate": Key(float),
        "seed": Key(int),
        "inference_steps": Key(int),
        "interval": Key(int, 100, True),
        "video_cfg_scale": Key(float),
        "audio_cfg_scale": Key(float),
        "video_stg_scale": Key(float),
        "audio_stg_scale": Key(float),
        "stg_blocks": Key(list, None, True),
        "guidance_rescale": Key(float),
        "video_modality_guidance_scale": Key(float),
        "audio_modality_guidance_scale": Key(float),
        "generate_audio": Key(bool),
        "generate_video": Key(bool),
        "skip_initial_validation": Key(bool),
        "prompts": Key(list, []),
        "images": Key(list, None, True),
        "reference_videos": Key(list, None, True),
        "reference_downscale_factor": Key(int, 1),
        "include_reference_in_output": Key(bool, False),
        "guidance_scale": Key(float, None, True),
        "stg_scale": Key(float, 1.0),
        "stg_mode": Key(("stg_av", "stg_v"), "stg_av"),
    },
}
TOP: dict[str, Key] = {"seed": Key(int, 42), "output_dir": Key(str, "outputs")}
_FIRST_FRAME_P = Key(float, 0.1)
STRATEGIES: dict[str, dict[str, Key]] = {
    "flexible": {"name": Key(str), "video": Key(dict, None, True), "audio": Key(dict, None, True)},
    "text_to_video": {
        "name": Key(str),
        "first_frame_conditioning_p": _FIRST_FRAME_P,
        "with_audio": Key(bool, False),
        "audio_latents_dir": Key(str, "audio_latents"),
    },
    "video_to_video": {
        "name": Key(str),
        "first_frame_conditioning_p": _FIRST_FRAME_P,
        "reference_latents_dir": Key(str, "reference_latents"),
    },
}
BLOCK: dict[str, Key] = {"is_generated": Key(bool), "latents_dir": Key(str), "conditions": Key(list, [])}
_PROBABILITY = {"type": Key(str), "probability": Key(float)}
CONDITIONS: dict[str, dict[str, Key]] = {
    "first_frame": _PROBABILITY,
    "prefix": {**_PROBABILITY, "temporal_boundary": Key(int)},
    "suffix": {**_PROBABILITY, "temporal_boundary": Key(int)},
    "spatial_crop": {**_PROBABILITY, "spatial_region": Key(list)},
    "mask": {**_PROBABILITY, "mask_dir": Key(str)},
    "reference": {**_PROBABILITY, "latents_dir": Key(str)},
}
SAMPLE: dict[str, Key] = {
    "prompt": Key(str),
    "conditions": Key(list, []),
    "video_dims": Key(list, None, True),
    "seed": Key(int, None, True),
}
_EITHER = {"type": Key(str), "video": _PATH, "audio": _PATH}
_END = {**_EITHER, "num_frames": Key(int, None, True), "duration": Key(float, None, True)}
SAMPLE_CONDITIONS: dict[str, dict[str, Key]] = {
    "first_frame": {"type": Key(str), "image_or_video": Key(str)},
    "prefix": _END,
    "suffix": _END,
    "spatial_crop": {"type": Key(str), "video": Key(str), "spatial_region": Key(list)},
    "mask": {**_EITHER, "mask": Key(str)},
    "reference": {
        **_EITHER,
        "downscale_factor": Key(int),
        "temporal_scale_factor": Key(int),
        "include_in_output": Key(bool),
    },
    "video_to_audio": {"type": Key(str), "video": Key(str)},
    "audio_to_video": {"type": Key(str), "audio": Key(str)},
}


class LtxJob(NamedTuple):
    """The keys of a file, without defaults.

    Attributes:
        sections: section -> key -> value; top-level keys are in the section "".
        strategy: keys of the training strategy, with its name and defaults.
    """

    sections: dict[str, Table]
    strategy: Table

    def get(self, section: str, key: str) -> Any:
        """Value of a key, or the LTX Trainer's default."""
        known = TOP if section == "" else SECTIONS[section]
        return self.sections[section].get(key, known[key].default)


def read_ltx_job(text: str, origin: str) -> LtxJob:
    """Parses and validates a job of the LTX Trainer.

    Args:
        text: YAML.
        origin: name of the file in errors.

    Raises:
        ConfigError: not YAML, or a key is unknown or of the wrong type; with every problem found.
    """
    data = parse_yaml(text, origin)
    checks = _Checks(origin)
    top = {key: value for key, value in data.items() if key not in SECTIONS and key != "training_strategy"}
    known = {**TOP, **dict.fromkeys([*SECTIONS, "training_strategy"], Key(dict))}
    sections = {"": checks.table("", top, known)}
    for name, keys in SECTIONS.items():
        sections[name] = checks.table(name, data.get(name), keys)
    strategy = _strategy(data.get("training_strategy"), checks)
    if sections["model"].get("training_mode", "lora") == "lora" and data.get("lora") is None:
        checks.problem("lora", MISSING, 'a section, because model.training_mode = "lora"', "add it")
    if "samples" in sections["validation"]:
        where = "validation.samples"
        samples = checks.tables(where, sections["validation"]["samples"], lambda item: SAMPLE)
        for index, sample in enumerate(samples):
            if "conditions" in sample:
                path = f"{where}[{index}].conditions"
                sample["conditions"] = checks.tables(path, sample["conditions"], _by_type(SAMPLE_CONDITIONS))
        sections["validation"]["samples"] = samples
    if checks.problems:
        raise ConfigError(checks.problems)
    return LtxJob(sections, strategy)


def parse_yaml(text: str, origin: str) -> Table:
    """Parses YAML with plain values to a table.

    Raises:
        ConfigError: not YAML, or not a table.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError("import-config reads YAML: install it with `pip install pyyaml`.") from error

    class Loader(yaml.SafeLoader):
        """Also reads tuples, which jobs saved by the LTX Trainer contain."""

    # Tuples are the one Python tag that saved jobs contain; any other tag remains an error.
    # The stub expects a function of a Loader; the method is one of its base class.
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_sequence)  # type: ignore[type-var]
    try:
        # A subclass of SafeLoader: it constructs plain values and lists, never arbitrary objects.
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError([Problem("", MISSING, f"valid YAML ({what})", "correct it there", origin)]) from error
    if not isinstance(data, dict):
        raise ConfigError([Problem("", MISSING, "a job of the LTX Trainer (sections)", "name its file", origin)])
    return data


def _strategy(value: Any, checks: "_Checks") -> Table:
    """The strategy with its defaults; without a name it is the LTX Trainer's default, text_to_video."""
    where = "training_strategy"
    name = value.get("name", "text_to_video") if isinstance(value, dict) else "text_to_video"
    if not isinstance(name, str) or name not in STRATEGIES:
        checks.problem(f"{where}.name", name, f"one of {', '.join(STRATEGIES)}", nearest(str(name), STRATEGIES))
        return {"name": name}
    keys = STRATEGIES[name]
    strategy = {key: known.default for key, known in keys.items()} | checks.table(where, value, keys)
    for stream in ("video", "audio") if name == "flexible" else ():
        if strategy[stream] is not None:
            path = f"{where}.{stream}"
            block = checks.table(path, strategy[stream], BLOCK)
            conditions = block.get("conditions", [])
            block["conditions"] = checks.tables(f"{path}.conditions", conditions, _by_type(CONDITIONS))
            strategy[stream] = block
    return strategy | {"name": name}


def _by_type(kinds: Mapping[str, Mapping[str, Key]]) -> Callable[[Table], Mapping[str, Key] | str]:
    """Returns a function that selects a condition's keys by its type, or the remedy for an unknown type."""

    def choose(item: Table) -> Mapping[str, Key] | str:
        kind = str(item.get("type"))
        return kinds[kind] if kind in kinds else nearest(kind, kinds)

    return choose


class _Checks:
    """Collects problems, so that all of them are reported at once."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.problems: list[Problem] = []

    def problem(self, key: str, found: Any, expected: str, remedy: str) -> None:
        self.problems.append(Problem(key, found, expected, remedy, self.origin))

    def table(self, where: str, value: Any, keys: Mapping[str, Key]) -> Table:
        """Converts each key of `value` to its type."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(where, value, "a section with keys", "write its keys below it")
            return {}
        found: Table = {}
        for name, item in value.items():
            dotted = f"{where}.{name}" if where else str(name)
            if where == "lora" and name in ADAPTER_KEYS and (reason := unsupported_adapter(item)) is not None:
                self.problem(dotted, item, "a LoRA", reason)
                continue
            if name not in keys:
                what = f"a key of {where}" if where else "a section of a job of the LTX Trainer"
                self.problem(dotted, item, what, nearest(str(name), keys))
                continue
            found[name] = self.value(dotted, item, keys[name])
        return found

    def tables(self, where: str, items: list, choose: Callable[[Table], Mapping[str, Key] | str]) -> list[Table]:
        """Converts a list of tables; `choose` selects the keys of each table."""
        found = []
        for index, item in enumerate(items):
            path = f"{where}[{index}]"
            if not isinstance(item, dict):
                self.problem(path, item, "a table", "write its keys below it")
                continue
            keys = choose(item)
            if isinstance(keys, str):
                self.problem(f"{path}.type", item.get("type", MISSING), "a known condition type", keys)
                continue
            found.append(self.table(path, item, keys))
        return found

    def value(self, where: str, value: Any, key: Key) -> Any:
        """Converts `value` to the type of the key."""
        if value is None and key.nullable:
            return None
        if isinstance(key.kind, tuple):
            if value is False and "no" in key.kind:
                return "no"  # YAML reads an unquoted no as false
            if value not in key.kind:
                self.problem(where, value, f"one of {', '.join(key.kind)}", nearest(str(value), key.kind))
            return value
        if key.kind in (int, float):
            return self._number(where, value, key.kind)
        if not isinstance(value, key.kind):
            names = {bool: "true or false", str: "a string", list: "a list", dict: "a table"}
            self.problem(where, value, names[key.kind], "change it")
            # A neutral value, so that the checks continue and report all problems at once.
            return key.kind()
        return [_number_or(item) for item in value] if where.endswith(("video_dims", "spatial_region")) else value

    def _number(self, where: str, value: Any, kind: type) -> int | float:
        number = _number_or(value)
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number or (kind is int and number != int(number)):
            self.problem(where, value, "an integer" if kind is int else "a number", "change it")
            return kind()
        return kind(number)


def _number_or(value: Any) -> Any:
    """Parses a string that contains a number; returns any other value unchanged."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
