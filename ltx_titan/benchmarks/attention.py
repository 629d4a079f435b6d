"""Times torch's attention back-ends at the shapes of a block; kernel_ops.py takes its order of preference from here.

    ltx-titan bench attention [--out rows.jsonl]

One sample, 32 heads, bfloat16, tokens of contiguous heads in memory ([B, S, H, K] seen as [B, H, S, K]), as the
projections write them. Forward, and forward + backward, as CUDA-graph replays; TFLOP/s by 4 and 12 x Sq x Sk x width.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_titan.benchmarks.measure import environment, time_ms, write_rows
from ltx_titan.benchmarks.turns import device_alone

DESCRIPTION = __doc__

HEADS = 32
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Queries, keys, width of a head, whether a mask that masks nothing is given.
SHAPES = {
    "video": ((4_032, 4_032, 128, False), (8_064, 8_064, 128, False), (16_128, 16_128, 128, False)),
    "video to text": ((4_032, 1_024, 128, False), (16_128, 1_024, 128, False)),
    "video to text, mask of ones": ((4_032, 1_024, 128, True), (16_128, 1_024, 128, True)),
    "audio to video": ((4_032, 126, 64, False), (16_128, 126, 64, False)),
    "video to audio": ((126, 4_032, 64, False), (126, 16_128, 64, False)),
    "audio": ((126, 126, 64, False),),
    "audio to text": ((126, 1_024, 64, False),),
}


def measure(
    backend: SDPBackend, queries: int, keys: int, head_dim: int, is_masked: bool, device: torch.device
) -> dict[str, float]:
    """Milliseconds and TFLOP/s of one back-end at one shape.

    Raises:
        RuntimeError: the back-end does not take these inputs.
    """

    def draw(tokens: int) -> Tensor:
        drawn = torch.randn(1, tokens, HEADS, head_dim, device=device, dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_()

    q, k, v = draw(queries), draw(keys), draw(keys)
    mask = torch.zeros(1, 1, 1, keys, device=device, dtype=torch.bfloat16) if is_masked else None
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    with sdpa_kernel(backend):
        forward_ms, both_ms = time_ms([forward], device), time_ms([both], device)
    tflop = queries * keys * HEADS * head_dim / 1e12
    return {
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_tflops": 4 * tflop / forward_ms * 1e3,
        "forward_backward_tflops": 12 * tflop / both_ms * 1e3,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, help="write rows as JSON lines")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")


def run(arguments: argparse.Namespace) -> int:
    """Measures every back-end at every shape; a refusal is recorded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device_alone():
        rows = _measure_all(arguments.shapes, device)
    write_rows(arguments.out, rows)
    return 0


def _measure_all(names: list[str], device: torch.device) -> list[dict]:
    common, rows = environment(device), []
    print("forward / forward + backward ms (TFLOP/s)")
    for name in names:
        for shape in SHAPES[name]:
            cells = []
            for backend in BACKENDS:
                row = {**common, "attention": name, "backend": backend.name}
                row |= dict(zip(("queries", "keys", "head_dim", "is_masked"), shape, strict=True))
                try:
                    row |= measure(backend, *shape, device)
                    cells.append(
                        f"{backend.name} {row['forward_ms']:.3f} / {row['forward_backward_ms']:.3f} "
                        f"({row['forward_tflops']:.0f} / {row['forward_backward_tflops']:.0f})"
                    )
                except RuntimeError as error:
                    row["error"] = str(error).splitlines()[0]
                    cells.append(f"{backend.name} refuses")
                rows.append(row)
            print(f"{name:28} {shape[0]:>6} x {shape[1]:>6}  " + "  ".join(cells), flush=True)
    return rows


def main() -> int:
    """Runs as `python -m ltx_titan.benchmarks.attention`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
