"""Learning-rate schedules in closed form.

torch's schedulers are recursions over the optimizer's current rate: resumed with a new optimizer they restart from its
base rate, resumed with their own state they keep the old horizon, and stepped by several processes they advance too
fast. A function of the step alone avoids all three, and a run is extended by changing `training.steps`.
"""

import math

from ltx_titan.config import SchedulerSection


def lr_factor(step: int, *, total_steps: int, scheduler: SchedulerSection) -> float:
    """Factor on `optimizer.lr` for optimizer step `step`.

    Warm-up rises linearly, `(step + 1) / (warmup_steps + 1)`, so that no step has rate 0. The schedule then spans the
    remaining steps: with `t = step - warmup_steps`, `T = total_steps - warmup_steps` and `low = min_factor`,

    - constant: 1
    - linear: `start + (end - start) * t / T`
    - cosine: `low + (1 - low) * (1 + cos(pi * t / T)) / 2`
    - cosine_with_restarts: the same within periods of `restart_period * restart_mult ** i` steps
    - polynomial: `(1 - t / T) ** power`
    - step: `gamma ** floor(t / step_size)`
    - wsd: 1, then linearly to `low` over the last `decay_steps` steps

    Args:
        step: steps already taken, from 0.
        total_steps: horizon of the schedule; after it the decaying schedules stay at their last value.
        scheduler: the job's `[scheduler]` section.
    """
    warmup = scheduler.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    horizon = max(total_steps - warmup, 1)
    elapsed = step - warmup
    progress = min(elapsed / horizon, 1.0)
    low = scheduler.min_factor
    match scheduler.name:
        case "constant":
            return 1.0
        case "linear":
            return scheduler.start_factor + (scheduler.end_factor - scheduler.start_factor) * progress
        case "cosine":
            return _cosine(progress, low or 0.0)
        case "cosine_with_restarts":
            first = scheduler.restart_period or max(horizon // 4, 1)
            # 0.5 is the reference trainer's lowest rate, 5e-5, relative to its default rate of 1e-4.
            return _cosine(_period_progress(elapsed, first, scheduler.restart_mult), 0.5 if low is None else low)
        case "polynomial":
            return (1.0 - progress) ** scheduler.power
        case "step":
            return scheduler.gamma ** (elapsed // (scheduler.step_size or max(horizon // 2, 1)))
        case "wsd":
            decay = min(scheduler.decay_steps or max(horizon // 5, 1), horizon)
            left = min(max(horizon - elapsed, 0) / decay, 1.0)
            return (low or 0.0) + (1.0 - (low or 0.0)) * left
    raise AssertionError(f"unknown schedule {scheduler.name}")


def _cosine(progress: float, low: float) -> float:
    return low + (1.0 - low) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _period_progress(elapsed: int, first: int, mult: int) -> float:
    """Fraction of the current period that has passed after `elapsed` steps, in [0, 1)."""
    period = first
    while elapsed >= period:
        # Periods of equal length need no loop, which would take a turn per period.
        if mult == 1:
            elapsed %= period
            break
        elapsed -= period
        period *= mult
    return elapsed / period
