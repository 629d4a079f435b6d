"""`ltx-titan make-checkpoint`: a file of a released model's size, names and metadata, with random weights.

It stands in for the official 38 GB where what matters is bytes and not pictures: measuring how fast they are loaded,
how much memory that takes, whether a job fits. Drawing 19 billion normal numbers would take longer than writing them,
so all tensors are cut from one bank of them, each at a place that follows from its name, and scaled as new weights are.
A tensor that ends up under another's name is therefore noticed. Memory: the bank and one tensor.
"""

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.model.init import initial_spread
from ltx_titan.weights import CONNECTORS, RELEASED, TRANSFORMER, ExportTensor, export_safetensors, released_config

DESCRIPTION = """\
Write a checkpoint of a released model's shape with random weights: official names and metadata, bfloat16. Jobs load and
train it as they would the official file, so that loading times, memory and speed can be measured without it.
The transformer of ltx-2.3-22b takes 38.0 GB; --num-layers keeps fewer of its 48 blocks (0.77 GB each).

example:
  ltx-titan make-checkpoint --shape ltx-2.3-22b /scratch/ltx-2.3-22b-random.safetensors
  torchrun --nproc-per-node 4 -m ltx_titan.benchmarks.load /scratch/ltx-2.3-22b-random.safetensors
"""

VERSIONS = {"ltx-2-19b": "2.0.0", "ltx-2.3-22b": "2.3.0", "ltx-2.5-22b": "2.5.0"}

# A prime, so that rows of a tensor larger than the bank do not repeat one another.
_BANK = 16_777_213


def make_checkpoint(
    path: str | Path, shape: str, *, num_layers: int | None = None, connectors: bool = False, seed: int = 0
) -> int:
    """Writes the file, tensor by tensor; the same bytes for the same arguments.

    Args:
        path: target; appears when complete.
        shape: released model, or a JSON file with checkpoint metadata.
        num_layers: blocks to keep; None keeps all.
        connectors: also write the text connectors, for data that holds text features.
        seed: of the weights.

    Returns:
        Bytes of weights.

    Raises:
        ValueError: the shape is unknown, or the disk is too small.
    """
    config = released_config(shape)
    if num_layers is not None:
        config["transformer"]["num_layers"] = num_layers
    bank = torch.randn(_BANK, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    tensors = [
        ExportTensor(key, dims, torch.bfloat16, partial(_cut, bank, key, dims))
        for key, dims in _official_shapes(config, connectors)
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


def _official_shapes(config: dict[str, Any], connectors: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        parts = [(TRANSFORMER, LTXTransformer.from_config(config["transformer"]))]
        if connectors:
            parts.append((CONNECTORS, TextConnectors.from_config(config)))
    for component, module in parts:
        for name, tensor in module.state_dict().items():
            yield component.file_key(name), tuple(tensor.shape)


def _cut(bank: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    mean, std = initial_spread(name, shape)
    if std == 0:
        return torch.full(shape, mean, dtype=torch.bfloat16)
    count, start = math.prod(shape), int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) % _BANK
    tensor = torch.empty(count, dtype=torch.bfloat16)
    filled = 0
    while filled < count:
        piece = bank[start : start + count - filled]
        torch.mul(piece, std, out=tensor[filled : filled + len(piece)])
        filled, start = filled + len(piece), 0
    return tensor.view(shape)


def _reporting(tensor: ExportTensor, progress: Progress, task: int) -> ExportTensor:
    def read() -> Tensor:
        value = tensor.source()
        progress.advance(task, value.nbytes)
        return value

    return ExportTensor(tensor.name, tensor.shape, tensor.dtype, read)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan make-checkpoint`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--shape", default="ltx-2.3-22b", help=f"{', '.join(RELEASED)} or a JSON file with checkpoint metadata"
    )
    parser.add_argument("--num-layers", type=int, help="blocks to keep (all)")
    parser.add_argument("--connectors", action="store_true", help="also write the text connectors")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; the same seed gives the same bytes (0)")


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan make-checkpoint`; returns the exit status."""
    if arguments.num_layers is not None and arguments.num_layers < 1:
        raise ValueError(f"--num-layers: expected at least 1, found {arguments.num_layers}.")
    size = make_checkpoint(
        arguments.out,
        arguments.shape,
        num_layers=arguments.num_layers,
        connectors=arguments.connectors,
        seed=arguments.seed,
    )
    print(f"{arguments.out}: {size / 1e9:.2f} GB of random weights, shape {arguments.shape}")
    return 0
