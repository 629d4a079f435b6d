"""Whole optimisation steps against the reference: inputs, loss, gradients, clipping and AdamW together."""

import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.config import Degrees
from ltx_titan.diffusion import StepDraws
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from ltx_titan.parallel.mesh import build_mesh, init_distributed
from tests.golden_cases import assert_close_to_max, load_case
from tests.model.golden_transformer import build_transformer
from tests.processes import run_ranks


def step_inputs(case, step):
    """Batch and draws of one step."""
    fields = case.under(f"input.step{step}.")
    batch = {}
    for key, tensor in fields.items():
        if key.startswith("batch."):
            _, source, field = key.split(".")
            batch.setdefault(source, {})[field] = tensor
    probability = case.entry["strategy_config"]["video"]["conditions"][0]["probability"]
    draws = StepDraws(
        video_sigma=fields["sigma.video"],
        audio_sigma=fields["sigma.audio"],
        video_noise=fields["noise.video"],
        audio_noise=fields["noise.audio"],
        video_uses=[fields["condition_draws.0"] < probability],
        audio_uses=[],
    )
    return batch, draws


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_full_training(is_sharded):
    case = load_case("train_step_full")
    entry, tolerance = case.entry, case.entry["tolerance"]
    model = build_transformer(case)
    if is_sharded:
        mesh = build_mesh(init_distributed().type, Degrees(dp_shard=torch.distributed.get_world_size()))
        apply_fsdp(model, model.transformer_blocks, mesh.fsdp, torch.float32)
    strategy = FlexibleStrategy.from_config(entry["strategy_config"])
    settings = dict(entry["optimizer"])
    max_norm = settings.pop("max_grad_norm")
    assert settings.pop("type") == "adamw"
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=True)
    ranks = torch.distributed.get_world_size() if is_sharded else 1
    for step in range(1, entry["steps"] + 1):
        batch, draws = step_inputs(case, step)
        inputs = strategy.prepare(batch, draws)
        loss = strategy.loss(*model(inputs.video, inputs.audio), inputs)
        (loss.total / ranks).backward()  # every rank has the whole batch here, and gradients are summed
        norm = clip_grad_norm_(model.named_parameters(), max_norm)
        expected = case.under(f"output.step{step}.")
        torch.testing.assert_close(loss.per_sample, expected["loss_per_sample"], **tolerance["loss"], atol=0)
        torch.testing.assert_close(loss.total.reshape(1), expected["loss"], **tolerance["loss"], atol=0)
        torch.testing.assert_close(norm.reshape(1), expected["grad_norm"], **tolerance["grad_norm"], atol=0)
        parameters = dict(model.named_parameters())
        if step == 1:
            for name, gradient in case.under("grad.step1.clipped.").items():
                assert_close_to_max(full(parameters[name].grad), gradient, tolerance["grad"]["rtol_to_max"], name)
        optimizer.step()
        optimizer.zero_grad()
        for name in entry["tracked"]:
            weight = full(parameters[name]).detach()
            off = (weight - case.tensors[f"output.step{step}.weight.{name}"]).abs() > tolerance["weight"]["atol"]
            assert off.float().mean() <= 0.005, name
        norms = torch.stack([full(parameters[name]).detach().norm() for name in entry["weight_norm_names"]])
        torch.testing.assert_close(norms, expected["weight_norms"], rtol=1e-4, atol=1e-5)


def test_full_training_equals_the_reference():
    check_full_training(is_sharded=False)


@pytest.mark.distributed
def test_sharded_full_training_equals_the_reference():
    run_ranks(check_full_training, 2, True)
