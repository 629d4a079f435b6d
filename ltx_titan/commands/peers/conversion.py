"""Converts what the files of ai-toolkit, musubi-tuner and diffusion-pipe have in common.

A table of rules says for each key of a file which of our keys it becomes, or why it becomes none. Optimizers,
schedules, folders of clips and base models are converted here for all three.
"""

import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ltx_titan.commands.imported import Imported
from ltx_titan.commands.ltx_schema import Table
from ltx_titan.config.errors import Problem
from ltx_titan.config.optimization import unsupported_adapter
from ltx_titan.config.sections import SourceSection

CHECKPOINT = "ltx-2.3-22b-dev.safetensors"
"""Placeholder for the base model of a job that was for another model."""
TEXT_ENCODER = "gemma-3-12b-it-qat-q4_0-unquantized"

UNKNOWN = "not converted, because import-config does not know this key"
HANDLED = None
"""Rule of a key that is converted together with others."""

# Reasons that several tables state.
FROZEN_TEXT = "the text encoder is not trained, and not in memory during training"
ONE_BUCKET = "every clip was trained in each of these; here it has one bucket, and the command uses the largest"
STREAM_BLOCKS = 'parallelism.stream_blocks = "auto" keeps frozen blocks in host memory if they do not fit'
EPOCHS = "counts epochs; here optimizer steps count: samples x repeats / training.global_batch_size are an epoch"
CHOSEN = "is chosen by ltx_titan"

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "adamw8": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "adamw_optimi": "adamw",
    "adamw8bitkahan": "adamw8bit",
    "adafactor": "adafactor",
    "adamwschedulefree": "adamw_schedulefree",
    "adamw_schedulefree": "adamw_schedulefree",
    "schedulefree.adamwschedulefree": "adamw_schedulefree",
    "prodigy": "prodigy",
    "prodigyopt": "prodigy",
    "prodigyopt.prodigy": "prodigy",
    "prodigy8bit": "prodigy",
}
_RENAMED_OPTIMIZERS = {
    "pagedadamw8bit": 'optimizer.name = "adamw8bit"; optimizer.offload_state = true keeps the state in host memory',
    "adamw_optimi": 'optimizer.name = "adamw"; trained weights are float32 and need no Kahan summation',
    "adamw8bitkahan": 'optimizer.name = "adamw8bit"; trained weights are float32 and need no Kahan summation',
    "prodigy8bit": 'optimizer.name = "prodigy", whose state takes 16 bytes per weight',
}
# Their packages decay no weight unless told to.
_WITHOUT_DECAY = ("adamw_schedulefree", "prodigy")
# Options of prodigyopt that are fixed here.
_PRODIGY = {"decouple": "true", "use_bias_correction": "true", "safeguard_warmup": "true", "d0": "1e-06"}
# A lower rate is AdamW's, and would be refused.
_LOWEST_PRODIGY_LR = 0.01
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "polynomial": "polynomial",
}
_BASE_DTYPES = {
    "float8": ("float8", "qfloat8", "float8_e4m3fn", "fp8"),
    "int8": ("int8", "uint8", "qint8"),
    "int4": ("int4", "uint4", "qint4"),
}
_ADAMW = ("adamw", "adamw8bit", "adamw_schedulefree", "prodigy")


class To(NamedTuple):
    """A key that becomes `key` of ours, with its value converted."""

    key: str
    convert: Callable[[Any], Any]


Rule = To | str | None
"""Our key, or the reason why there is none, or HANDLED."""


class Expected(ValueError):
    """A value cannot be converted; the message says what is expected."""


