"""The kernel's update equals torch's fused AdamW over many steps, whatever the weights' sizes and addresses."""

import math
from pathlib import Path

import pytest
import torch

from ltx_titan.benchmarks.adamw import TOLERANCE, Shards, compare, print_table, shard_shapes, time_passes
from ltx_titan.optim import adamw
from ltx_titan.optim.adamw import ShardedAdamW
from ltx_titan_kernels.adamw import Updater
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

# Several chunks, with and without a rest; few elements; none, as in a shard of fewer rows than ranks; one; rows after
# which those of the next gradient are not aligned.
SHAPES = [(64, 1024), (129, 513), (24,), (0, 7), (1,), (5, 3), (8, 8)]
STEPS = 20
JOB = Path(__file__).parents[2] / "docs/benchmarks/ltx23_full_step.toml"


def watch(monkeypatch):
    """What the kernel's updates return from here on."""
    taken = []
    update = Updater.__call__

    def record(*arguments, **settings):
        taken.append(update(*arguments, **settings))
        return taken[-1]

    monkeypatch.setattr(Updater, "__call__", record)
    return taken


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in SHAPES]


def groups_of(parameters):
    return [
        {"params": parameters[:3], "lr": 1e-3, "weight_decay": 0.1},
        {"params": parameters[3:], "lr": 2e-3, "weight_decay": 0.0},
    ]


def set_gradients(parameters, step, scale=1.0):
    """Views of one tensor, as FSDP2 makes them; one weight has no gradient in the fourth step."""
    sizes = [parameter.numel() for parameter in parameters]
    generator = torch.Generator().manual_seed(step)
    values = (torch.randn(sum(sizes), generator=generator) * scale).to(DEVICE)
    for parameter, gradient in zip(parameters, values.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    if step == 3:
        parameters[0].grad = None


def assert_same_state(ours, theirs, parameters, expected, rtol=1e-6, of_moments=2e-5):
    # torch computes with betas in float64 on a CPU: 0.999 rounded to float32 is 1.3e-5 of 1 - 0.999 away.
    for shape, parameter, reference in zip(SHAPES, parameters, expected, strict=True):
        torch.testing.assert_close(parameter, reference, rtol=rtol, atol=rtol, msg=f"{shape}")
        found, values = ours.state[parameter], theirs.state[reference]
        assert found.keys() == values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(found["step"], values["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            tolerances = {"rtol": of_moments, "atol": of_moments / 10}
            torch.testing.assert_close(found[name], values[name], **tolerances, msg=f"{shape} {name}")


def test_it_is_torchs_fused_adamw(monkeypatch):
    taken = watch(monkeypatch)
    one, two = weights(), weights()
    theirs = torch.optim.AdamW(groups_of(one), betas=(0.9, 0.999), fused=True)
    ours = ShardedAdamW(groups_of(two), betas=(0.9, 0.999))
    versions = [parameter._version for parameter in two]
    for step in range(STEPS):
        scale, skip = (torch.tensor(value, device=DEVICE) for value in (3.0 if step % 2 else 1.0, float(step == 6)))
        for parameters, optimizer in ((one, theirs), (two, ours)):
            # Not finite in the step that is skipped.
            set_gradients(parameters, step, math.nan if step == 6 else float(scale))
            optimizer.grad_scale, optimizer.found_inf = scale, skip
            optimizer.step()
    assert taken == [True] * 2 * STEPS
    assert [int(ours.state[parameter]["step"]) for parameter in two] == [STEPS - 2] + [STEPS - 1] * (len(SHAPES) - 1)
    assert_same_state(ours, theirs, two, one)
    assert all(parameter._version > version for parameter, version in zip(two, versions, strict=True))
    if DEVICE.type == "cuda":
        differ = sum(int((a != b).sum()) for a, b in zip(one, two, strict=True))
        print(f"\nAdamW, {STEPS} steps: {differ} of {sum(p.numel() for p in one)} weights are not torch's, bit by bit")


def test_a_job_may_change_between_kernel_and_torch_in_any_step(monkeypatch):
    one, two = weights(), weights()
    theirs, ours = torch.optim.AdamW(groups_of(one), fused=True), ShardedAdamW(groups_of(two))
    for step in range(6):
        monkeypatch.setattr(adamw, "runs_triton", lambda _, step=step: step % 2 == 0)
        for parameters, optimizer in ((one, theirs), (two, ours)):
            set_gradients(parameters, step)
            optimizer.step()
    assert_same_state(ours, theirs, two, one)


def test_weights_that_the_kernel_does_not_take_are_updated_by_torch(monkeypatch):
    taken = watch(monkeypatch)
    weight = torch.nn.Parameter(torch.ones(8, 6, device=DEVICE).t())
    optimizer = ShardedAdamW([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert taken == [False]
    torch.testing.assert_close(weight, torch.full_like(weight, 0.9))


@pytest.mark.runs_on("gpu")  # the interpreter truncates to bfloat16
def test_bfloat16_weights_and_moments_are_rounded_as_torch_rounds_them():
    one, two = weights(torch.bfloat16), weights(torch.bfloat16)
    theirs, ours = torch.optim.AdamW(groups_of(one), fused=True), ShardedAdamW(groups_of(two))
    for step in range(STEPS):
        for parameters, optimizer in ((one, theirs), (two, ours)):
            set_gradients(parameters, step)
            optimizer.step()
    # A unit of the last place, where a value was close to the middle between two.
    assert_same_state(ours, theirs, two, one, 2**-7, 2**-7)


@pytest.mark.runs_on("gpu")
def test_it_takes_the_time_of_its_bytes_and_prints_it():
    """Shows both updates side by side (`pytest -s`); a table, since time depends on what else the device does."""
    shapes = shard_shapes(JOB, ranks=2)
    differences = compare(shapes, DEVICE)
    print("\n", differences)
    assert differences["relative_weights"] <= TOLERANCE["adamw"]
    print_table(time_passes(Shards(shapes, 2, DEVICE)))
