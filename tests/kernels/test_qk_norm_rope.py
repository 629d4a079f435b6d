import pytest
import torch

from ltx_titan.model.rope import Rotation, distinct_coordinates, rotary_tables
from ltx_titan_kernels.formulas import HeadShare
from ltx_titan_kernels.qk_norm_rope import qk_norm_rope, reference
from tests.kernels.comparison import DEVICE, compare, draw

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

EPS = 1e-6
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _tables(batch, axes, tokens, width, heads, generator):
    coordinates = torch.randint(0, 4, (batch, axes, tokens), generator=generator).float().to(DEVICE)
    values, index = distinct_coordinates(coordinates)
    return rotary_tables(
        values, index, width=width, heads=heads, max_positions=(20, 64, 64)[:axes], theta=1e4, double_precision=True
    )


def _case(batch, q_tokens, k_tokens, heads, head_dim, dtype):
    generator = torch.Generator().manual_seed(2)
    width = heads * head_dim
    leaves = {
        "q": draw(batch, q_tokens, width, dtype=dtype, generator=generator, scale=2.0),
        "k": draw(batch, k_tokens, width, dtype=dtype, generator=generator, scale=0.5),
        "q_weight": draw(width, dtype=dtype, generator=generator),
        "k_weight": draw(width, dtype=dtype, generator=generator),
    }
    return leaves, generator


def _of(operation, q_rotation, k_rotation, head_dim, **settings):
    def run(q, k, q_weight, k_weight):
        return operation(q, k, q_weight, k_weight, q_rotation, k_rotation, head_dim=head_dim, eps=EPS, **settings)

    return run


def _wide(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cos.double(), rotation.sin.double())


@pytest.mark.parametrize(
    ("batch", "tokens", "axes", "heads", "head_dim", "dtype"),
    [
        (1, 1, 1, 1, 4, FLOAT32),
        (2, 7, 3, 3, 10, FLOAT32),  # neither heads nor head width a power of two; 15 pairs, 5 per axis
        (2, 11, 3, 4, 8, FLOAT32),  # 16 pairs, one of them padding
        (1, 3, 3, 30, 128, FLOAT32),
        (1, 4, 3, 32, 128, BFLOAT16),
        (2, 3, 1, 32, 64, BFLOAT16),
    ],
)
def test_self_attention_equals_the_reference(batch, tokens, axes, heads, head_dim, dtype):
    leaves, generator = _case(batch, tokens, tokens, heads, head_dim, dtype)
    tables = _tables(batch, axes, tokens, heads * head_dim, heads, generator)
    packed, expanded = tables.pack(), _wide(tables.expand())
    compare(
        _of(qk_norm_rope, packed, packed, head_dim), _of(reference, expanded, expanded, head_dim), leaves, generator
    )


@pytest.mark.parametrize(
    ("batch", "q_tokens", "k_tokens", "dtype"),
    [(2, 13, 5, FLOAT32), (2, 5, 13, BFLOAT16), (1, 150, 9, FLOAT32), (1, 1, 40, FLOAT32), (1, 7, 7, BFLOAT16)],
)
def test_cross_modal_attention_of_any_lengths_equals_the_reference(batch, q_tokens, k_tokens, dtype):
    leaves, generator = _case(batch, q_tokens, k_tokens, 4, 8, dtype)
    q_tables, k_tables = (_tables(batch, 1, tokens, 32, 4, generator) for tokens in (q_tokens, k_tokens))
    compare(
        _of(qk_norm_rope, q_tables.pack(), k_tables.pack(), 8),
        _of(reference, _wide(q_tables.expand()), _wide(k_tables.expand()), 8),
        leaves,
        generator,
    )


@pytest.mark.parametrize("k_tokens", [3, 6])
def test_norm_alone_equals_the_reference(k_tokens):
    leaves, generator = _case(2, 6, k_tokens, 3, 16, FLOAT32)
    compare(_of(qk_norm_rope, None, None, 16), _of(reference, None, None, 16), leaves, generator)


