"""Low-rank approximation of updates: LoRA from the difference of two checkpoints, and LoRA of a smaller rank.

The best approximation of rank r keeps the r largest singular values (Eckart and Young, 1936). An error here is
relative: the Frobenius norm of what is lost, divided by that of the update.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ltx_titan.common.tensors import seed_of
from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.lora_files import LoRAWeights
from ltx_titan.weights.metadata import read_metadata
from ltx_titan.weights.names import TRANSFORMER, listed
from ltx_titan.weights.stored import StoredWeight, stored_weights
from ltx_titan.weights.tensors import full_box

# Randomized SVD (Halko, Martinsson, Tropp, 2011): directions beyond the rank, and power iterations. With two iterations
# singular values of a flat spectrum, the worst case, are within about a percent.
_OVERSAMPLED, _ITERATIONS = 16, 2


@dataclass(frozen=True)
class Approximation:
    """Layers of a LoRA with squared Frobenius norms of each update, and of what the approximation of it lost.

    Attributes:
        layers: by official name.
        norms: |W|^2 of each layer.
        losses: |W - B A|^2 of each layer.
        other: tensors that changed and that no LoRA can store, such as biases and tables: |change|^2.
    """

    layers: dict[str, LoRAWeights]
    norms: dict[str, float]
    losses: dict[str, float]
    other: dict[str, float]

    @property
    def error(self) -> float:
        """Relative error over all layers."""
        return math.sqrt(sum(self.losses.values()) / max(sum(self.norms.values()), 1e-300))

    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative error, and that error."""
        errors = {name: math.sqrt(loss / max(self.norms[name], 1e-300)) for name, loss in self.losses.items()}
        name = max(errors, key=errors.__getitem__)
        return name, errors[name]


def update_norm(layer: LoRAWeights) -> float:
    """Frobenius norm of a layer's update s B A, without computing the update."""
    lora_a, lora_b = layer.lora_a.double(), layer.lora_b.double()
    # |B A|^2 = tr(A^T B^T B A) = sum((B^T B) * (A A^T)): matrices of rank x rank.
    return abs(layer.scaling) * math.sqrt(max(((lora_b.T @ lora_b) * (lora_a @ lora_a.T)).sum().item(), 0.0))


def _lost(layer: LoRAWeights, other: LoRAWeights) -> float:
    """|W - W'|^2 of the updates of two adapters of one layer, without computing either."""
    # W - W' = [s B, -s' B'] [A; A'].
    both = LoRAWeights(
        torch.cat((layer.lora_a.double(), other.lora_a.double())),
        torch.cat((layer.lora_b.double() * layer.scaling, -other.lora_b.double() * other.scaling), dim=1),
        1.0,
    )
    return update_norm(both) ** 2


def resize_lora(layers: Mapping[str, LoRAWeights], rank: int, done: Callable[[], None] = lambda: None) -> Approximation:
    """Reduces adapters to a rank; layers of that rank or a smaller one are copied.

    Args:
        layers: by official name.
        rank: largest rank of the result.
        done: called after each layer.
    """
    result = Approximation({}, {}, {}, {})
    for name, layer in layers.items():
        result.norms[name] = update_norm(layer) ** 2
        result.losses[name] = 0.0
        result.layers[name] = layer
        if layer.lora_a.shape[0] > rank:
            # B A = Q_b (R_b R_a^T) Q_a^T: the SVD is of a matrix of rank x rank, and exact.
            q_b, r_b = torch.linalg.qr(layer.lora_b.float() * layer.scaling)
            q_a, r_a = torch.linalg.qr(layer.lora_a.float().T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            result.layers[name] = _factors(q_b @ u, s, vh @ q_a.T, rank, layer.lora_a.dtype)
            # Measured rather than taken from `s`: it includes the rounding of the factors.
            result.losses[name] = _lost(layer, result.layers[name])
        done()
    return result


def extract_lora(
    base_path: str | Path,
    tuned_path: str | Path,
    rank: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    done: Callable[[], None] = lambda: None,
) -> Approximation:
    """Approximates the difference of two checkpoints by a LoRA. One weight of each is in memory at a time.

    Args:
        base_path: the base checkpoint.
        tuned_path: a checkpoint of the same model with other weights.
        rank: of the LoRA; smaller for matrices with fewer rows or columns.
        device: the SVDs run there; a GPU is some hundred times as fast as a CPU.
        dtype: of the factors, whose rounding counts as error.
        done: called after each weight of the transformer.

    Raises:
        ValueError: the files have different transformers, or equal ones.
    """
    base, tuned = _transformer_weights(base_path), _transformer_weights(tuned_path)
    different = [name for name in base.keys() & tuned.keys() if base[name].shape != tuned[name].shape]
    different += sorted(base.keys() ^ tuned.keys())
    if different or not base:
        raise ValueError(
            f"{tuned_path}: expected the transformer of {base_path}, found {len(different)} tensors that only one of "
            f"them has or that differ in shape: {listed(different)}. Use the base that the file was trained from."
        )
    for path in (base_path, tuned_path):
        check_contents(path)
    result = Approximation({}, {}, {}, {})
    with safe_open(base_path, framework="pt") as one, safe_open(tuned_path, framework="pt") as two:
        for name, weight in base.items():
            before, after = (
                stored.read(file, full_box(weight.shape), device).to(device).float()
                for stored, file in ((weight, one), (tuned[name], two))
            )
            change = after - before
            norm = change.double().square().sum().item()
            if not math.isfinite(norm):
                raise ValueError(f"{tuned_path}: {name}: expected finite numbers, found NaN or infinity in a file.")
            module = name.removesuffix(".weight")
            if norm and (change.ndim != 2 or module == name):
                result.other[name] = norm
            elif norm:
                layer = _factors(*_svd(change, rank, name), rank, dtype)
                result.layers[module] = LoRAWeights(layer.lora_a.cpu(), layer.lora_b.cpu(), 1.0)
                result.norms[module] = norm
                lost = change - layer.lora_b.float() @ layer.lora_a.float()
                result.losses[module] = lost.double().square().sum().item()
            done()
    if not result.layers:
        raise ValueError(f"{tuned_path}: the linear layers are those of {base_path}; there is nothing to extract.")
    return result


def _transformer_weights(path: str | Path) -> dict[str, StoredWeight]:
    weights = stored_weights(read_metadata(path))
    names = {key: TRANSFORMER.module_name(key) for key in weights}
    return {name: weights[key] for key, name in names.items() if name is not None}


def _svd(matrix: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and vectors; all of them if that costs no more."""
    size = rank + _OVERSAMPLED
    if min(matrix.shape) <= 4 * size:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    generator = torch.Generator().manual_seed(seed_of(name))
    samples = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ samples).Q
    for _ in range(_ITERATIONS):
        # Orthonormalized in between, because powers of the matrix lose its small singular values to rounding.
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _factors(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> LoRAWeights:
    # The square root in each, so that both have the same range, which suits 16-bit formats.
    root = s[:rank].sqrt()
    return LoRAWeights((root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype), 1.0)
