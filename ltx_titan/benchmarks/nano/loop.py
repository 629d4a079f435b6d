"""Training loop of the recipe: a time budget, a learning rate that follows it, an average of the weights.

On a GPU the whole step (forward, backward, optimizer) is one CUDA graph: models this small are limited by the launches
of their kernels. What a step reads is drawn outside of it, into the same tensors each time.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ltx_titan.common.files import write_text
from ltx_titan.config import OptimizerSection
from ltx_titan.optim import Optimizers, build_optimizers

Inputs = tuple[Tensor, ...]

_WARMUP_STEPS = 200
_MAX_NORM = 1.0
_SAVE_SECONDS = 60.0
# Eager steps before the capture: optimizer states exist, kernels are compiled and chosen.
_EAGER_STEPS = 5
# Steps between updates of the average, and how far the host may run ahead of the device.
_AVERAGE_EVERY, _WAIT_EVERY = 8, 20


class _Step:
    """One optimizer step: float32 weights here, the model's own in whatever dtype they are."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        loss_of: Callable[..., dict[str, Tensor]],
        lr: float,
        weight_decay: float,
        optimizer: str = "adamw",
    ) -> None:
        self.parameters, self._loss_of = parameters, loss_of
        device = parameters[0].device
        on_gpu = device.type == "cuda"
        # bfloat16 weights are too coarse for small updates.
        self.masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
        # A tensor, which a captured optimizer reads in every replay.
        self._lr = torch.full((), lr, device=device)
        self._is_captured = on_gpu and optimizer == "adamw"
        if optimizer == "adamw8bit":
            section = OptimizerSection(name="adamw8bit", lr=lr, weight_decay=weight_decay)
            named = [(str(index), cast(nn.Parameter, master)) for index, master in enumerate(self.masters)]
            self._optimizer: Any = build_optimizers(named, section)
        else:
            self._optimizer = torch.optim.AdamW(
                self.masters,
                lr=self._lr if on_gpu else lr,
                betas=(0.9, 0.99),
                weight_decay=weight_decay,
                fused=on_gpu,
                capturable=on_gpu,
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Inputs = ()
        self._losses: dict[str, Tensor] = {}

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the following steps."""
        if self._is_captured:
            self._lr.fill_(lr)
        elif isinstance(self._optimizer, Optimizers):
            self._optimizer.set_lr(lr)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = lr

    def capture(self, inputs: Inputs) -> None:
        """Captures a step as a CUDA graph; needs earlier steps with inputs of the same shapes."""
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._clear()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._losses = self._run(self._inputs)
        self._graph = graph

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """Trains on one batch; returns its losses."""
        if self._graph is None:
            self._clear()
            return self._run(inputs)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._losses

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _run(self, inputs: Inputs) -> dict[str, Tensor]:
        losses = self._loss_of(*inputs)
        losses["loss"].backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            # A parameter that the loss does not depend on has no gradient.
            master.grad = None if parameter.grad is None else parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, _MAX_NORM, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters), list[Tensor](self.masters))
        return {name: loss.detach() for name, loss in losses.items()}


def train(
    name: str,
    parameters: Iterable[nn.Parameter],
    inputs_of: Callable[[int], Inputs],
    loss_of: Callable[..., dict[str, Tensor]],
    *,
    lr: float,
    seconds: float = math.inf,
    steps: int | None = None,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    warmup: int = _WARMUP_STEPS,
    log_every: int = 100,
    graphed: bool = True,
    optimizer: Literal["adamw", "adamw8bit"] = "adamw",
    save: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains until the time or the steps are over, then sets the parameters to their moving average.

    The learning rate rises over the first steps and falls as a cosine of what is spent, so any budget ends at 0.
    Compilation and capture are not part of the budget.

    Args:
        name: for log lines.
        parameters: to train.
        inputs_of: step -> tensors on the device, of the same shapes in each step.
        loss_of: those tensors -> named scalars, of which `loss` is differentiated; never waits for the device.
        lr: highest learning rate.
        seconds: budget in time.
        steps: budget in steps, instead of time.
        ema: decay of the moving average, reached after about 10 / (1 - ema) steps.
        weight_decay: of AdamW.
        warmup: steps over which the learning rate rises.
        log_every: steps between log lines.
        graphed: capture the step as a CUDA graph (GPU).
        optimizer: "adamw8bit" keeps its moments in 8 bits, and cannot be captured.
        save: called every minute, so that a call that runs out of time leaves its last weights.

    Returns:
        Steps, seconds and the logged losses.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    on_gpu = parameters[0].device.type == "cuda"
    run = _Step(parameters, loss_of, lr, weight_decay, optimizer)
    average = [master.detach().clone() for master in run.masters]
    curve: list[dict[str, float]] = []
    step = 0
    if on_gpu:
        began = time.monotonic()
        step = _prepare(run, inputs_of, lr / warmup, graphed)
        print(f"{name}  prepared in {time.monotonic() - began:.1f} s", flush=True)
    started, saved = time.monotonic(), 0.0
    while (spent := time.monotonic() - started) < seconds and (steps is None or step < steps):
        progress = spent / seconds if steps is None else step / steps
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        run.set_lr(lr * factor)
        losses = run(inputs_of(step))
        step += 1
        if step % _AVERAGE_EVERY == 0:
            # Slow averaging would keep the initial weights of a short run.
            decay = min(ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, [master.detach() for master in run.masters], 1 - decay**_AVERAGE_EVERY)
        if on_gpu and step % _WAIT_EVERY == 0:
            torch.cuda.synchronize()
        if step % log_every == 0 or step == 1:
            values = {key: round(float(value), 5) for key, value in losses.items()}
            curve.append({"step": step, "seconds": round(time.monotonic() - started, 1), **values})
            print(f"{name}  {json.dumps(curve[-1])}", flush=True)
        if save is not None and spent - saved > _SAVE_SECONDS:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), average)
                save()
                torch._foreach_copy_(list(parameters), list[Tensor](run.masters))
            saved = spent
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), average)
    spent = time.monotonic() - started
    return {
        "steps": step,
        "seconds": round(spent, 1),
        "ms_per_step": round(1e3 * spent / max(1, step), 2),
        "curve": curve,
    }


def _prepare(run: _Step, inputs_of: Callable[[int], Inputs], lr: float, graphed: bool) -> int:
    """Runs eager steps on a side stream, as a capture needs, and captures; returns their number."""
    run.set_lr(lr)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(_EAGER_STEPS):
            run(inputs_of(step))
    torch.cuda.current_stream().wait_stream(side)
    if graphed:
        try:
            run.capture(inputs_of(_EAGER_STEPS))
        except RuntimeError as error:
            # Slower, but a driver that cannot capture a kernel still trains.
            print(f"no CUDA graph: {error}", flush=True)
    return _EAGER_STEPS


def write_result(folder: Path, stage: str, result: dict[str, Any]) -> None:
    """Writes the figures of a stage to `<stage>.json` and prints them without curves."""
    write_text(folder / f"{stage}.json", json.dumps(result, indent=2) + "\n")
    short = {key: value for key, value in result.items() if key != "training"}
    if "training" in result:
        short["training"] = {key: value for key, value in result["training"].items() if key != "curve"}
    print(f"{stage}  {json.dumps(short)}", flush=True)
