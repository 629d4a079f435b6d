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

from ltx_titan.common.ranks import is_main_rank
from ltx_titan.lora.apply import adapters
from ltx_titan.lora.linear import merged_weight
from ltx_titan.weights.export import _DTYPES, ExportTensor, export_safetensors
from ltx_titan.weights.metadata import read_metadata
from ltx_titan.weights.names import TRANSFORMER
from ltx_titan.weights.stored import StoredWeight, stored_weights
from ltx_titan.weights.tensors import module_tensors


def export_merged(model: nn.Module, base_path: str | Path, path: str | Path, *, carry_over: bool = True) -> None:
    """Writes the base checkpoint with every adapter merged in; every rank calls it.

    One weight at a time is in memory, and all adapters on rank 0's host. Dtypes and header are those of the base file,
    except that a quantised transformer comes out in bfloat16: rounding the sum once more would undo small adapters.

    Args:
        model: the adapted model, sharded or not.
        base_path: the checkpoint that the base was loaded from.
        path: target file.
        carry_over: also copy what is not part of the transformer.

    Raises:
        ValueError: an adapted layer is not in the base file, or has another shape there.
    """
    metadata = read_metadata(base_path)
    stored = stored_weights(metadata)
    pieces = _gather_adapters(model)
    for name, (a, b, _, _) in pieces.items():
        found_weight = stored.get(TRANSFORMER.file_key(f"{name}.weight"))
        if found_weight is None or found_weight.shape != (b.shape[0], a.shape[1]):
            found = "no such weight" if found_weight is None else f"shape {list(found_weight.shape)}"
            raise ValueError(
                f"{base_path}: {name}: expected a weight of shape {[b.shape[0], a.shape[1]]}, found {found}. "
                "Give the checkpoint that the adapter was trained on."
            )
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(base_path, framework="pt", device="cpu"))
        tensors = []
        for key, weight in stored.items():
            official = TRANSFORMER.module_name(key)
            if official is None and not carry_over:
                continue
            piece = pieces.get(official.removesuffix(".weight")) if official and official.endswith(".weight") else None
            is_plain = weight.form == "plain"
            dtype = _DTYPES[metadata.tensors[key].dtype] if is_plain else torch.bfloat16

            def read(weight: StoredWeight = weight, piece: tuple | None = piece, dtype: torch.dtype = dtype) -> Tensor:
                tensor = weight.read(file, tuple(slice(0, size) for size in weight.shape), torch.device("cpu"))
                if piece is None:
                    return tensor.to(dtype)
                a, b, scaling, magnitude = piece
                return merged_weight(tensor, a, b, scaling, magnitude).to(dtype)

            tensors.append(ExportTensor(key, weight.shape, dtype, read))
        raw = {key: value for key, value in metadata.raw.items() if key != "_quantization_metadata"}
        export_safetensors(path, tensors, raw)


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
