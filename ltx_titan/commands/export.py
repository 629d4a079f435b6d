"""`ltx-titan export`: the file for inference tools, made from a checkpoint in one process without a GPU.

A checkpoint holds the job that saved it, so nothing but its folder is needed, and it may come from any mesh. A full
model is streamed tensor by tensor; adapters are read at once.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ValidationError
from torch import Tensor

from ltx_titan.build import export_adapters
from ltx_titan.checkpoint import SavedTensors, read_trainer_state
from ltx_titan.common.options import Maybe, Positional, placeholder
from ltx_titan.common.tensors import COMPUTE_DTYPES
from ltx_titan.config import ExportLayout, JobConfig
from ltx_titan.lora import adapter_weights, apply_lora, is_adapter
from ltx_titan.optim.schedule_free import average_of
from ltx_titan.plan import build_transformer, export_name, trained_modalities
from ltx_titan.weights import (
    TRANSFORMER,
    ExportTensor,
    complete_export,
    export_safetensors,
    module_tensors,
    read_source,
)

DESCRIPTION = """\
Export a checkpoint for inference tools: a LoRA file for LoRA jobs, otherwise the whole transformer. The result is the
one that training writes to export/ at its end. One process; a GPU is not used.

examples:
  ltx-titan export outputs/job/checkpoint/step-2000 lora.safetensors
  ltx-titan export outputs/job/checkpoint/step-2000 exports/ --dtype float32
"""


@dataclass(frozen=True)
class ExportOptions:
    """Options of `ltx-titan export`."""

    checkpoint: Annotated[Positional[Path], placeholder("CHECKPOINT")]
    """Step folder of a run: DUMP_FOLDER/checkpoint/step-N."""

    out: Annotated[Positional[Path], placeholder("OUT")]
    """File to write (.safetensors), or an existing folder."""

    dtype: Maybe[Literal["bfloat16", "float32"]] = None
    """Precision of the weights. Default: checkpoint.export_dtype of the job."""

    layout: Maybe[ExportLayout] = None
    """Whether a transformer's file holds the text connectors, or all that the base's file has. Default:
    checkpoint.export_layout of the job."""


def run(options: ExportOptions) -> int:
    """Runs the command and prints the path of the file."""
    print(export_checkpoint(options))
    return 0


def export_checkpoint(options: ExportOptions) -> Path:
    """Writes the export of a checkpoint; returns its path.

    Raises:
        ValueError: the folder is not a complete checkpoint, its base model is missing or another one, a weight is not
            finite, or the disk is full.
    """
    saved = SavedTensors(options.checkpoint)
    trainer = read_trainer_state(options.checkpoint)
    job = _job(options.checkpoint, trainer)
    path = options.out / export_name(job, trainer["step"]) if options.out.is_dir() else options.out
    if path.suffix != ".safetensors":
        raise ValueError(
            f"OUT is {str(path)!r}; expected a file name that ends in .safetensors, or an existing folder."
        )
    model = job.model
    source = read_source(model.checkpoint_path if model.init == "checkpoint" else None, model.shape, model.num_layers)
    for name, taken in (("model.checkpoint_path", source.path), ("model.connectors_path", model.connectors_path)):
        if taken is not None and path.resolve() == Path(taken).expanduser().resolve():
            raise ValueError(f"OUT is {str(path)!r}, which is {name} of the job; choose another name.")
    transformer = build_transformer(source, trained_modalities(job))
    dtype = COMPUTE_DTYPES[options.dtype or job.checkpoint.export_dtype]
    layout = options.layout or job.checkpoint.export_layout
    if model.mode == "lora":
        apply_lora(transformer, job.lora)
        names = [name for name in module_tensors(transformer) if is_adapter(name)]
        _check_names(options.checkpoint, names, saved)
        # The frozen base stays on the meta device: only adapters are in the checkpoint, and in the file.
        transformer.load_state_dict({name: _weight(saved, name, job) for name in names}, strict=False, assign=True)
        scale = trainer.get("reference_scale")
        scale = None if scale is None else (scale[0], scale[1])
        export_adapters(adapter_weights(transformer), path, job, source, scale, dtype, layout)
        return path
    names = list(module_tensors(transformer))
    _check_names(options.checkpoint, names, saved)
    tensors = [
        ExportTensor(
            TRANSFORMER.file_key(name),
            tuple(saved.entries[f"model.{name}"].size),
            dtype,
            partial(_weight, saved, name, job),
        )
        for name in names
    ]
    export_safetensors(path, *complete_export(tensors, source, model.connectors_path, layout))
    return path


def _job(checkpoint: Path, trainer: dict[str, Any]) -> JobConfig:
    """The job that saved a checkpoint; rules between its keys were checked when it was trained."""
    try:
        return JobConfig.model_validate(trainer.get("job"))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        raise ValueError(
            f"{checkpoint}: its trainer.json holds no job of this version of ltx_titan ({key}: {detail['msg']}). "
            f"Export with the version that trained it."
        ) from error


def _weight(saved: SavedTensors, name: str, job: JobConfig) -> Tensor:
    """A weight as training exports it: of schedule-free AdamW the average, which the checkpoint has no tensor of."""
    weight, state = saved.read(f"model.{name}"), f"optimizer.{name}.z"
    return average_of(weight, saved.read(state), job.optimizer.betas[0]) if state in saved.entries else weight


def _check_names(checkpoint: Path, names: list[str], saved: SavedTensors) -> None:
    missing = [name for name in names if f"model.{name}" not in saved.entries]
    if missing:
        raise ValueError(
            f"{checkpoint}: {len(missing)} of the job's {len(names)} tensors are not in it, such as {missing[0]}. The "
            f"file at model.checkpoint_path is not the one that the job was trained from."
        )
