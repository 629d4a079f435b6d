import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.lora import DropoutStep, LoRALinear, adapter_weights, init_lora_, is_adapter
from ltx_titan.model.adapted_linear import AdaptedWeights, adapted_linears, apply_adapted, project
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


@pytest.mark.parametrize(("has_bias", "has_narrow"), [(True, True), (False, False)])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_layers_of_one_input_in_one_operation_have_the_gradients_of_the_formula(has_bias, has_narrow, needs_dx):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(3)
    layers = [
        AdaptedWeights(
            draw(out, 16), draw(out) if has_bias else None, draw(rank, 16).requires_grad_(),
            draw(out, rank).requires_grad_(), scaling,
        )
        for out, rank, scaling in ((12, 4, 1.0), (8, 4, 0.5), (8, 2, 2.0))
    ]  # fmt: skip
    x, narrow = draw(2, 5, 16).requires_grad_(needs_dx), draw(3, 16) if has_narrow else None
    trained = [tensor for layer in layers for tensor in (layer.lora_a, layer.lora_b)] + [x] * needs_dx
    expected = [nn.functional.linear(x, w, bias) + s * (x @ a.T) @ b.T for w, bias, a, b, s, _ in layers]
    ys, n = apply_adapted(x, layers, narrow)
    if has_narrow:
        ys.append(n)
        expected.append(x @ narrow.T)
    torch.testing.assert_close(ys, expected)
    dys = [torch.randn_like(y) for y in ys if y.requires_grad]
    found, wanted = ([y for y in outputs if y.requires_grad] for outputs in (ys, expected))
    torch.testing.assert_close(
        torch.autograd.grad(found, trained, dys), torch.autograd.grad(wanted, trained, dys[: len(wanted)])
    )
    biases = [layer.bias for layer in layers if layer.bias is not None]
    a = torch.cat([layer.lora_a for layer in layers] + ([] if narrow is None else [narrow]))
    lists = [layer.weight for layer in layers], biases, a.detach().requires_grad_(), [layer.lora_b for layer in layers]
    torch.library.opcheck(adapted_linears, (x.flatten(0, 1), *lists, [1.0, 0.5, 2.0]))


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"dropout": 0.5}, {"base_dtype": "int8"}])
def test_layers_of_one_input_together_equal_each_alone(fields):
    torch.manual_seed(0)
    names = {"to_q": 32, "to_k": 32, "to_v": 64}
    model = nn.ModuleDict({name: nn.Linear(32, width).requires_grad_(False) for name, width in names.items()})
    gate = nn.Linear(32, 4).requires_grad_(False)
    for name in ("to_q", "to_v"):  # to_k has no adapter
        base = model[name]
        if "base_dtype" in fields:
            base = QuantizedLinear.from_linear(base, fields["base_dtype"])
        model[name] = LoRALinear(base, settings(**fields))
    init_lora_(model, 1)
    stir(model)
    x = torch.randn(2, 5, 32)
    outputs, logits = project(x, list(model.values()), gate)
    for output, layer in zip([*outputs, logits], [*model.values(), gate], strict=True):
        torch.testing.assert_close(output, layer(x))


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
    (runs,) = (event.count for event in profile.key_averages() if event.key == "ltx_titan::adapted_linears")
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
