import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.lora import DropoutStep, LoRALinear, adapter_weights, init_lora_, is_adapter
from ltx_titan.model.adapted_linear import adapted_linear
from ltx_titan.parallel.activation_checkpoint import apply_selective_checkpointing
from ltx_titan.weights import QuantizedLinear, merged_weight
from tests.lora.adapted import adapted, loss_of, settings, stir

X = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5))


def layer_of(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": LoRALinear(nn.Linear(24, 40).to(dtype).requires_grad_(False), settings(**fields))})
    init_lora_(holder, 1)
    stir(holder)
    return holder["layer"]


@pytest.mark.parametrize(("fields", "scaling"), [({}, 2.0), ({"rslora": True}, 4.0), ({"alpha": 4}, 1.0)])
def test_the_formula(fields, scaling):
    layer = layer_of(**fields)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    expected = X @ layer.base.weight.T + layer.base.bias + scaling * (X @ a.T) @ b.T
    torch.testing.assert_close(layer(X), expected)


@pytest.mark.parametrize(("has_bias", "scaling"), [(True, 1.0), (False, 0.5)])
def test_base_and_adapter_in_one_operation_have_the_gradients_of_the_formula(has_bias, scaling):
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, a, b, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((10, 16), (12, 16), (12,), (4, 16), (12, 4), (10, 12))
    )
    bias = bias if has_bias else None
    trained = [tensor.requires_grad_() for tensor in (x, a, b)]
    expected = nn.functional.linear(x, weight, bias) + scaling * (x @ a.T) @ b.T
    y, _ = adapted_linear(x, weight, bias, a, b, scaling)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, trained, dy), torch.autograd.grad(expected, trained, dy))
    torch.library.opcheck(adapted_linear, (x, weight, bias, a, b, scaling))


def test_dora_is_magnitude_times_direction():
    layer = layer_of(dora=True)
    a, b, base = layer.lora_A.weight, layer.lora_B.weight, layer.base
    direction = base.weight + 2 * b @ a
    weight = layer.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(X), X @ weight.T + base.bias)


@pytest.mark.parametrize("dora", [False, True])
def test_training_starts_from_the_base(dora):
    torch.manual_seed(0)
    base = nn.Linear(24, 40).requires_grad_(False)
    holder = nn.ModuleDict({"layer": LoRALinear(base, settings(dora=dora))})
    init_lora_(holder, 1)
    torch.testing.assert_close(holder["layer"](X), base(X), rtol=1e-6, atol=1e-6)
    holder["layer"](X).square().sum().backward()
    assert holder["layer"].lora_B.weight.grad.norm() > 0


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_weight_is_equivalent_to_base_and_adapter(dora):
    layer = layer_of(dora=dora, rslora=True)
    (adapter,) = adapter_weights(nn.ModuleDict({"layer": layer})).values()
    weight = merged_weight(layer.base.weight, adapter)
    torch.testing.assert_close(nn.functional.linear(X, weight, layer.base.bias), layer(X))


def test_adapters_are_float32_on_a_bfloat16_base():
    layer = layer_of(torch.bfloat16, dora=True)
    out = layer(X.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}


def test_only_adapters_are_trained_and_streams_without_adapters_have_no_gradient():
    model = adapted(settings(targets=["video"]))
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(name)
        assert (parameter.grad is not None) == is_adapter(name), name
        assert not is_adapter(name) or ".attn" in name


def test_initial_values_depend_on_seed_and_name_only():
    def first(seed, targets):
        model = adapted(settings(targets=targets))
        init_lora_(model, seed)
        return model.transformer_blocks[1].attn1.to_q.lora_A.weight

    one = first(7, ["video"])
    assert torch.equal(one, first(7, ["attn1.to_q"]))
    assert not torch.equal(one, first(8, ["video"]))
    assert one.abs().max() <= 1 / 64**0.5
    assert 0.8 < one.std() / (1 / (3 * 64) ** 0.5) < 1.2


def dropped(dropout=0.25, rank=0, time=3):
    layer = layer_of(dropout=dropout)
    DropoutStep(nn.ModuleDict({"layer": layer}), 0, rank).set(time)
    return layer


def test_dropout_masks_depend_on_step_and_rank():
    with torch.no_grad():
        out = dropped()(X)
        assert torch.equal(out, dropped()(X))
        assert not torch.equal(out, dropped(time=4)(X))
        assert not torch.equal(out, dropped(rank=1)(X))
        assert not torch.equal(out, layer_of()(X))
        assert torch.equal(dropped().eval()(X), layer_of()(X))


def test_dropout_zeroes_its_share_and_preserves_the_mean():
    layer = dropped()
    ones = torch.ones(64, 500, 24)
    layer.lora_A.weight.data.fill_(1.0)
    layer.base.requires_grad_(False).weight.zero_()
    layer.base.bias.zero_()
    layer.lora_B.weight.data.zero_()[:, 0] = 1 / (24 * layer.scaling)
    rows = layer(ones)[..., 0]
    # 32,000 means of 24 draws each: standard error 0.0012 of their mean.
    assert abs(rows.mean() - 1) < 0.006
    assert abs(rows.var() * 24 - 1 / 3) < 0.02
    neighbors = torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1]
    assert abs(neighbors) < 0.03


def test_dropout_is_the_same_when_activations_are_recomputed():
    plain, recomputed = dropped(), dropped()
    plain(X).square().sum().backward()
    checkpoint(recomputed, X, use_reentrant=False, preserve_rng_state=False).square().sum().backward()
    assert torch.equal(plain.lora_A.weight.grad, recomputed.lora_A.weight.grad)


class Block(nn.Module):
    def __init__(self, fields):
        super().__init__()
        base = nn.Linear(32, 32).requires_grad_(False)
        if fields.get("base_dtype"):
            base = QuantizedLinear.from_linear(base, fields["base_dtype"])
        self.layer = LoRALinear(base, settings(**fields))

    def forward(self, x):
        return torch.tanh(self.layer(x))


def test_checkpointed_blocks_of_a_level_share_one_graph_with_the_same_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block({}) for _ in range(6)])
    init_lora_(model, 1)
    stir(model)
    x = torch.randn(5, 32, requires_grad=True)
    model(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    torch._dynamo.reset()
    # `matmuls` saves the sum of base and adapter, so that neither runs again.
    apply_selective_checkpointing(model, ("selective",) * 3 + ("matmuls",) * 3)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x).sum().backward()
    assert counter.frame_count == 2
    (runs,) = (event.count for event in profile.key_averages() if event.key == "ltx_titan::adapted_linear")
    assert runs == 6 + 3
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[without_wrappers(name)])


@pytest.mark.parametrize(
    "fields", [{}, {"dora": True}, {"dropout": 0.5}, {"base_dtype": "int8"}, {"base_dtype": "int4"}]
)
def test_all_blocks_share_one_full_graph(fields):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(fields) for _ in range(3)])
    init_lora_(model, 1)
    stir(model)
    x = torch.randn(5, 32)
    dropout_step = DropoutStep(model, 0)
    dropout_step.set(1)
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    dropout_step.set(0)
    model(x)
    dropout_step.set(1)
    actual = model(x)
    actual.sum().backward()

    # The first block's input needs no gradient, the others' does.
    assert counter.frame_count == 2
    torch.testing.assert_close(actual, expected)
    for one, two in zip(gradients, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(two, one)
