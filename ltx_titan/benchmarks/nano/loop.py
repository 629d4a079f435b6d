"""Training loop of the recipe: a time budget, a learning rate that follows it, an average of the weights."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_titan.common.files import write_text

_WARMUP_STEPS = 200
_MAX_NORM = 1.0
_SAVE_SECONDS = 60.0


def train(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], dict[str, Tensor]],
    *,
    seconds: float,
    lr: float,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    log_every: int = 100,
    save: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains until the time is over, then sets the parameters to their moving average.

    The learning rate rises over the first steps and falls as a cosine of the time spent, so any budget ends at 0.

    Args:
        name: for log lines.
        parameters: to train.
        loss_of: step -> named scalars; `loss` is differentiated.
        seconds: budget.
        lr: highest learning rate.
        ema: decay of the moving average, reached after about 10 / (1 - ema) steps.
        weight_decay: of AdamW.
        log_every: steps between log lines.
        save: called every minute, so that a call that runs out of time leaves its last weights.

    Returns:
        Steps, seconds and the logged losses.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    weights: list[Tensor] = list(parameters)
    on_gpu = parameters[0].device.type == "cuda"
    # bfloat16 weights are too coarse for small updates.
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=on_gpu)
    average = [master.detach().clone() for master in masters]
    curve: list[dict[str, float]] = []
    started, step, saved = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - started) < seconds:
        factor = min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        losses = loss_of(step)
        losses["loss"].backward()
        for master, parameter in zip(masters, parameters, strict=True):
            # A frozen stream's output head has no gradient.
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, _MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
            # Slow averaging would keep the initial weights of a short run.
            torch._foreach_lerp_(average, masters, 1 - min(ema, (1 + step) / (10 + step)))
        step += 1
        if step % log_every == 0 or step == 1:
            # Also bounds how far the host runs ahead of the device, so the clock is the device's.
            values = {key: round(float(value.detach()), 5) for key, value in losses.items()}
            curve.append({"step": step, "seconds": round(time.monotonic() - started, 1), **values})
            print(f"{name}  {json.dumps(curve[-1])}", flush=True)
        if save is not None and spent - saved > _SAVE_SECONDS:
            save()
            saved = spent
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    spent = time.monotonic() - started
    return {
        "steps": step,
        "seconds": round(spent, 1),
        "ms_per_step": round(1e3 * spent / max(1, step), 2),
        "curve": curve,
    }


def write_result(folder: Path, stage: str, result: dict[str, Any]) -> None:
    """Writes the figures of a stage to `<stage>.json` and prints them without curves."""
    write_text(folder / f"{stage}.json", json.dumps(result, indent=2) + "\n")
    short = {key: value for key, value in result.items() if key != "training"}
    if "training" in result:
        short["training"] = {key: value for key, value in result["training"].items() if key != "curve"}
    print(f"{stage}  {json.dumps(short)}", flush=True)
