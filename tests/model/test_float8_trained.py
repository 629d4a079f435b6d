import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.model.float8_trained import (
    Float8TrainedLinear,
    float8_trained_linear,
    float8_trained_linear_backward,
    float8_weight_gradient,
)
from ltx_titan.parallel.activation_checkpoint import apply_selective_checkpointing
from ltx_titan_kernels.formulas import quantize_tokens

TOKENS, IN, OUT = 96, 256, 384


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    # Rows of other sizes, which one scale for the whole weight rounds more coarsely.
    layer.weight.data *= torch.logspace(-2, 0, OUT)[:, None]
    layer = layer.to(dtype)
    if kind == "native":
        return Float8TrainedLinear.from_linear(layer)
    if kind == "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        holder = nn.Sequential(layer)
        config = Float8LinearConfig(emulate=True, pad_inner_dim=True)
        return convert_to_float8_training(holder, config=config)[0]
    return layer


def gradients(layer, dtype=torch.float32, block=None):
    generator = torch.Generator().manual_seed(1)
    # Tokens of different sizes, as after a gate.
    size = torch.logspace(-2, 0, 2 * TOKENS)[:, None].view(2, TOKENS, 1)
    x = (torch.randn(2, TOKENS, IN, generator=generator) * size).to(dtype).requires_grad_()
    dy = (torch.randn(2, TOKENS, OUT, generator=generator) * size.flip(1)).to(dtype)
    y = (block or layer)(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


def error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_outputs_and_gradients_are_closer_to_float32_than_torchaos():
    exact, found, theirs = (gradients(make(kind)) for kind in ("plain", "native", "tensorwise"))
    errors = [error(one, two) for one, two in zip(found, exact, strict=True)]
    expected = [error(one, two) for one, two in zip(theirs, exact, strict=True)]
    assert all(one <= two for one, two in zip(errors, expected, strict=True)), (errors, expected)
    assert 0.001 < errors[0] < 0.04
    assert 0.001 < errors[1] < 0.04
    assert 0.001 < errors[2] < 0.04
    assert errors[3] < 1e-6  # of the bias, a sum of what was not rounded


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0])
def test_a_common_scale_of_tokens_rounds_none_that_counts(spread):
    # Tokens of sizes over so many orders of magnitude, of both factors alike: small ones add little to the sum.
    size = torch.logspace(-spread, 0, TOKENS)[:, None]
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(TOKENS, width, generator=generator) * size for width in (OUT, IN))
    scale = torch.rand(OUT, generator=generator) + 0.5
    (g8, g_scale), (x8, x_scale) = (quantize_tokens(t, f, powers_of_two=True) for t, f in ((g, scale), (x, None)))
    assert torch.equal(g_scale.log2(), g_scale.log2().round())
    found = float8_weight_gradient(g8, g_scale, x8, x_scale, scale, torch.float32)
    # Of the same numbers, without the second rounding.
    expected = ((g8.float() * g_scale).T @ (x8.float() * x_scale)) / scale[:, None]
    assert error(found, expected) < 1e-3
    assert error(found, g.T @ x) < 0.04


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_what_is_not_finite_reaches_the_gradients(value, where):
    layer = make("native")
    x, dy = torch.randn(TOKENS, IN).requires_grad_(), torch.randn(TOKENS, OUT)
    (x.data if where == "input" else dy)[3, 5] = value
    dx, dw = torch.autograd.grad(layer(x), [x, layer.weight], dy)
    assert not (dw if where == "input" else dx).isfinite().all()
    assert not dw.isfinite().all()


def test_compiled_and_eager_agree_and_the_input_is_saved_quantized():
    layer, kept = make("native", torch.bfloat16), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    expected = gradients(layer, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition"), torch.bfloat16)
    for one, two in zip(found, expected, strict=True):
        assert error(one, two) < 5e-3
    large = [(tensor.dtype, tensor.numel()) for tensor in kept if tensor.numel() >= 2 * TOKENS * IN]
    assert set(large) <= {(torch.float8_e4m3fn, 2 * TOKENS * IN), (torch.bfloat16, layer.weight.numel())}


class Calls(TorchDispatchMode):
    """Counts forward matmuls."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.ltx_titan.float8_trained_linear.default
        return func(*args, **(kwargs or {}))


# The layer widens 1.5 times.
@pytest.mark.parametrize(("level", "calls"), [("selective", 2), ("matmuls", 2), ("all_matmuls", 1)])
def test_checkpointing_knows_it_as_a_matmul(level, calls):
    layer = make("native")
    blocks = nn.ModuleList([nn.Sequential(layer, nn.GELU())])
    expected = gradients(layer, block=blocks[0])
    apply_selective_checkpointing(blocks, [level])
    with Calls() as counted:
        found = gradients(layer, block=blocks[0])
    assert counted.count == calls
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_frozen_weight_saves_no_input_and_an_input_may_need_no_gradient():
    layer = make("native")
    x = torch.randn(TOKENS, IN)
    layer(x).square().sum().backward()
    assert layer.weight.grad.norm() > 0
    layer.requires_grad_(False)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(OUT, IN), (OUT,)]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.norm() > 0


# Not test_schema: it compares inputs before and after, which a CPU cannot do in float8.
REGISTRATION = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operations_are_registered_correctly(dtype):
    layer = make("plain", dtype)
    weight, (x, x_scale) = layer.weight.detach(), quantize_tokens(torch.randn(5, IN))
    g, g_scale = quantize_tokens(torch.randn(5, OUT))
    for bias in (None, layer.bias.detach()):
        arguments = (x, x_scale, weight, bias, dtype)
        torch.library.opcheck(float8_trained_linear, arguments, test_utils=REGISTRATION)
    _, scale = float8_trained_linear(x, x_scale, weight, None, dtype)
    arguments = (g, g_scale, weight, scale, dtype)
    torch.library.opcheck(float8_trained_linear_backward, arguments, test_utils=REGISTRATION)
    arguments = (g, g_scale, x, x_scale, scale, dtype)
    torch.library.opcheck(float8_weight_gradient, arguments, test_utils=REGISTRATION)
