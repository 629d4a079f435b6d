import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.config import OptimizerSection
from ltx_titan.diffusion import StepDraws
from ltx_titan.lora import adapters, apply_lora
from ltx_titan.optim import build_optimizers
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from tests.golden_cases import assert_close_to_max, load_case
from tests.lora.adapted import settings
from tests.model.golden_transformer import build_transformer

CASE = load_case("train_step_lora")
ENTRY, TOLERANCE = CASE.entry, CASE.entry["tolerance"]


def read_step(number):
    """Batch and draws of one step."""
    given = CASE.under(f"input.step{number}.")
    batch = {}
    for key, tensor in given.items():
        if key.startswith("batch."):
            _, source, field = key.split(".")
            batch.setdefault(source, {})[field] = tensor
    return batch, StepDraws(
        video_sigma=given["sigma.video"],
        audio_sigma=given["sigma.audio"],
        video_noise=given["noise.video"],
        audio_noise=given["noise.audio"],
        video_uses=[],
        audio_uses=[],
    )


@pytest.fixture(scope="module")
def trained():
    """Losses, norms, clipped gradients and weights of two steps, keyed as in the case."""
    model = build_transformer(CASE)
    lora = ENTRY["lora"]
    apply_lora(model, settings(rank=lora["rank"], alpha=lora["alpha"], targets=lora["target_modules"]))
    weights = {
        f"diffusion_model.{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in adapters(model).items()
        for part in ("lora_A", "lora_B")
    }
    assert set(weights) == set(ENTRY["lora_tensor_names"])
    with torch.no_grad():
        for name, value in CASE.under("input.lora.").items():
            weights[name].copy_(value)
    strategy = FlexibleStrategy.from_config(ENTRY["strategy_config"])
    chosen = {key: ENTRY["optimizer"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    optimizers = build_optimizers(model.named_parameters(), OptimizerSection(name="adamw", **chosen))
    found = {}
    for number in (1, 2):
        inputs = strategy.prepare(*read_step(number))
        loss = strategy.loss(*model(inputs.video, inputs.audio), inputs)
        loss.total.backward()
        norm = clip_grad_norm_(model.named_parameters(), ENTRY["optimizer"]["max_grad_norm"])
        found[f"step{number}.loss_per_sample"] = loss.per_sample.detach()
        found[f"step{number}.loss"] = loss.total.detach().reshape(1)
        found[f"step{number}.grad_norm"] = norm.reshape(1)
        found |= {f"step{number}.clipped.{name}": weight.grad.clone() for name, weight in weights.items()}
        optimizers.step()
        optimizers.zero_grad()
        found |= {f"step{number}.weight.{name}": weight.detach().clone() for name, weight in weights.items()}
    return found


@pytest.mark.parametrize("step", ["step1", "step2"])
def test_loss_and_gradient_norm_equal_the_reference(trained, step):
    for what, rtol in (("loss", "loss"), ("loss_per_sample", "loss"), ("grad_norm", "grad_norm")):
        expected = CASE.tensors[f"output.{step}.{what}"]
        torch.testing.assert_close(trained[f"{step}.{what}"], expected, rtol=TOLERANCE[rtol]["rtol"], atol=0)


def test_clipped_gradients_equal_the_reference(trained):
    expected = CASE.under("grad.")
    assert len(expected) == len(ENTRY["tracked"])
    for key, value in expected.items():
        assert_close_to_max(trained[key], value, TOLERANCE["grad"]["rtol_to_max"], key)


@pytest.mark.parametrize("step", ["step1", "step2"])
def test_weights_equal_the_reference_after_each_step(trained, step):
    weights = CASE.under(f"output.{step}.weight.")
    assert len(weights) == len(ENTRY["tracked"])
    for name, expected in weights.items():
        off = (trained[f"{step}.weight.{name}"] - expected).abs() > TOLERANCE["weight"]["atol"]
        assert off.float().mean() <= 0.005, name
    norms = torch.stack([trained[f"{step}.weight.{name}"].norm() for name in ENTRY["weight_norm_names"]])
    torch.testing.assert_close(norms, CASE.tensors[f"output.{step}.weight_norms"], rtol=1e-4, atol=1e-5)
