"""Merges adapters into a full checkpoint.

The base is read from the file it was trained from, not from the model: a quantised base merges into the original
weights, and other parts of the file (connectors, autoencoders, vocoder) can be carried along. The sum is computed in
float32 and rounded once; readers of adapter files round B A to bfloat16 first.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ltx_titan.checkpoint import TRANSFORMER, ExportTensor, export_safetensors, module_tensors, read_metadata
from ltx_titan.checkpoint.export import _DTYPES
from ltx_titan.checkpoint.ranks import is_main_rank
from ltx_titan.lora.apply import adapters
from ltx_titan.lora.linear import merged_weight


def export_merged(model: nn.Module, base_path: str | Path, path: str | Path, *, carry_over: bool = True) -> None:
    """Writes the base checkpoint with every adapter merged in; every rank calls it.

    One weight at a time is in memory, and all adapters on rank 0's host. Dtypes and header are those of the base file.

    Args:
        model: the adapted model, sharded or not.
        base_path: the checkpoint that the base was loaded from.
        path: target file.
        carry_over: also copy what is not part of the transformer.

    Raises:
        ValueError: an adapted layer is not in the base file, or has another shape there.
    """
    metadata = read_metadata(base_path)
    pieces = _gather_adapters(model)
    for name, (a, b, _, _) in pieces.items():
        info = metadata.tensors.get(TRANSFORMER.file_key(f"{name}.weight"))
        if info is None or info.shape != (b.shape[0], a.shape[1]):
            found = "no such weight" if info is None else f"shape {list(info.shape)}"
            raise ValueError(
                f"{base_path}: {name}: expected a weight of shape {[b.shape[0], a.shape[1]]}, found {found}. "
                "Give the checkpoint that the adapter was trained on."
            )
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(base_path, framework="pt", device="cpu"))
        tensors = []
        for key, info in metadata.tensors.items():
            official = TRANSFORMER.module_name(key)
            if official is None and not carry_over:
                continue
            piece = pieces.get(official.removesuffix(".weight")) if official and official.endswith(".weight") else None

            def read(key: str = key, piece: tuple | None = piece) -> Tensor:
                weight = file.get_tensor(key)
                if piece is None:
                    return weight
                a, b, scaling, magnitude = piece
                return merged_weight(weight, a, b, scaling, magnitude).to(weight.dtype)

            tensors.append(ExportTensor(key, info.shape, _DTYPES[info.dtype], read))
        export_safetensors(path, tensors, metadata.raw)


@torch.no_grad()
def _gather_adapters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float, Tensor | None]]:
    """A, B, scaling and magnitude of every adapter by official name: whole on rank 0's host, empty shells elsewhere."""
    tensors = module_tensors(model)

    def whole(name: str) -> Tensor:
        tensor = tensors[name]
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.cpu() if is_main_rank() else full.to("meta")

    return {
        name: (
            whole(f"{name}.lora_A.weight"),
            whole(f"{name}.lora_B.weight"),
            layer.scaling,
            whole(f"{name}.magnitude") if layer.magnitude is not None else None,
        )
        for name, layer in adapters(model).items()
    }
