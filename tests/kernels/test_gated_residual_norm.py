import pytest
import torch

from ltx_titan_kernels import formulas
from ltx_titan_kernels.gated_residual_norm import gated_residual, gated_residual_norm, reference
from tests.kernels.comparison import DEVICE, compare, draw

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

EPS = 1e-6
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _case(batch, tokens, k, width, dtype, gate_timesteps=None):
    generator = torch.Generator().manual_seed(1)
    leaves = {
        "x": draw(batch, tokens, width, dtype=dtype, generator=generator),
        "y": draw(batch, tokens, width, dtype=dtype, generator=generator),
        "gate": draw(batch, gate_timesteps or k, width, dtype=dtype, generator=generator),
        "embedding": draw(batch, k, 4, width, dtype=dtype, generator=generator),
        "table": draw(5, width, dtype=dtype, generator=generator),
    }
    index = torch.randint(0, k, (batch, tokens), generator=generator).to(DEVICE) if k > 1 else None
    return leaves, index, generator


def _of(operation, index, norms):
    def run(x, y, gate, embedding, table):
        parameters = [(embedding[:, :, i], table[i]) for i in range(4)]
        pairs = [tuple(parameters[:2]), tuple(parameters[2:])]
        outputs = operation(x, y, (gate, table[4]), pairs[:norms], index, EPS)
        # Fewer norms leave parameters unused; reading them here gives them a gradient.
        return [*outputs, embedding + table[:4]]

    return run


@pytest.mark.parametrize(
    ("batch", "tokens", "k", "gate_timesteps", "width", "norms", "dtype"),
    [
        (1, 1, 1, 1, 8, 1, FLOAT32),
        (2, 7, 1, 1, 24, 2, FLOAT32),
        (2, 13, 2, 2, 40, 1, FLOAT32),
        (2, 13, 3, 1, 40, 2, FLOAT32),
        (1, 9, 2, 2, 40, 0, FLOAT32),
        # The widths of the models; few tokens, because the interpreter takes seconds for each.
        (1, 2, 2, 2, 3840, 2, FLOAT32),
        (1, 2, 2, 2, 4096, 1, BFLOAT16),
        (2, 1, 1, 1, 2048, 2, BFLOAT16),
        (3, 7, 2, 1, 40, 0, BFLOAT16),
    ],
)
def test_equals_the_reference(batch, tokens, k, gate_timesteps, width, norms, dtype):
    leaves, index, generator = _case(batch, tokens, k, width, dtype, gate_timesteps)
    # Two roundings: the norm reads the rounded sum.
    compare(_of(gated_residual_norm, index, norms), _of(reference, index, norms), leaves, generator, roundings=2)


def test_a_frozen_gate_saves_nothing_of_what_it_scales():
    leaves, _, _ = _case(2, 7, 1, 64, FLOAT32)
    x, y, gate, table = (leaves[name] for name in ("x", "y", "gate", "table"))
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        result = gated_residual(x, y, (gate.detach(), table[4].detach()), None)
    assert y.data_ptr() not in saved
    expected = gated_residual(x, y, (gate.detach().requires_grad_(), table[4].detach()), None)
    torch.testing.assert_close(result, expected)
    weights = torch.arange(64.0, device=x.device)
    gradients = (torch.autograd.grad((r * weights).sum(), (x, y)) for r in (result, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("norms", [1, 2])
def test_frozen_modulation_changes_no_other_gradient_and_its_factor_is_not_saved(norms):
    leaves, index, _ = _case(2, 7, 2, 24, FLOAT32)
    found, saved = [], []
    for is_frozen in (False, True):
        tokens = [leaves[name].detach().requires_grad_() for name in ("x", "y")]
        others = [leaves[name].detach().requires_grad_(not is_frozen) for name in ("gate", "embedding", "table")]
        pointers = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=pointers: to.add(t.data_ptr()) or t, lambda t: t):
            outputs = _of(gated_residual_norm, index, norms)(*tokens, *others)[:-1]
        cotangents = [torch.cos(torch.arange(o.numel(), device=DEVICE)).view(o.shape) for o in outputs]
        found.append(torch.autograd.grad(outputs, tokens, cotangents))
        saved.append(tokens[1].data_ptr() in pointers)
    for trained, frozen in zip(*found, strict=True):
        assert torch.equal(trained, frozen)
    assert saved == [True, False]


def test_strided_tokens_and_gradients():
    leaves, index, generator = _case(2, 10, 2, 64, FLOAT32)

    def of(operation):
        inner = _of(operation, index[:, ::2], 2)
        return lambda x, y, gate, embedding, table: [
            o.transpose(0, -1) * 2
            for o in inner(x[:, ::2, ::2], y[:, 1::2, 32:], gate[..., 1::2], embedding[..., :32], table[:, 32:])
        ]

    compare(of(gated_residual_norm), of(reference), leaves, generator)


def test_without_gate_and_with_a_bare_norm():
    leaves, _, generator = _case(2, 5, 1, 16, FLOAT32)
    leaves = {name: leaves[name] for name in ("x", "y")}

    def of(operation):
        return lambda x, y: operation(x, y, None, [None], None, EPS)

    compare(of(gated_residual_norm), of(reference), leaves, generator)


def test_the_last_residual_of_a_block():
    leaves, index, generator = _case(2, 9, 2, 24, FLOAT32)
    leaves = {name: leaves[name] for name in ("x", "y", "gate")}

    def of(operation):
        return lambda x, y, gate: [operation(x, y, (gate, None), index)]

    compare(of(gated_residual), of(formulas.gated_residual), leaves, generator)


def test_traced_as_one_node_with_the_same_results():
    leaves, index, generator = _case(2, 6, 2, 32, FLOAT32)
    traced = torch.compile(_of(gated_residual_norm, index, 2), backend="aot_eager", fullgraph=True)
    compare(traced, _of(reference, index, 2), leaves, generator)


@pytest.mark.parametrize("norms", [0, 2])
def test_registration(norms):
    leaves, index, _ = _case(1, 2, 2, 16, FLOAT32)
    x, y = leaves["x"], leaves["y"]
    embeddings = [e.detach().requires_grad_() for e in (leaves["gate"], *leaves["embedding"].unbind(2)[: 2 * norms])]
    tables = [t.detach().requires_grad_() for t in leaves["table"].unbind(0)[: 1 + 2 * norms]]
    torch.library.opcheck(torch.ops.ltx_titan.gated_residual_norm.default, (x, y, embeddings, tables, index, EPS, True))
    with torch.no_grad():
        outputs = torch.ops.ltx_titan.gated_residual_norm(x, y, embeddings, tables, index, EPS, True)
    backward = (
        [torch.randn_like(x) for _ in range(1 + norms)],
        [outputs[0], outputs[-1]] if norms else [],
        y.detach(),
        [e.detach() for e in (embeddings[0], *embeddings[1::2])],
        [table.detach() for table in (tables[0], *tables[1::2])],
        index,
    )
    torch.library.opcheck(torch.ops.ltx_titan.gated_residual_norm_backward.default, backward)
