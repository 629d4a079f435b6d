"""Times the attention backends of torch at the shapes of a block; kernel_ops.py orders its choices by them.

    ltx-titan bench attention [--out rows.jsonl]

One sample, 32 heads, bfloat16, heads contiguous per token ([B, S, H, K] viewed as [B, H, S, K]), as the projections
write them. Forward, and forward + backward, as CUDA graph replays; FLOPs are 4 and 12 x Sq x Sk x width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_titan.benchmarks.measure import environment, time_ms, write_rows
from ltx_titan.benchmarks.turns import device_alone
from ltx_titan.common.options import Maybe

DESCRIPTION = __doc__

HEADS = 32
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ShapeName = Literal[
    "video",
    "video to text",
    "video to text, mask of ones",
    "audio to video",
    "video to audio",
    "audio",
    "audio to text",
]
# (queries, keys, head dim, whether a mask is passed that masks nothing)
SHAPES: dict[ShapeName, tuple[tuple[int, int, int, bool], ...]] = {
    "video": ((4_032, 4_032, 128, False), (8_064, 8_064, 128, False), (16_128, 16_128, 128, False)),
    "video to text": ((4_032, 1_024, 128, False), (16_128, 1_024, 128, False)),
    "video to text, mask of ones": ((4_032, 1_024, 128, True), (16_128, 1_024, 128, True)),
    "audio to video": ((4_032, 126, 64, False), (16_128, 126, 64, False)),
    "video to audio": ((126, 4_032, 64, False), (126, 16_128, 64, False)),
    "audio": ((126, 126, 64, False),),
    "audio to text": ((126, 1_024, 64, False),),
}


@dataclass(frozen=True)
class AttentionOptions:
    """Options of `ltx-titan bench attention`."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    shapes: tuple[ShapeName, ...] = get_args(ShapeName)
    """Attention layers to time."""


def run(options: AttentionOptions) -> int:
    """Times every backend at every shape; a backend that rejects a shape is recorded as such."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device_alone():
        rows = _measure_all(options.shapes, device)
    write_rows(options.out, rows)
    return 0


def measure(
    backend: SDPBackend, queries: int, keys: int, head_dim: int, is_masked: bool, device: torch.device
) -> dict[str, float]:
    """Milliseconds and TFLOP/s of one backend at one shape.

    Raises:
        RuntimeError: the backend does not support these inputs.
    """

    def draw(tokens: int) -> Tensor:
        # Drawn per token and then viewed per head: backends differ in speed on other strides.
        drawn = torch.randn(1, tokens, HEADS, head_dim, device=device, dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_()

    q, k, v = draw(queries), draw(keys), draw(keys)
    mask = torch.zeros(1, 1, 1, keys, device=device, dtype=torch.bfloat16) if is_masked else None
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward_backward() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    # One backend alone: with a fallback, the time of another one would be recorded under this name.
    with sdpa_kernel(backend):
        forward_ms, both_ms = time_ms([forward], device), time_ms([forward_backward], device)
    tflop = queries * keys * HEADS * head_dim / 1e12
    return {
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_tflops": 4 * tflop / forward_ms * 1e3,
        "forward_backward_tflops": 12 * tflop / both_ms * 1e3,
    }


def _measure_all(names: Sequence[ShapeName], device: torch.device) -> list[dict]:
    common, rows = environment(device), []
    print("forward / forward + backward ms (TFLOP/s)")
    for name in names:
        for shape in SHAPES[name]:
            cells = []
            for backend in BACKENDS:
                row: dict[str, Any] = {**common, "attention": name, "backend": backend.name}
                row |= dict(zip(("queries", "keys", "head_dim", "is_masked"), shape, strict=True))
                try:
                    row |= measure(backend, *shape, device)
                    cells.append(
                        f"{backend.name} {row['forward_ms']:.3f} / {row['forward_backward_ms']:.3f} "
                        f"({row['forward_tflops']:.0f} / {row['forward_backward_tflops']:.0f})"
                    )
                except RuntimeError as error:
                    # Kept as a row: that a backend rejects a shape is a result as well.
                    row["error"] = str(error).splitlines()[0]
                    cells.append(f"{backend.name} not supported")
                rows.append(row)
            print(f"{name:28} {shape[0]:>6} x {shape[1]:>6}  " + "  ".join(cells), flush=True)
    return rows
