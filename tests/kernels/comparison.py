"""Runs a kernel and its reference on the same numbers and compares outputs and every gradient.

The reference computes in float64 from the same (rounded) inputs. Bounds, relative to the largest expected element:
float32 sums of n terms err by about sqrt(n) * 2 ** -24, so 1e-5 is generous for the few thousand here; bfloat16 results
are float32 ones rounded once, by at most 2 ** -8 on a GPU, but the interpreter truncates: 2 ** -7. Where a result is
computed from another rounded result, that counts again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.golden_cases import assert_close_to_max

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bound(dtype: torch.dtype, roundings: int = 1) -> float:
    """Largest difference allowed, relative to the largest expected element."""
    return 1e-5 if dtype == torch.float32 else roundings * 2**-7


def draw(*shape: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """A leaf of normal numbers."""
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()


def compare(
    kernel: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    leaves: dict[str, Tensor],
    generator: torch.Generator,
    roundings: int = 1,
) -> None:
    """Compares `kernel(**leaves)` with `reference(**leaves in float64)`, and the gradients of every leaf."""
    outputs = kernel(**leaves)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = reference(**wide)
    assert len(outputs) == len(expected)
    cotangents = [torch.randn(o.shape, generator=generator).to(DEVICE, o.dtype) for o in outputs]
    for number, (output, value) in enumerate(zip(outputs, expected, strict=True)):
        assert_close_to_max(output, value, bound(output.dtype, roundings), f"output {number}")
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    wanted = torch.autograd.grad(expected, list(wide.values()), [c.double() for c in cotangents])
    for (name, leaf), gradient, value in zip(leaves.items(), gradients, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        assert_close_to_max(gradient, value, bound(leaf.dtype, roundings), f"gradient of {name}")
