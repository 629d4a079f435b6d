"""Sum of the gradients that ranks have exchanged, in float32: part 0 + part 1 + ..., in the order of ranks.

Each rank receives the others' bfloat16 parts of its own shard and adds its own, which stays where the backward pass has
written it. PyTorch adds rows of one tensor, for which the own part has to be copied beside the others.

Bytes: 2 for each rank's part and 4 of the sum: 8 for each gradient of two ranks, 12 with the copy of the own part.
A block of two ranks: 0.38 ms, 4.1 TB/s, where copy and sum take 1.05; H200
(docs/benchmarks/collectives.jsonl).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: two times 16 bytes of bfloat16 from each part for a thread.
_BLOCK = 4096
_WARPS = 8


def sum_parts_reference(own: Tensor, received: Tensor, rank: int) -> Tensor:
    """The sum [elements] in float32 of `own` [elements] and `received` [ranks - 1, elements]."""
    total = torch.zeros_like(own, dtype=torch.float32)
    for part in (*received[:rank], own, *received[rank:]):
        total += part.float()
    return total


def sum_parts(own: Tensor, received: Tensor, rank: int, out: Tensor) -> None:
    """Writes the sum of all ranks' parts to `out`.

    Args:
        own: this rank's part [elements], contiguous.
        received: those of the other ranks, in their order [ranks - 1, elements], contiguous.
        rank: of this rank, which is the position of its part in the sum.
        out: [elements], float32, contiguous.
    """
    numel = own.numel()
    assert all(t.is_contiguous() for t in (own, received, out))
    assert received.shape[1:] == own.shape == out.shape, (own.shape, received.shape, out.shape)
    _sum_parts_kernel[(triton.cdiv(numel, _BLOCK),)](
        own, received, out, numel, RANKS=len(received) + 1, RANK=rank, BLOCK=_BLOCK, num_warps=_WARPS
    )


@triton.jit
def _sum_parts_kernel(
    own_ptr, received_ptr, out_ptr, numel, RANKS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = tl.load(own_ptr + offsets, mask=inside, other=0.0)
        else:
            # int64: all parts together may have more elements than int32 counts.
            row = tl.cast(numel, tl.int64) * (rank - (rank > RANK))
            part = tl.load(received_ptr + row + offsets, mask=inside, other=0.0)
        total += part.to(tl.float32)
    tl.store(out_ptr + offsets, total, mask=inside)
