import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.model.adapted_linear import project
from ltx_titan.model.attention import FeedForward
from ltx_titan.model.float8_trained import (
    Float8TrainedLinear,
    float8_joined_rows,
    float8_rows,
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


def feed_forward(kind, dtype=torch.float32):
    torch.manual_seed(0)
    module = FeedForward(IN, bias=True).to(dtype)
    first = module.net[0]
    if kind == "native":
        first.proj, module.net[2] = (Float8TrainedLinear.from_linear(each) for each in (first.proj, module.net[2]))
    if kind == "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(module, config=Float8LinearConfig(emulate=True, pad_inner_dim=True))
    return module


def gradients_of(module, dtype=torch.float32, call=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, IN, generator=generator).to(dtype).requires_grad_()
    dy = (torch.randn(2, TOKENS, IN, generator=generator) * 1e-6).to(dtype)
    y = (module if call is None else call)(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def test_a_feed_forward_is_one_operation_closer_to_float32_than_torchaos():
    exact, found, theirs = (gradients_of(feed_forward(kind)) for kind in ("plain", "native", "tensorwise"))
    errors = [error(one, two) for one, two in zip(found, exact, strict=True)]
    expected = [error(one, two) for one, two in zip(theirs, exact, strict=True)]
    assert all(one <= 1.02 * two for one, two in zip(errors, expected, strict=True)), (errors, expected)
    assert max(errors) < 0.06


def test_a_compiled_feed_forward_saves_its_hidden_layer_once_in_bfloat16_and_once_in_float8():
    module, kept = feed_forward("native", torch.bfloat16), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    expected = gradients_of(module, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
        found = gradients_of(module, torch.bfloat16, compiled)
    for one, two in zip(found, expected, strict=True):
        assert error(one, two) < 5e-3
    hidden = [tensor.dtype for tensor in kept if tensor.shape == (2 * TOKENS, 4 * IN)]
    assert sorted(map(str, hidden)) == ["torch.bfloat16", "torch.float8_e4m3fn"]


@pytest.mark.parametrize("level", ["selective", "matmuls", "all_matmuls"])
def test_a_feed_forward_is_recomputed_to_the_same_bits(level):
    module = feed_forward("native")
    blocks = nn.ModuleList([nn.Sequential(module)])
    expected = gradients_of(module)
    apply_selective_checkpointing(blocks, [level])
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(module, call=blocks[0]), expected, strict=True))


class _Layers(nn.Module):
    """Queries, keys and values, whose gradients differ in size."""

    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(IN, OUT, bias=i != 1).to(dtype) for i in range(3)]
        if kind == "native":
            layers = [Float8TrainedLinear.from_linear(layer) for layer in layers]
        self.layers = nn.ModuleList(layers)
        self.gate = nn.Linear(IN, 4).to(dtype)
        if kind == "tensorwise":
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            config = Float8LinearConfig(emulate=True, pad_inner_dim=True)
            convert_to_float8_training(self, config=config, module_filter_fn=lambda _, name: "layers" in name)

    def forward(self, x):
        (q, k, v), n = project(x, list(self.layers), self.gate)
        return q + 0.1 * k + 3 * v + n.sum(-1, keepdim=True) * 1e-3


def gradients_of_layers(module, dtype=torch.float32, call=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, IN, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(2, TOKENS, OUT, generator=generator).to(dtype)
    y = (module if call is None else call)(x)
    return [y, *torch.autograd.grad(y, [x, *module.layers.parameters()], dy)]


def test_layers_of_one_input_are_one_operation_closer_to_float32_than_torchaos():
    exact, found, theirs = (gradients_of_layers(_Layers(kind)) for kind in ("plain", "native", "tensorwise"))
    errors = [error(one, two) for one, two in zip(found, exact, strict=True)]
    expected = [error(one, two) for one, two in zip(theirs, exact, strict=True)]
    assert all(one <= 1.02 * two for one, two in zip(errors, expected, strict=True)), (errors, expected)
    module, backward = _Layers("native"), float8_trained_linear_backward
    with Calls(backward) as counted:
        gradients_of_layers(module)
    assert counted.count == 1


def test_compiled_layers_of_one_input_agree_with_eager_ones():
    module = _Layers("native", torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    found, expected = (gradients_of_layers(module, torch.bfloat16, call) for call in (compiled, None))
    assert all(error(one, two) < 5e-3 for one, two in zip(found, expected, strict=True))


def test_some_layers_of_one_input_may_be_frozen():
    expected, module = gradients_of_layers(_Layers("native")), _Layers("native")
    module.layers[0].requires_grad_(False)
    x = torch.randn(2, TOKENS, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    module(x).sum().backward()
    assert module.layers[0].weight.grad is None
    assert module.layers[1].weight.grad.shape == expected[4].shape
    assert x.grad.norm() > 0


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0])
def test_a_common_scale_of_tokens_rounds_none_that_counts(spread):
    # Tokens of sizes over so many orders of magnitude, of both factors alike: small ones add little to the sum.
    size = torch.logspace(-spread, 0, TOKENS)[:, None]
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(TOKENS, width, generator=generator) * size for width in (OUT, IN))
    (g8, g_scale), (x8, x_scale) = (quantize_tokens(t, powers_of_two=True) for t in (g, x))
    assert torch.equal(g_scale.log2(), g_scale.log2().round())
    scales = (g_scale * x_scale).flatten()
    found = float8_weight_gradient(g8, x8, scales.max() / scales, scales.max().view(1), torch.float32)
    # Of the same numbers, without the second rounding.
    expected = (g8.float() * g_scale).T @ (x8.float() * x_scale)
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


@pytest.mark.parametrize(("fewest", "is_rounded"), [(2 * TOKENS, True), (2 * TOKENS + 1, False)])
def test_fewer_tokens_than_repay_their_casts_are_not_rounded(fewest, is_rounded):
    layer = Float8TrainedLinear.from_linear(make("plain"), fewest)
    found, exact = gradients(layer), gradients(make("plain"))
    assert all((error(a, b) > 1e-3) == is_rounded for a, b in zip(found[:3], exact[:3], strict=True))
    module, plain = feed_forward("native"), feed_forward("plain")
    module.net[0].proj.fewest_tokens = module.net[2].fewest_tokens = fewest
    found, exact = gradients_of(module), gradients_of(plain)
    assert all((error(a, b) > 1e-3) == is_rounded for a, b in zip(found[:3], exact[:3], strict=True))


class Calls(TorchDispatchMode):
    """Counts calls of an operation."""

    def __init__(self, operation=float8_trained_linear):
        super().__init__()
        self.operation, self.count = operation._opoverload, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operation
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
    assert [tuple(tensor.shape) for tensor in kept] == [(OUT, IN), (1,)]
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
    arguments = (g, g_scale, [weight], torch.ones(1), dtype)
    torch.library.opcheck(float8_trained_linear_backward, arguments, test_utils=REGISTRATION)
    arguments = (g, x, torch.ones(5), torch.ones(1), dtype)
    torch.library.opcheck(float8_weight_gradient, arguments, test_utils=REGISTRATION)
    z, da = torch.randn(5, OUT, dtype=dtype), torch.randn(5, OUT, dtype=dtype)
    for arguments in [(z, None, False, True), (z, None, True, False), (z, da, True, True)]:
        torch.library.opcheck(float8_rows, (*arguments, dtype), test_utils=REGISTRATION)
    torch.library.opcheck(float8_joined_rows, ([z, da], True, dtype), test_utils=REGISTRATION)