def number(value: Any) -> float:
    """A number; YAML reads 1e-4 as a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Expected("a number")
    try:
        return float(value)
    except ValueError:
        raise Expected("a number") from None


def integer(value: Any) -> int:
    """An integer."""
    if number(value) != int(number(value)):
        raise Expected("an integer")
    return int(number(value))


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Expected("true or false")
    return value


def weights_dtype(value: Any) -> str:
    """Precision of exported weights; float16 becomes bfloat16, which no weight overflows."""
    return "float32" if value in ("float", "float32", "fp32", "no") else "bfloat16"


def frames_of(count: Any) -> int:
    """The largest valid number of frames, 1 + a multiple of 8, that is at most `count`."""
    return 1 + max(integer(count) - 1, 0) // 8 * 8


def multiple_of_32(pixels: float) -> int:
    """The nearest valid width or height."""
    return max(round(pixels / 32), 1) * 32


def largest_side(sizes: Any) -> float:
    """Side of the square with the largest of some areas, each the side of a square or [width, height]."""
    sizes = sizes if isinstance(sizes, list) else [sizes]
    sides = [(number(s[0]) * number(s[1])) ** 0.5 if isinstance(s, list) and len(s) == 2 else number(s) for s in sizes]
    if not sides or min(sides) <= 0:
        raise Expected("a size in pixels, or a list of them")
    return max(sides)


def shapes_of_area(side: float) -> list[tuple[int, int]]:
    """Square, landscape and portrait with about the area of a square of `side` pixels."""
    long, short = side * (16 / 9) ** 0.5, side * (9 / 16) ** 0.5
    sizes = [(side, side), (long, short), (short, long)]
    return [(multiple_of_32(width), multiple_of_32(height)) for width, height in sizes]


def buckets_of(sizes: Iterable[tuple[int, int]], frames: Iterable[int]) -> str:
    """The text of `--resolution-buckets`."""
    counts = sorted(set(frames))
    return ";".join(f"{width}x{height}x{count}" for width, height in dict.fromkeys(sizes) for count in counts)


def is_ltx2(name: str) -> bool:
    """Whether a name or path is that of an LTX-2 model; LTX-Video is an older architecture."""
    return "ltx2" in "".join(letter for letter in name.lower() if letter.isalnum())


@dataclass
class Conversion:
    """A conversion in progress.

    Attributes:
        origin: path of the file.
        ranks: number of processes of the original job.
        result: the job so far.
        problems: values that cannot be read, to be reported at once.
    """

    origin: str
    ranks: int
    result: Imported = field(default_factory=Imported)
    problems: list[Problem] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def read(self, key: str, value: Any, convert: Callable[[Any], Any], default: Any = None) -> Any:
        """Converts a value; without one, or if it is invalid, returns `default`."""
        if value is None:
            return default
        try:
            return convert(value)
        except Expected as error:
            self.problems.append(Problem(key, value, str(error), "correct it there", self.origin))
            return default

    def note(self, key: str, value: Any, reason: str) -> None:
        """Notes what happened to a key."""
        self.result.note(key, value, reason)

    def section(self, where: str, values: Any) -> Table:
        """A table, empty without one; another value is a problem."""
        if values is not None and not isinstance(values, dict):
            self.problems.append(Problem(where, values, "a table", "write its keys below it", self.origin))
        return values if isinstance(values, dict) else {}

    def table(self, where: str, values: Any, rules: Mapping[str, Rule]) -> Table:
        """Applies the rules to each key of a table and returns the table. Options that are off are not noted."""
        values = self.section(where, values)
        for name, value in values.items():
            key = f"{where}.{name}" if where else str(name)
            rule = rules.get(name, UNKNOWN)
            if isinstance(rule, To):
                if (converted := self.read(key, value, rule.convert)) is not None:
                    self.result.put(rule.key, converted)
            elif rule is not HANDLED and (rule is UNKNOWN or value not in (None, False, "", 0, [], {})):
                self.note(key, value, rule)
        return values

    def tables(self, where: str, values: Any) -> list[Table]:
        """A list of tables, without entries that are none."""
        if values is None:
            return []
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.problems.append(Problem(where, values, "a list of tables", "write their keys below it", self.origin))
            return []
        return values

    def beside(self, path: str) -> Path | None:
        """A file that the job names, from the current folder or from that of the job; None if there is none."""
        candidates = (Path(path).expanduser(), Path(self.origin).parent / path)
        return next((file for file in candidates if file.is_file()), None)

    def dataset_file(self, key: str, path: str) -> Table:
        """Tables of the dataset file that a job names; without it, a placeholder for the data and a note."""
        if (file := self.beside(path)) is None:
            self.result.job.setdefault("data", {})["root"] = "clips"
            self.note(key, path, "not on this machine; import it by itself for data.sources, and remove data.root")
            return {}
        try:
            return tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            self.problems.append(Problem(key, path, f"valid TOML ({error})", "correct it there", self.origin))
            return {}

    def model(self, key: str, path: str, is_ours: bool) -> None:
        """Sets the base model, or a placeholder with the note that it must be set."""
        self.result.put("model.checkpoint_path", path if is_ours and path.endswith(".safetensors") else CHECKPOINT)
        if not is_ours:
            reason = "is another model: data, optimizer and sampling are converted; set model.checkpoint_path"
            self.note(key, path, f"{reason} to the file of an LTX-2 model")
        elif not path.endswith(".safetensors"):
            self.note(key, path, "is no file; set model.checkpoint_path to the official .safetensors file")

    def streams(self, has_audio: bool) -> None:
        """Sets the streams: video, and audio if it is trained."""
        self.result.job["video"] = {"is_generated": True, "latents_dir": "latents"}
        if has_audio:
            self.result.job["audio"] = {"is_generated": True, "latents_dir": "audio_latents"}

    def adapter(self, key: str, kind: Any, rank: int, alpha: float) -> None:
        """Sets LoRA adapters, also in place of a kind that we do not have."""
        self.result.put("model.mode", "lora")
        self.result.put("lora.rank", rank)
        self.result.put("lora.alpha", alpha)
        if str(kind).lower() == "dora":
            self.result.put("lora.dora", True)
        elif (reason := unsupported_adapter(kind)) is not None:
            self.note(key, kind, f"a LoRA is trained: {reason}")
        elif str(kind).lower() != "lora":
            self.note(key, kind, "a LoRA is trained; other adapters are not supported")

    def all_linears(self) -> None:
        """Adapts attention and feed-forward layers, for trainers that adapt every linear layer of a block."""
        parts = ["all_attention", *(f"{name}_ffn" for name in ("video", "audio") if name in self.result.job)]
        self.result.put("lora.targets", parts)

    def sigma(self, shift: float | None, std: float = 1.0) -> None:
        """Sets logit-normal sigmas, whose odds are multiplied by `shift`; notes the difference that stays."""
        keys = {"name": "shifted_logit_normal", "shift": shift, "std": std, "uniform_prob": 0.0}
        self.result.job["sigma"] = {key: value for key, value in keys.items() if value is not None}
        self.result.notes.append(
            "sigma: close to the original, not equal: the distribution is stretched so that its 0.5 % and 99.9 % "
            "quantiles are 0 and 1"
        )

    def frames(self, key: str, counts: Any) -> list[int]:
        """Valid numbers of frames from a number or a list; a change is noted."""
        counts = list(counts) if isinstance(counts, list | tuple) else [counts]
        found = [self.read(key, count, frames_of, 1) for count in counts]
        if found != counts:
            self.note(key, counts, f"is 1 + a multiple of 8 here: {found}")
        return found

    def dims(self, key: str, size: list[Any]) -> list[int]:
        """Valid width, height and frames of a sampled clip; a change is noted."""
        width, height = (multiple_of_32(self.read(key, side, number, 512)) for side in size[:2])
        found = [width, height, self.read(key, size[2], frames_of, 1)]
        if found != size:
            self.note(key, size, f"is rounded to multiples of 32 and 1 + a multiple of 8 frames: {found}")
        return found

    def base_dtype(self, key: str, kind: str) -> None:
        """Sets the format of the frozen weights."""
        form = kind.split("|")[0].lower()
        name = next((ours for ours, theirs in _BASE_DTYPES.items() if form in theirs), "int4")
        self.result.put("lora.base_dtype", name)
        if form not in _BASE_DTYPES[name]:
            self.note(key, kind, f'is not supported; lora.base_dtype = "{name}"')
        elif "|" in kind:
            self.note(key, kind, f'lora.base_dtype = "{name}", without the adapter that recovers accuracy')

    def optimizer(self, key: str, name: Any, rate_key: str, rate: Any, where: str, options: Table) -> None:
        """Sets the optimizer; one that we do not have becomes AdamW at our default rate, since rates do not compare."""
        kind = str(name).lower()
        ours = _OPTIMIZERS.get(kind)
        self.result.put("optimizer.name", ours or "adamw")
        if kind in _RENAMED_OPTIMIZERS:
            self.note(key, name, _RENAMED_OPTIMIZERS[kind])
        if ours is None:
            self.note(key, name, 'is not supported; optimizer.name = "adamw", with a learning rate from docs/tips.md')
            self.note(rate_key, rate, f"is a rate of {name}; optimizer.lr is our default, 1e-4")
        elif (value := self.read(rate_key, rate, number)) is not None:
            if ours == "prodigy" and value < _LOWEST_PRODIGY_LR:
                self.note(rate_key, rate, "is a rate of AdamW; optimizer.lr is 1, a factor on Prodigy's own step size")
            else:
                self.result.put("optimizer.lr", value)
        if ours in _WITHOUT_DECAY:
            self.result.put("optimizer.weight_decay", 0.0)
        for option, value in options.items():
            path = f"{where}.{option}"
            if ours is None:
                self.note(path, value, f"is an option of {name}")
            elif option == "weight_decay":
                self.result.put("optimizer.weight_decay", self.read(path, value, number, 0.01))
            elif option == "betas" and ours in _ADAMW and isinstance(value, list | tuple) and len(value) == 2:
                self.result.put("optimizer.betas", [self.read(path, beta, number, 0.9) for beta in value])
            elif option == "eps" and ours in _ADAMW:
                self.result.put("optimizer.eps", self.read(path, value, number, 1e-8))
            elif option == "d_coef" and ours == "prodigy":
                self.result.put("optimizer.d_coef", self.read(path, value, number, 1.0))
            elif ours == "prodigy" and option in _PRODIGY:
                if str(value).lower() != _PRODIGY[option]:
                    self.note(path, value, f"is {_PRODIGY[option]} here")
            else:
                self.note(path, value, f"optimizer.{self.result.job['optimizer']['name']} has no such option")

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer, which is converted first, averages the weights itself."""
        return self.result.job["optimizer"]["name"] == "adamw_schedulefree"

    def schedule(self, key: str, name: str, warmup: int, min_factor: float | None = None, power: float = 1.0) -> None:
        """Sets the learning-rate schedule, whose linear decay ends at 0 in all three trainers."""
        ours = _SCHEDULES.get(name)
        if ours != "constant" and self.is_schedule_free:
            self.note(key, name, 'scheduler.name = "constant": adamw_schedulefree averages instead')
            ours = "constant"
        self.result.put("scheduler.name", ours or "constant")
        self.result.put("scheduler.warmup_steps", warmup)
        if ours is None:
            self.note(key, name, 'is not supported; scheduler.name = "constant"')
        elif ours == "linear":
            self.result.put("scheduler.end_factor", min_factor or 0.0)
        elif ours == "cosine" and min_factor is not None:
            self.result.put("scheduler.min_factor", min_factor)
        elif ours == "polynomial":
            self.result.put("scheduler.power", power)

    def batch(self, size: int, accumulation: int, key: str, ranks: int) -> None:
        """Sets the batch, which is a total here and per process there."""
        total = size * accumulation * ranks
        self.result.put("training.global_batch_size", total)
        self.result.put("training.local_batch_size", size)
        reason = f"is per process; training.global_batch_size = {total} is the total of {ranks} (--ranks)"
        self.note(key, size, reason)

    def source(self, path: str, buckets: str, *options: str, with_audio: bool = False, **keys: Any) -> None:
        """Adds a folder or table of clips as a source, and the command line that prepares it.

        Args:
            path: folder of clips, or a table.
            buckets: shapes of the samples.
            options: further options of `process-dataset`.
            with_audio: whether the audio of videos is prepared.
            keys: other keys of the source; None is unset.
        """
        sources = self.result.job.setdefault("data", {}).setdefault("sources", [])
        is_table = Path(path).suffix in (".jsonl", ".json", ".csv")
        root = folder = Path(path).parent.as_posix() if is_table else path
        # The same clips in other shapes are another dataset here.
        if root in {source["root"] for source in sources}:
            root = f"{folder.rstrip('/')}-{len(sources)}"
        source = {"root": root} | {key: value for key, value in keys.items() if value is not None}
        label = SourceSection(root=root).label
        if label in self._names:
            label = source["name"] = f"{label}_{len(sources)}"
        self._names.add(label)
        sources.append(source)
        command = ["ltx-titan", "process-dataset", path, "--model-path"]
        command += [self.result.job.get("model", {}).get("checkpoint_path", CHECKPOINT)]
        command += ["--text-encoder-path", TEXT_ENCODER, "--resolution-buckets", buckets, *options]
        command += [] if with_audio else ["--skip-audio"]
        command += [] if root == folder else ["--output-dir", root]
        self.result.commands.append(shlex.join(command))

    def prompts(self, samples: list[Table], interval: int | None, **keys: Any) -> None:
        """Sets the sampled clips; without any, or without an interval, nothing is sampled."""
        if not samples or not interval:
            return
        for key, value in {**keys, "samples": samples, "interval": interval}.items():
            if value is not None:
                self.result.put(f"validation.{key}", value)
        reason = "set validation.text_encoder_path to the folder of the text encoder; STG, modality guidance and audio "
        self.result.notes.append(f"validation: {reason}guidance keep our defaults")