def test_strided_projections_and_attention_layout():
    leaves, generator = _case(2, 6, 6, 4, 16, FLOAT32)
    tables = _tables(2, 3, 6, 32, 2, generator)

    def of(operation, rotation):
        inner = _of(operation, rotation, rotation, 16)
        return lambda q, k, q_weight, k_weight: [
            o * 2 for o in inner(q[..., ::2], k[..., 32:], q_weight[32:], k_weight[::2])
        ]

    packed = tables.pack()
    compare(of(qk_norm_rope, packed), of(reference, _wide(tables.expand())), leaves, generator)
    q, _ = qk_norm_rope(*leaves.values(), None, None, head_dim=16, eps=EPS)
    assert q.shape == (2, 4, 6, 16)
    assert q.transpose(1, 2).is_contiguous()


def test_shares_of_the_heads_with_summed_squares_equal_the_whole():
    # Two ranks of tensor parallelism in one process: the sum over ranks is that of both halves.
    heads, head_dim = 6, 8
    width = heads * head_dim
    leaves, generator = _case(2, 7, 7, heads, head_dim, FLOAT32)
    tables = _tables(2, 3, 7, width, heads, generator)
    packed, expanded = tables.pack(), _wide(tables.expand())

    def in_halves(q, k, q_weight, k_weight):
        parts = []
        for rank in range(2):
            half = slice(rank * width // 2, (rank + 1) * width // 2)
            totals = iter([q.square().sum(-1), k.square().sum(-1)])
            share = HeadShare(rank * heads // 2, width, lambda local, totals=totals: next(totals))
            run = _of(qk_norm_rope, packed, packed, head_dim, share=share)
            parts.append(run(q[..., half], k[..., half], q_weight[half], k_weight[half]))
        return [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]

    compare(in_halves, _of(reference, expanded, expanded, head_dim), leaves, generator)


def test_traced_as_one_node_with_the_same_results():
    leaves, generator = _case(2, 6, 6, 3, 8, FLOAT32)
    tables = _tables(2, 3, 6, 24, 3, generator)
    packed, expanded = tables.pack(), _wide(tables.expand())
    traced = torch.compile(_of(qk_norm_rope, packed, packed, 8), backend="aot_eager", fullgraph=True)
    compare(traced, _of(reference, expanded, expanded, 8), leaves, generator)


@pytest.mark.parametrize(("rotations", "is_summed"), [(0, False), (2, True)])
def test_registration(rotations, is_summed):
    leaves, generator = _case(1, 2, 2, 2, 12, FLOAT32)
    q, k, *weights = leaves.values()
    packed = [_tables(1, 1, 2, 24, 2, generator).pack() for _ in range(rotations)]
    tables, indices = [p.table for p in packed], [p.rows for p in packed]
    sums = [x.detach().square().sum(-1).requires_grad_() for x in (q, k)] if is_summed else []
    sizes = (12, 24, 0)
    torch.library.opcheck(
        torch.ops.ltx_titan.qk_norm_rope.default, (q, k, weights, tables, indices, sums, *sizes, EPS, True)
    )
    with torch.no_grad():
        *outs, q_rstd, k_rstd = torch.ops.ltx_titan.qk_norm_rope(
            q, k, weights, tables, indices, sums, *sizes, EPS, True
        )
    plain = [w.detach() for w in weights]
    # Without gradients of weights in one of the cases.
    backward = (outs, q.detach(), k.detach(), [q_rstd, k_rstd], plain, tables, indices, is_summed, is_summed, *sizes)
    torch.library.opcheck(torch.ops.ltx_titan.qk_norm_rope_backward.default, backward)


@pytest.mark.parametrize("rotations", [0, 1, 2])
def test_frozen_weights_change_no_other_gradient(rotations):
    leaves, generator = _case(1, 3, 3, 3, 8, FLOAT32)
    packed = [_tables(1, 1, 3, 24, 3, generator).pack() for _ in range(rotations)] or [None]
    found = []
    for is_frozen in (False, True):
        q, k, *weights = (leaf.detach().requires_grad_() for leaf in leaves.values())
        outs = _of(qk_norm_rope, packed[0], packed[-1], 8)(q, k, *(w.requires_grad_(not is_frozen) for w in weights))
        cotangents = [torch.cos(torch.arange(out.numel(), device=DEVICE)).view(out.shape) for out in outs]
        found.append(torch.autograd.grad(outs, (q, k), cotangents))
    for trained, frozen in zip(*found, strict=True):
        assert torch.equal(trained, frozen)
