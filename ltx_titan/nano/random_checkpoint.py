"""`ltx-titan make-checkpoint`: a checkpoint with the size, names and metadata of a released model and random weights.

It replaces the official 38 GB in measurements of loading time, memory and speed. Sampling 19 billion normal numbers
would take longer than writing them, so all tensors are slices of one bank of numbers, each from an offset that is
hashed from its name, scaled like initial weights. A tensor loaded under another name therefore differs. Memory: the
bank and one tensor.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn

from ltx_titan.common.options import Flag, Maybe, Positional, placeholder
from ltx_titan.common.tensors import on_meta
from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.model.init import initial_spread
from ltx_titan.weights import CONNECTORS, TRANSFORMER, Component, ExportTensor, export_safetensors, released_config

DESCRIPTION = """\
Write a checkpoint with the shape of a released model and random weights: official names and metadata, bfloat16. Jobs
load and train it like the official file, so that loading time, memory and speed can be measured without that file.
The transformer of ltx-2.3-22b takes 38.0 GB; --num-layers keeps fewer of its 48 blocks (0.77 GB each).

example:
  ltx-titan make-checkpoint --shape ltx-2.3-22b /scratch/ltx-2.3-22b-random.safetensors
  torchrun --nproc-per-node 4 -m ltx_titan.benchmarks.load /scratch/ltx-2.3-22b-random.safetensors
"""

VERSIONS = {"ltx-2-19b": "2.0.0", "ltx-2.3-22b": "2.3.0", "ltx-2.5-22b": "2.5.0"}

# A prime, so that rows of a tensor larger than the bank do not repeat.
_BANK = 16_777_213


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of `ltx-titan make-checkpoint`."""

    out: Annotated[Positional[Path], placeholder("OUT.safetensors")]
    """File to write."""

    shape: str = "ltx-2.3-22b"
    """ltx-2-19b, ltx-2.3-22b, ltx-2.5-22b, or a JSON file with checkpoint metadata."""

    num_layers: Maybe[int] = None
    """Number of transformer blocks to keep. Default: all."""

    connectors: Flag = False
    """Also write the text connectors."""

    seed: int = 0
    """Seed of the weights; the same seed gives the same bytes."""


def run(options: CheckpointOptions) -> int:
    """Runs the command; returns the exit status.

    Raises:
        ValueError: `--num-layers` is less than 1, or as `make_checkpoint`.
    """
    if options.num_layers is not None and options.num_layers < 1:
        raise ValueError(f"--num-layers: expected at least 1, found {options.num_layers}.")
    size = make_checkpoint(
        options.out,
        options.shape,
        num_layers=options.num_layers,
        connectors=options.connectors,
        seed=options.seed,
    )
    print(f"{options.out}: {size / 1e9:.2f} GB of random weights, shape {options.shape}")
    return 0


def make_checkpoint(
    path: str | Path, shape: str, *, num_layers: int | None = None, connectors: bool = False, seed: int = 0
) -> int:
    """Writes the file, tensor by tensor; the same bytes for the same arguments.

    Args:
        path: file to write, atomically.
        shape: released model, or a JSON file with checkpoint metadata.
        num_layers: number of transformer blocks; None keeps all.
        connectors: also write the text connectors, for data of text features.
        seed: seed of the weights.

    Returns:
        Size of the weights in bytes.

    Raises:
        ValueError: the shape is unknown, or the disk is too small.
    """
    config = released_config(shape)
    if num_layers is not None:
        config["transformer"]["num_layers"] = num_layers
    # Drawn once: 19 billion normal numbers would take longer than writing them.
    bank = torch.randn(_BANK, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    tensors = [
        ExportTensor(key, dims, torch.bfloat16, partial(_cut, bank, key, dims))
        for key, dims in official_shapes(config, connectors)
    ]
    metadata = {"config": json.dumps(config)}
    if shape in VERSIONS:
        metadata["model_version"] = VERSIONS[shape]
    size = sum(2 * math.prod(tensor.shape) for tensor in tensors)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(Path(path).name, total=size)
        export_safetensors(path, [_reporting(tensor, progress, task) for tensor in tensors], metadata)
    return size


def official_shapes(config: dict[str, Any], connectors: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a transformer in a file, and of its text connectors."""
    with on_meta():
        parts: list[tuple[Component, nn.Module]] = [(TRANSFORMER, LTXTransformer.from_config(config["transformer"]))]
        if connectors:
            parts.append((CONNECTORS, TextConnectors.from_config(config)))
    for component, module in parts:
        for name, tensor in module.state_dict().items():
            yield component.file_key(name), tuple(tensor.shape)


def _cut(bank: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    mean, std = initial_spread(name, shape)
    # Norm weights and biases are constants, as at the start of training.
    if std == 0:
        return torch.full(shape, mean, dtype=torch.bfloat16)
    count = math.prod(shape)
    # Not `hash`, which Python salts per process.
    start = int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) % _BANK
    tensor = torch.empty(count, dtype=torch.bfloat16)
    filled = 0
    while filled < count:
        piece = bank[start : start + count - filled]
        torch.mul(piece, std, out=tensor[filled : filled + len(piece)])
        # The bank repeats from its start.
        filled, start = filled + len(piece), 0
    return tensor.view(shape)


def _reporting(tensor: ExportTensor, progress: Progress, task: int) -> ExportTensor:
    def read() -> Tensor:
        assert not isinstance(tensor.source, Tensor)
        # Read when it is written, so that memory holds one tensor.
        value = tensor.source()
        progress.advance(task, value.nbytes)
        return value

    return ExportTensor(tensor.name, tensor.shape, tensor.dtype, read)
