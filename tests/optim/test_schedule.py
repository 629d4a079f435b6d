import pytest
import torch
from torch.optim import lr_scheduler

from ltx_titan.config import SchedulerSection
from ltx_titan.optim import lr_factor

STEPS = 40
BASE = 1e-4


def torch_rates(build, count):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = build(optimizer)
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("section", "build"),
    [
        (SchedulerSection(name="constant"), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            SchedulerSection(name="linear"),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=STEPS),
        ),
        (SchedulerSection(name="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS)),
        (
            SchedulerSection(name="cosine", min_factor=0.2),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.2 * BASE),
        ),
        (
            SchedulerSection(name="cosine_with_restarts"),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=STEPS // 4, eta_min=5e-5),
        ),
        (
            SchedulerSection(name="cosine_with_restarts", restart_period=5, restart_mult=2, min_factor=0.0),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2),
        ),
        (SchedulerSection(name="polynomial"), lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS)),
        (
            SchedulerSection(name="polynomial", power=2.5),
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=2.5),
        ),
        (SchedulerSection(name="step"), lambda o: lr_scheduler.StepLR(o, step_size=STEPS // 2, gamma=0.1)),
        (
            SchedulerSection(name="step", step_size=7, gamma=0.5),
            lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.5),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, SchedulerSection) else "",
)
def test_rate_of_every_step_equals_torchs_recursion(section, build):
    ours = [BASE * lr_factor(step, total_steps=STEPS, scheduler=section) for step in range(STEPS)]
    assert ours == pytest.approx(torch_rates(build, STEPS), rel=1e-6, abs=1e-12)


def test_warmup_rises_to_the_peak_without_a_step_of_zero():
    section = SchedulerSection(name="linear", warmup_steps=4)
    factors = [lr_factor(step, total_steps=14, scheduler=section) for step in range(15)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.1), "the schedule spans the steps after warm-up"


def test_wsd_is_flat_until_its_decay_and_ends_at_its_lowest():
    section = SchedulerSection(name="wsd", warmup_steps=2, decay_steps=4, min_factor=0.2)
    factors = [lr_factor(step, total_steps=12, scheduler=section) for step in range(13)]
    assert factors[2:9] == [1.0] * 7
    assert factors[9:13] == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "wsd"])
def test_rate_stays_at_its_end_beyond_the_horizon(name):
    section = SchedulerSection(name=name)
    end = lr_factor(STEPS, total_steps=STEPS, scheduler=section)
    assert lr_factor(STEPS + 13, total_steps=STEPS, scheduler=section) == end


@pytest.mark.parametrize("name", ["cosine_with_restarts", "step", "wsd"])
def test_shortest_run_has_a_rate(name):
    assert lr_factor(0, total_steps=1, scheduler=SchedulerSection(name=name)) == pytest.approx(1.0)
