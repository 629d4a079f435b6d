import pytest
import torch
from torch import nn

from ltx_titan.lora import LoRALinear, apply_lora, init_lora_
from ltx_titan.memory.live_bytes import LiveBytes
from ltx_titan.weights import QUANTIZED, QuantizedLinear, quantized
from ltx_titan.weights.quantized import dequantize, quantize_rows
from tests.lora.adapted import golden_inputs, same_bits, settings, transformer

# Half a step of the grid, for weights whose largest value in a group is 1, and the rounding of a bfloat16 scale.
STEP = {"int8": 0.5 / 127, "int4": 0.5 / 7.5, "float8": 2**-4, "nvfp4": 1 / 6}
SCALE_ROUNDING = 2**-8


def weight_of(rows=24, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_weight_comes_back_within_half_a_step(form):
    weight = weight_of() * torch.logspace(-6, 3, 24)[:, None]
    found = dequantize(*quantize_rows(weight, form), form, torch.float32)
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((found - weight).abs() <= largest * (STEP[form] + SCALE_ROUNDING)).all()


@pytest.mark.parametrize("form", QUANTIZED)
def test_rows_are_independent_and_zero_rows_stay_zero(form):
    weight = weight_of()
    weight[3] = 0
    data, scale = quantize_rows(weight, form)
    part, part_scale = quantize_rows(weight[2:5], form)
    assert same_bits(data[2:5], part)
    assert torch.equal(scale[2:5], part_scale)
    assert not dequantize(data, scale, form, torch.float32)[3].any()


@pytest.mark.parametrize("form", QUANTIZED)
def test_in_parts_a_weight_has_the_same_bits_and_takes_less_memory(form, monkeypatch):
    weight = weight_of(rows=256, columns=256)
    data = quantize_rows(weight, form)
    with LiveBytes() as at_once:
        expected = dequantize(*data, form, torch.bfloat16)
    monkeypatch.setattr(quantized, "_WEIGHTS_AT_A_TIME", 256 * 30)  # does not divide the rows
    with LiveBytes() as in_parts:
        found = dequantize(*data, form, torch.bfloat16)
    assert same_bits(found, expected)
    assert at_once.peak > 10 * weight.numel()
    assert in_parts.peak < 5 * weight.numel()


@pytest.mark.parametrize("form", QUANTIZED)
def test_both_directions_use_the_same_weight(form):
    linear = nn.Linear(64, 24).bfloat16()
    layer = QuantizedLinear.from_linear(linear, form)
    eye = torch.eye(64, dtype=torch.bfloat16, requires_grad=True)
    forward = layer(eye) - layer.bias
    grad = torch.eye(24, dtype=torch.bfloat16)
    (backward,) = torch.autograd.grad(layer(eye[:24]), eye, grad)
    weight = layer.weight
    torch.testing.assert_close(forward.T, weight, rtol=2**-7, atol=2**-7)
    assert torch.equal(backward[:24], weight)
    again = dequantize(layer.qdata, layer.scale, form, torch.bfloat16, is_second_use=True)
    assert torch.equal(again, weight)


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantized_model_is_close_to_the_exact_one(form):
    exact = transformer()
    with torch.no_grad():
        expected = exact(*golden_inputs())
        apply_lora(exact, settings(base_dtype=form))
        init_lora_(exact, 0)
        actual = exact(*golden_inputs())
    # Errors of two blocks of independent roundings; four bits of a random weight are one part in ten.
    bound = {"int4": 0.5, "nvfp4": 0.4}.get(form, 0.1)
    for one, two in zip(expected, actual, strict=True):
        assert (two.float() - one).norm() / one.norm() < bound


@pytest.mark.parametrize("form", QUANTIZED)
def test_blocks_are_quantized_and_the_rest_stays_bfloat16(form):
    model = transformer("meta")
    apply_lora(model, settings(base_dtype=form, targets=["video"]))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["transformer_blocks.0.attn1.to_q.base"] is QuantizedLinear
    assert kinds["transformer_blocks.0.audio_ff.net.2"] is QuantizedLinear
    for name in ("patchify_proj", "proj_out", "adaln_single.linear", "transformer_blocks.0.attn1.to_gate_logits"):
        assert kinds[name] is nn.Linear
    floats = {p.dtype for n, p in model.named_parameters() if "lora_" not in n and p.is_floating_point()}
    assert floats == {torch.bfloat16}


@pytest.mark.parametrize("form", QUANTIZED)
def test_adapters_train_on_a_quantized_base_that_stays_unchanged(form):
    torch.manual_seed(0)
    linears = [nn.Linear(64, 64) for _ in range(3)]
    model = nn.Sequential(*[LoRALinear(QuantizedLinear.from_linear(layer, form), settings()) for layer in linears])
    init_lora_(model, 0)
    x, y = weight_of(32), weight_of(32, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(model.named_parameters())
    assert all(same_bits(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("form", QUANTIZED)
def test_only_quantized_data_is_saved_for_the_backward_pass(form):
    layer = QuantizedLinear.from_linear(nn.Linear(256, 512).bfloat16(), form)
    module = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(4, 256, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for forward in (module, torch.compile(module, fullgraph=True)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(x).sum().backward()
        # Parameters are in memory anyway. One byte per weight would be 131,072.
        own = {parameter.data_ptr() for parameter in module.parameters()}
        assert sum(t.nbytes for t in kept if t.data_ptr() not in own) < 20_000


@pytest.mark.parametrize("form", QUANTIZED)
def test_every_bit_pattern_survives_a_gather_in_float32(form):
    # All 65,536 bit patterns, those of including infinities and NaNs.
    data = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).view(64, 1024)
    scale = torch.ones(64, 1, dtype=torch.bfloat16)
    exact = dequantize(data, scale, form, torch.float32)
    gathered = dequantize(data.float(), scale.float(), form, torch.float32)
    assert torch.equal(exact.nan_to_num(), gathered.nan_to_num())


def test_row_widths_that_a_form_does_not_support_are_refused():
    with pytest.raises(ValueError, match=r"even input widths, found 25"):
        QuantizedLinear.from_linear(nn.Linear(25, 8), "int8")
    for form in ("int4", "nvfp4"):
        with pytest.raises(ValueError, match=r"multiples of 16, found 24; use \"int8\""):
            QuantizedLinear.from_linear(nn.Linear(24, 8), form)
