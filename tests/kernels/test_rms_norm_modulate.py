import pytest
import torch

from ltx_titan_kernels.rms_norm_modulate import launch_backward, reference, rms_norm_modulate
from tests.kernels.comparison import DEVICE, compare, draw

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

EPS = 1e-6
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _case(batch, tokens, k, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "x": draw(batch, tokens, width, dtype=dtype, generator=generator),
        "embedding": draw(batch, k, 2, width, dtype=dtype, generator=generator),
        "table": draw(2, width, dtype=dtype, generator=generator),
    }
    index = torch.randint(0, k, (batch, tokens), generator=generator).to(DEVICE) if k > 1 else None
    return leaves, index, generator


def _of(operation, index):
    def run(x, embedding, table):
        scale, shift = ((embedding[:, :, i], table[i]) for i in range(2))
        return [operation(x, scale, shift, index, EPS)]

    return run


@pytest.mark.parametrize(
    ("batch", "tokens", "k", "width", "dtype"),
    [
        (1, 1, 1, 8, FLOAT32),
        (2, 7, 1, 24, FLOAT32),
        (2, 13, 2, 48, FLOAT32),
        (1, 29, 5, 12, FLOAT32),
        # The widths of the models; few tokens, because the interpreter takes seconds for each.
        (1, 2, 2, 3840, FLOAT32),
        (2, 1, 1, 2048, BFLOAT16),
        (1, 2, 2, 4096, BFLOAT16),
        (3, 7, 3, 40, BFLOAT16),
    ],
)
def test_equals_the_reference(batch, tokens, k, width, dtype):
    leaves, index, generator = _case(batch, tokens, k, width, dtype)
    compare(_of(rms_norm_modulate, index), _of(reference, index), leaves, generator)


def test_strided_tokens_and_gradients():
    leaves, index, generator = _case(2, 10, 2, 64, FLOAT32)

    def of(operation):
        inner = _of(operation, index[:, ::2])
        # Every other token of every other channel in, transposed out: no stride is that of a contiguous tensor.
        return lambda x, embedding, table: [
            o.transpose(0, 2) * 2 for o in inner(x[:, ::2, ::2], embedding[..., :32], table[:, 32:])
        ]

    compare(of(rms_norm_modulate), of(reference), leaves, generator)


def test_without_an_index_the_first_timestep_is_used_and_an_absent_table_adds_nothing():
    leaves, _, generator = _case(2, 5, 2, 16, FLOAT32)

    def of(operation):
        return lambda x, embedding, table: [
            operation(x, (embedding[:, :, 0], None), (embedding[:1, :, 1], table[1]), None, EPS) + table[0]
        ]

    compare(of(rms_norm_modulate), of(reference), leaves, generator)


def test_more_timesteps_than_the_kernel_supports():
    leaves, index, generator = _case(1, 40, 33, 8, FLOAT32)
    compare(_of(rms_norm_modulate, index), _of(reference, index), leaves, generator)


@pytest.mark.runs_on("gpu")  # the interpreter runs one program after the other
def test_modulation_gradients_are_deterministic():
    leaves, index, _ = _case(1, 40, 2, 64, BFLOAT16)
    x, scale, table = leaves["x"].detach(), leaves["embedding"].detach()[:, :, 0], leaves["table"].detach()[0]
    rstd = x.float().square().mean(-1).rsqrt()
    first, second = (launch_backward(x, x, rstd, scale, table, index)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_traced_as_one_node_with_the_same_results():
    leaves, index, generator = _case(2, 6, 2, 32, FLOAT32)
    traced = torch.compile(_of(rms_norm_modulate, index), backend="aot_eager", fullgraph=True)
    compare(traced, _of(reference, index), leaves, generator)


@pytest.mark.parametrize("k", [1, 2])
def test_registration(k):
    leaves, index, generator = _case(1, 2, k, 16, FLOAT32)
    x, embedding, table = leaves.values()
    embeddings = [e.detach().requires_grad_() for e in embedding.unbind(2)]
    tables = [t.detach().requires_grad_() for t in table.unbind(0)]
    torch.library.opcheck(torch.ops.ltx_titan.rms_norm_modulate.default, (x, *embeddings, *tables, index, EPS, True))
    with torch.no_grad():
        _, rstd = torch.ops.ltx_titan.rms_norm_modulate(x, *embeddings, *tables, index, EPS, True)
    backward = (torch.randn_like(x), x.detach(), rstd, embeddings[0].detach(), tables[0].detach(), index)
    # Without gradients of modulation in one of the cases.
    torch.library.opcheck(torch.ops.ltx_titan.rms_norm_modulate_backward.default, (*backward, k == 2))


def test_frozen_modulation_changes_no_other_gradient():
    leaves, index, _ = _case(2, 7, 2, 24, FLOAT32)
    found = []
    for is_frozen in (False, True):
        x, *others = (leaf.detach().requires_grad_() for leaf in leaves.values())
        (h,) = _of(rms_norm_modulate, index)(x, *(leaf.detach() if is_frozen else leaf for leaf in others))
        found.append(torch.autograd.grad(h, x, torch.cos(torch.arange(h.numel(), device=DEVICE)).view(h.shape)))
    assert torch.equal(*(gradient for (gradient,) in found))
