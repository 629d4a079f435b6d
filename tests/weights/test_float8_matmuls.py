import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.lora import LoRALinear
from ltx_titan.model.adapted_linear import project
from ltx_titan.model.float8_adapted import float8_adapted_linears
from ltx_titan.model.float8_linear import FEWEST_TOKENS, few_tokens_linear, float8_linear, float8_linear_backward
from ltx_titan.parallel.activation_checkpoint import apply_selective_checkpointing
from ltx_titan.weights import QuantizedLinear, use_float8_matmuls
from ltx_titan_kernels.formulas import quantize_tokens
from tests.lora.adapted import settings

TOKENS, IN, OUT, RANK = 128, 256, 384, 16
CPU = torch.device("cpu")


def adapted_layer(wanted, outputs=OUT, rank=RANK, bias=True):
    base = QuantizedLinear.from_linear(nn.Linear(IN, outputs, bias=bias).bfloat16(), "float8")
    layer = LoRALinear(base, settings(rank=rank))
    for part in (layer.lora_A, layer.lora_B):
        nn.init.normal_(part.weight, std=0.05)
    use_float8_matmuls(layer, CPU, torch.bfloat16, wanted)
    return layer


def layers(**fields):
    """The same adapted layer with a dequantized base and with float8 matmuls."""
    found = []
    for wanted in ("off", "on"):
        torch.manual_seed(0)
        found.append(adapted_layer(wanted, **fields))
    return found


def gradients(layer, scale=1.0, block=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, IN, generator=generator).bfloat16().requires_grad_()
    dy = (torch.randn(2, TOKENS, OUT, generator=generator) * scale).bfloat16()
    y = (block or layer)(x)
    return [y, *torch.autograd.grad(y, [x, layer.lora_A.weight, layer.lora_B.weight], dy)]


def error(found, expected):
    return ((found - expected).float().norm() / expected.float().norm()).item()


# The usual scale of a loss's gradients is far below the smallest number of e4m3, 2^-9. Adapters of rank 8 are not part
# of the joined weight: float8 matmuls need widths that are multiples of 16.
@pytest.mark.parametrize(("scale", "rank"), [(1.0, RANK), (1e-9, RANK), (1.0, 8)])
def test_it_differs_from_a_dequantized_base_by_the_rounding_of_tokens(scale, rank):
    exact, found = (gradients(layer, scale) for layer in layers(rank=rank))
    # 3 bits of mantissa: a uniform error of at most 2^-4 has a root mean square of 2.6 % with the factor of log steps.
    assert 0.001 < error(found[0], exact[0]) < 0.03
    assert 0.001 < error(found[1], exact[1]) < 0.03
    for one, two in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2 * scale)


def test_compiled_and_eager_agree_and_the_weight_is_not_saved_dequantized():
    _, layer = layers()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    expected = gradients(layer)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # With the partitioner that decides what is saved; Inductor's own code takes ten seconds.
        found = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition"))
    for one, two in zip(found, expected, strict=True):
        # An amax or a cast that is fused with its producer may round differently.
        assert error(one, two) < 5e-3
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert max(t.nbytes for t in kept if t.data_ptr() not in own) <= 2 * TOKENS * IN * 2


WIDTHS = {"q": 384, "k": 128, "v": 128}
GATES = 16


