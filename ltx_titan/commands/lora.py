"""`ltx-titan lora ...`: shows, merges, extracts, converts and resizes LoRA files, of this and of other trainers.

torch is imported by what runs, so that `--help` appears at once.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from rich.console import Console

from ltx_titan.commands.report import Report
from ltx_titan.common.options import Flag, Maybe, Positional, default_device, placeholder
from ltx_titan.config import ExportLayout
from ltx_titan.config.base import ComputeDtype

if TYPE_CHECKING:
    from ltx_titan.weights import Approximation

_INFO = """\
Show what a LoRA file is: base model, rank, alpha, trigger word, license and job, as far as the file states them, and
the size of its update by kind of layer. Files of ComfyUI, diffusers, PEFT, kohya, musubi-tuner and DiffSynth are read.

examples:
  ltx-titan lora info lora-step-2000.safetensors
  ltx-titan lora info lora-step-2000.safetensors --layers
  ltx-titan lora info lora-step-2000.safetensors --json | jq .layers
"""
_MERGE = """\
Merge a LoRA into a checkpoint: W + strength B A, computed in float32 and rounded once. One weight at a time is in
memory, and the file appears under its name when it is complete. Quantized weights become bfloat16.

examples:
  ltx-titan lora merge ltx-2.3-22b-dev.safetensors lora-step-2000.safetensors merged.safetensors
  ltx-titan lora merge ltx-2.3-22b-dev.safetensors style.safetensors merged.safetensors --strength 0.7
"""
_EXTRACT = """\
Make a LoRA from the difference of two checkpoints of one model, such as a full fine-tune and its base, by singular
value decomposition. The relative error of the approximation is printed; a higher rank lowers it. Biases, norms and
tables that changed cannot be stored in a LoRA, and their share of the change is printed. Use a GPU if there is one.

examples:
  ltx-titan lora extract ltx-2.3-22b-dev.safetensors transformer-step-2000.safetensors lora.safetensors --rank 64
"""
_CONVERT = """\
Convert a LoRA for another tool. Any dialect is read; the update stays the same.
  comfyui     diffusion_model.<layer>.lora_A.weight: ComfyUI, ltx-pipelines, diffusers
  diffusers   transformer.<layer in diffusers' names>.lora_A.weight
  peft        a folder with adapter_model.safetensors and adapter_config.json
  kohya       lora_unet_<layer>.lora_down.weight and .alpha: kohya's scripts, musubi-tuner

examples:
  ltx-titan lora convert style.safetensors style-comfyui.safetensors
  ltx-titan lora convert lora-step-2000.safetensors lora-peft --to peft
"""
_RESIZE = """\
Reduce a LoRA to a smaller rank by singular value decomposition: a smaller file with nearly the same effect. The
relative error is printed. Layers that already have that rank, or a smaller one, are copied.

examples:
  ltx-titan lora resize lora-step-2000.safetensors lora-rank-16.safetensors --rank 16
"""


@dataclass(frozen=True)
class InfoOptions:
    """Options of `ltx-titan lora info`."""

    lora: Annotated[Positional[Path], placeholder("LORA")]
    """LoRA file (.safetensors)."""

    layers: Flag = False
    """List every layer."""

    json: Flag = False
    """Print JSON, with every layer and all metadata."""


@dataclass(frozen=True)
class MergeOptions:
    """Options of `ltx-titan lora merge`."""

    base: Annotated[Positional[Path], placeholder("BASE")]
    """Checkpoint (.safetensors) that the LoRA was trained for."""

    lora: Annotated[Positional[Path], placeholder("LORA")]
    """LoRA file (.safetensors)."""

    out: Annotated[Positional[Path], placeholder("OUT")]
    """File to write (.safetensors)."""

    strength: float = 1.0
    """Factor on the change that the LoRA makes."""

    layout: ExportLayout = "complete"
    """Write all that the base file has, the transformer with its text connectors, or the transformer alone."""


@dataclass(frozen=True)
class ExtractOptions:
    """Options of `ltx-titan lora extract`."""

    base: Annotated[Positional[Path], placeholder("BASE")]
    """Checkpoint (.safetensors) that the other one was trained from."""

    tuned: Annotated[Positional[Path], placeholder("TUNED")]
    """Checkpoint (.safetensors) with the changed weights."""

    out: Annotated[Positional[Path], placeholder("OUT")]
    """LoRA file to write (.safetensors)."""

    rank: int = 64
    """Rank of the LoRA."""

    dtype: ComputeDtype = "bfloat16"
    """Precision of the LoRA."""

    device: Maybe[str] = None
    """Device of the decompositions. Default: cuda if there is a GPU, else cpu."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `ltx-titan lora convert`."""

    lora: Annotated[Positional[Path], placeholder("LORA")]
    """LoRA file (.safetensors) of any dialect."""

    out: Annotated[Positional[Path], placeholder("OUT")]
    """File to write (.safetensors); a folder with --to peft."""

    to: Literal["comfyui", "diffusers", "peft", "kohya"] = "comfyui"
    """Dialect to write."""

    dtype: Maybe[ComputeDtype] = None
    """Precision of the tensors. Default: that of the file."""


@dataclass(frozen=True)
class ResizeOptions:
    """Options of `ltx-titan lora resize`."""

    lora: Annotated[Positional[Path], placeholder("LORA")]
    """LoRA file (.safetensors)."""

    out: Annotated[Positional[Path], placeholder("OUT")]
    """File to write (.safetensors)."""

    rank: int = 16
    """Largest rank of the result."""


def info(options: InfoOptions) -> int:
    """Runs `ltx-titan lora info`."""
    from ltx_titan.weights import LoRAFacts, dialect_of, read_lora, update_norm

    layers, metadata = read_lora(options.lora)
    facts = LoRAFacts.read(metadata.raw)
    norms = {name: update_norm(layer) for name, layer in layers.items()}
    ranks = sorted({layer.lora_a.shape[0] for layer in layers.values()})
    scales = sorted({round(layer.scaling, 6) for layer in layers.values()})
    dtypes = sorted({str(layer.lora_a.dtype).removeprefix("torch.") for layer in layers.values()})
    if options.json:
        described = {
            name: {
                "rank": layer.lora_a.shape[0],
                "shape": layer.weight_shape,
                "scale": layer.scaling,
                "norm": norms[name],
            }
            for name, layer in layers.items()
        }
        values = {"dialect": dialect_of(metadata), **vars(facts), "layers": described, "metadata": metadata.raw}
        print(json.dumps(values, indent=2))
        return 0
    lines = {
        "dialect": dialect_of(metadata),
        "base": facts.base,
        "rank": " or ".join(map(str, ranks)),
        "alpha": facts.alpha,
        "scale of B A": " or ".join(f"{scale:g}" for scale in scales),
        "trigger": facts.trigger,
        "license": facts.license,
        "job": facts.job_digest,
        "layers": f"{len(layers)}, {', '.join(dtypes)}, {metadata.path.stat().st_size / 2**20:,.1f} MiB",
    }
    for key, value in lines.items():
        print(f"{key:<13} {value or 'not stated'}")
    print(f"\n{'update |s B A|':<48} {'layers':>6} {'mean':>10} {'largest':>10}")
    groups: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        groups[name if options.layers else _kind(name)].append(norm)
    for kind, values_ in groups.items():
        print(f"{kind:<48} {len(values_):>6} {sum(values_) / len(values_):>10.4g} {max(values_):>10.4g}")
    return 0


def merge(options: MergeOptions) -> int:
    """Runs `ltx-titan lora merge`."""
    from ltx_titan.weights import check_layers, export_merged, read_lora

    _check_out(options.out, options.base, options.lora)
    layers, _ = read_lora(options.lora)
    scaled = {name: replace(layer, scaling=options.strength * layer.scaling) for name, layer in layers.items()}
    # Of linear layers; here, because the message of the merge itself is about the base file.
    shapes = {name.removesuffix(".weight"): shape for name, shape in _shapes(options.base).items() if len(shape) == 2}
    check_layers(options.lora, layers, shapes, complete=False)
    with _progress("merge", len(_shapes(options.base))) as done:
        export_merged(scaled, options.base, options.out, layout=options.layout, done=done)
    print(f"{options.out}  {len(layers)} layers of {options.lora.name} merged with strength {options.strength:g}")
    return 0