def joint_gradients(wanted, tokens, has_bias):
    """Outputs of three layers and a gate of one input, and gradients of the input and of all adapters."""
    torch.manual_seed(0)
    parts = [adapted_layer(wanted, width, bias=has_bias) for width in WIDTHS.values()]
    gate = nn.Linear(IN, GATES).bfloat16().requires_grad_(False)
    # Keys 30 times as large as queries: they share the scale of a token.
    with torch.no_grad():
        parts[1].base.scale.mul_(30)
    x = torch.randn(2, tokens // 2, IN).bfloat16().requires_grad_()
    dys = [torch.randn(2, tokens // 2, width).bfloat16() for width in (*WIDTHS.values(), GATES)]
    with Calls("float8_adapted_linears") as counted:
        outputs, logits = project(x, parts, gate)
    ys = [*outputs, logits]
    trained = [x, *(p for part in parts for p in (part.lora_A.weight, part.lora_B.weight))]
    return ys, torch.autograd.grad(ys, trained, dys), counted.count


@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_of_one_input_are_one_operation_and_differ_from_dequantized_ones_by_the_rounding_of_tokens(has_bias):
    exact, expected, _ = joint_gradients("off", 2 * TOKENS, has_bias)
    found, gradients, calls = joint_gradients("on", 2 * TOKENS, has_bias)
    assert calls == 1
    # The gate's bias is added after a rounding.
    assert error(found[-1], exact[-1]) < 4e-3
    assert all(0.001 < error(one, two) < 0.03 for one, two in zip(found[:-1], exact[:-1], strict=True))
    assert 0.001 < error(gradients[0], expected[0]) < 0.035
    for one, two in zip(gradients[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_a_few_tokens_have_the_numbers_of_a_dequantized_base():
    exact, expected, _ = joint_gradients("off", FEWEST_TOKENS - 2, True)
    found, gradients, calls = joint_gradients("on", FEWEST_TOKENS - 2, True)
    assert calls == 1
    # Sums of base and adapter are rounded to bfloat16 in another order.
    assert all(error(one, two) < 4e-3 for one, two in zip(found, exact, strict=True))
    assert all(error(one, two) < 6e-3 for one, two in zip(gradients, expected, strict=True))


class Calls(TorchDispatchMode):
    """Counts calls of an operation."""

    def __init__(self, name):
        super().__init__()
        self.operation, self.count = getattr(torch.ops.ltx_titan, name).default, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operation
        return func(*args, **(kwargs or {}))


# The layer widens 1.5 times.
@pytest.mark.parametrize(("level", "calls"), [("selective", 2), ("matmuls", 2), ("all_matmuls", 1)])
def test_checkpointing_saves_the_sum_of_base_and_adapter(level, calls):
    _, layer = layers()
    # GELU's backward pass reads the sum.
    blocks = nn.ModuleList([nn.Sequential(layer, nn.GELU())])
    expected = gradients(layer, block=blocks[0])
    apply_selective_checkpointing(blocks, [level])
    with Calls("float8_adapted_linears") as counted:
        found = gradients(layer, block=blocks[0])
    assert counted.count == calls
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_an_input_without_gradient_and_a_layer_without_adapter():
    _, layer = layers()
    x = torch.randn(FEWEST_TOKENS, IN).bfloat16()
    layer(x).float().square().sum().backward()
    assert layer.lora_A.weight.grad.norm() > 0
    y = layer.base(x)
    assert y.shape == (FEWEST_TOKENS, OUT)
    assert not y.requires_grad


def test_few_tokens_do_not_repay_their_quantization():
    exact, layer = (one.base for one in layers())
    x = torch.randn(2, FEWEST_TOKENS // 2, IN).bfloat16()
    # Of the same numbers, with a bias that is added before or after the sum is rounded.
    assert error(layer(x[:, 1:]), exact(x[:, 1:])) < 4e-3
    assert error(layer(x), exact(x)) > 1e-2


# Not test_schema: it compares inputs before and after, which a CPU cannot do in float8.
REGISTRATION = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def test_operations_are_registered_correctly():
    _, layer = layers()
    base = layer.base
    a, b = (part.weight.detach().bfloat16().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x, x_scale = quantize_tokens(torch.randn(5, IN))
    g, g_scale = quantize_tokens(torch.randn(5, OUT))
    for bias in (None, base.bias):
        arguments = (x, x_scale, base.qdata, base.scale, bias, torch.bfloat16)
        torch.library.opcheck(float8_linear, arguments, test_utils=REGISTRATION)
    torch.library.opcheck(float8_linear_backward, (g, g_scale, base.qdata, torch.bfloat16), test_utils=REGISTRATION)
    wide = torch.randn(FEWEST_TOKENS, IN).bfloat16().requires_grad_()
    torch.library.opcheck(few_tokens_linear, (wide[:5], base.qdata, base.scale, base.bias), test_utils=REGISTRATION)
    for tokens, quantized in ((wide, list(quantize_tokens(wide.detach()))), (wide, []), (wide[:5], [])):
        arguments = (tokens, quantized, [base.qdata], [base.scale], [base.bias], a, [b], [1.0])
        torch.library.opcheck(float8_adapted_linears, arguments, test_utils=REGISTRATION)


def test_layers_dequantize_where_there_are_no_float8_matmuls_and_the_reason_is_named():
    layer, _ = layers()
    for wanted, dtype, reason in (
        ("auto", torch.bfloat16, "a CPU has no float8 matmuls"),
        ("off", torch.bfloat16, "switched off"),
        ("auto", torch.float32, "training.dtype"),
    ):
        assert reason in use_float8_matmuls(layer, CPU, dtype, wanted)
        assert not layer.base.in_float8
    with pytest.raises(ValueError, match=r'lora.float8_matmuls = "on", but no layer'):
        use_float8_matmuls(nn.Linear(16, 16), CPU, torch.bfloat16, "on")
    assert use_float8_matmuls(layer, CPU, torch.bfloat16, "on") is None
    assert layer.base.in_float8