def extract(options: ExtractOptions) -> int:
    """Runs `ltx-titan lora extract`."""
    import torch

    from ltx_titan.common.tensors import COMPUTE_DTYPES
    from ltx_titan.weights import extract_lora, lora_header, read_metadata, read_source, write_lora

    _check_rank(options.rank)
    _check_out(options.out, options.base, options.tuned)
    device, dtype = torch.device(options.device or default_device()), COMPUTE_DTYPES[options.dtype]
    with _progress("extract", len(_shapes(options.base))) as done:
        result = extract_lora(options.base, options.tuned, options.rank, device, dtype, done)
    header = lora_header(
        read_source(str(options.base), None, None),
        title=options.out.stem,
        rank=options.rank,
        alpha=options.rank,
        license_=read_metadata(options.tuned).raw.get("license"),
    )
    write_lora(result.layers, options.out, header)
    _print_error(result, options.out, options.rank)
    if result.other:
        share = sum(result.other.values()) / (sum(result.other.values()) + sum(result.norms.values()))
        print(
            f"{len(result.other)} tensors that changed cannot be stored in a LoRA (biases, norms, tables), such as "
            f"{next(iter(result.other))}: {100 * share**0.5:.2g} % of the whole change"
        )
    return 0


def convert(options: ConvertOptions) -> int:
    """Runs `ltx-titan lora convert`."""
    from ltx_titan.common.tensors import COMPUTE_DTYPES
    from ltx_titan.weights import dialect_of, read_lora, write_lora

    if options.to == "peft":
        if options.out.suffix or options.out.is_file():
            raise ValueError(f"OUT is {str(options.out)!r}; expected a folder, since PEFT reads two files.")
    else:
        _check_out(options.out, options.lora)
    layers, metadata = read_lora(options.lora)
    dtype = None if options.dtype is None else COMPUTE_DTYPES[options.dtype]
    path = write_lora(layers, options.out, metadata.raw, options.to, dtype)
    print(f"{path}  {len(layers)} layers, {dialect_of(metadata)} -> {options.to}")
    return 0


def resize(options: ResizeOptions) -> int:
    """Runs `ltx-titan lora resize`."""
    from ltx_titan.weights import read_lora, resize_lora, write_lora

    _check_rank(options.rank)
    _check_out(options.out, options.lora)
    layers, metadata = read_lora(options.lora)
    largest = max(layer.lora_a.shape[0] for layer in layers.values())
    if largest <= options.rank:
        raise ValueError(f"--rank {options.rank}: expected less than the file's rank, which is {largest}.")
    with _progress("resize", len(layers)) as done:
        result = resize_lora(layers, options.rank, done)
    write_lora(result.layers, options.out, metadata.raw)
    _print_error(result, options.out, options.rank)
    return 0


def _print_error(result: "Approximation", path: Path, rank: int) -> None:
    name, worst = result.worst()
    print(f"{path}  {len(result.layers)} layers of rank {rank}")
    print(f"relative error {100 * result.error:.3g} % (largest: {100 * worst:.3g} % in {name})")


def _kind(name: str) -> str:
    """A layer's name without the number of its block."""
    head, _, rest = name.partition("transformer_blocks.")
    return f"{head}{rest.partition('.')[2]}" if rest else name


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a file's transformer, by official name."""
    from ltx_titan.weights import TRANSFORMER, read_metadata, stored_weights

    weights = stored_weights(read_metadata(path))
    names = {key: TRANSFORMER.module_name(key) for key in weights}
    return {name: weights[key].shape for key, name in names.items() if name is not None}


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"--rank {rank}: expected a positive number.")


def _check_out(out: Path, *inputs: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"OUT is {str(out)!r}; expected a file name that ends in .safetensors.")
    if any(out.resolve() == path.resolve() for path in inputs):
        raise ValueError(f"OUT is {str(out)!r}, which is also an input; choose another name.")


@contextmanager
def _progress(stage: str, total: int) -> Iterator[Callable[[], None]]:
    # On standard error: standard output holds the result.
    with Report(Console(stderr=True)).progress(stage, total) as ticker:
        yield ticker.advance


class Command(NamedTuple):
    """One command of this module, with the names that `ltx_titan.cli` expects of a module with a single command."""

    DESCRIPTION: str
    run: Callable[[Any], int]


INFO = Command(_INFO, info)
MERGE = Command(_MERGE, merge)
EXTRACT = Command(_EXTRACT, extract)
CONVERT = Command(_CONVERT, convert)
RESIZE = Command(_RESIZE, resize)
