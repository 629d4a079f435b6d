"""Builds the optimizers of `[optimizer]` and presents them to the training loop as one.

AdamW is one pass over local shards. Muon needs AdamW for what is not a matrix; updates in the backward pass and
offloaded state need one optimizer per block.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ltx_titan.config import OptimizerSection
from ltx_titan.optim.adafactor import Adafactor
from ltx_titan.optim.adamw import ShardedAdamW, Skippable
from ltx_titan.optim.groups import parameter_groups
from ltx_titan.optim.muon import Muon
from ltx_titan.optim.offload import keep_state_on_host
from ltx_titan.optim.prodigy import Prodigy
from ltx_titan.optim.schedule_free import ScheduleFreeAdamW
from ltx_titan.optim.sharding import reshard

STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2.1,
    "adamw4bit": 1.1,
    "adamw_schedulefree": 8.0,
    "prodigy": 16.0,
    "muon": 4.0,
    "adafactor": 0.0,
}
"""Optimizer state per trained weight, by `optimizer.name`."""

Named = list[tuple[str, nn.Parameter]]


class Optimizers:
    """All optimizers of a job; each trained parameter belongs to one.

    Attributes:
        parts: the optimizers, for `checkpoint.TrainingState`.
    """

    def __init__(self, parts: list[Optimizer], settings: OptimizerSection) -> None:
        self.parts = parts
        self._in_backward = settings.in_backward
        self._offloaded = settings.offload_state
        # Of the part whose parameters are getting their gradients: its index, and how many have one.
        self._arriving = (-1, 0)
        if settings.in_backward:
            self._step_in_backward()

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next update; with `in_backward` before the backward pass."""
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * group["lr_factor"])  # in place: CUDA graphs read it there
                else:
                    group["lr"] = lr * group["lr_factor"]

    @property
    def can_skip(self) -> bool:
        """Whether `step` takes tensors that scale or skip it: only AdamW's updates do, with moments of any width."""
        return not self._in_backward and all(isinstance(part, Skippable) for part in self.parts)

    @property
    def can_scale(self) -> bool:
        """Whether `step` should apply the clip factor, which saves a pass over the gradients.

        Only on a GPU: a run on a CPU has the bits that it had before.
        """
        devices = (group["params"][0].device for part in self.parts for group in part.param_groups)
        return self.can_skip and all(device.type == "cuda" for device in devices)

    def step(self, factor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Updates the weights; with `in_backward` only those that have not been updated yet.

        Args:
            factor: on all gradients, a scalar on their device. Only if `can_skip`.
            skip: 1.0 leaves weights and state as they are, 0.0 updates them: the host need not know. Only if
                `can_skip`.
        """
        if self._in_backward:
            # The block that the backward pass ended with, if some of its weights had no gradient.
            self._arriving = (-1, 0)
            for part in self.parts:
                if any(parameter.grad is not None for group in part.param_groups for parameter in group["params"]):
                    _step_and_free(part)
            return
        assert (factor is None and skip is None) or self.can_skip
        scale = None if factor is None else factor.reciprocal()
        for part in self.parts:
            if isinstance(part, Skippable):
                # Read on the device.
                part.grad_scale, part.found_inf = scale, skip
            part.step()
        if self._offloaded and torch.cuda.is_available():
            # A checkpoint may read the state next, which is still being copied to the host.
            torch.cuda.current_stream().synchronize()

    @property
    def averages(self) -> bool:
        """Whether the weights to use are others than those in training."""
        return any(isinstance(part, ScheduleFreeAdamW) for part in self.parts)

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's weights are those to sample, evaluate and export.

        With `adamw_schedulefree` they are an average, and the trained weights are restored afterwards, bit for bit;
        with the others they are the trained weights.
        """
        if not self.averages:
            yield
            return
        reshard(model)
        try:
            with ExitStack() as stack:
                for part in self.parts:
                    if isinstance(part, ScheduleFreeAdamW):
                        stack.enter_context(part.averaged())
                yield
        finally:
            reshard(model)

    def figures(self) -> dict[str, float]:
        """What the optimizers have estimated, by TensorBoard tag; waits for the device."""
        found = {}
        for part in self.parts:
            if isinstance(part, Prodigy) and (size := part.step_size) is not None:
                found["optim/step_size"] = size.item()
        return found

    def _step_in_backward(self) -> None:
        """Updates the parameters of each block as soon as they have their gradients.

        FSDP2 reduces the gradients of a block together, then calls the hooks of its parameters, one after the other.
        """
        # A hook belongs to its parameter, in C++, where the garbage collector does not look: if it held an optimizer,
        # which holds the parameter, neither would ever be freed.
        reference = weakref.ref(self)

        def add_hook(parameter: nn.Parameter, index: int) -> None:
            def hook(_: Tensor) -> None:
                optimizers = reference()
                assert optimizers is not None, "a backward pass of a model whose optimizers are gone"
                optimizers._receive(index)

            parameter.register_post_accumulate_grad_hook(hook)

        for index, part in enumerate(self.parts):
            for group in part.param_groups:
                for parameter in group["params"]:
                    add_hook(parameter, index)

    def _receive(self, index: int) -> None:
        """Counts the gradients of a part, and updates its parameters when all have one or another part has its turn."""
        last, count = self._arriving
        if last not in (index, -1):
            # Some of its parameters were not used in this pass.
            _step_and_free(self.parts[last])
            count = 0
        count += 1
        if count == sum(len(group["params"]) for group in self.parts[index].param_groups):
            _step_and_free(self.parts[index])
            index, count = -1, 0
        self._arriving = (index, count)

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for part in self.parts:
            # None instead of zeros: the forward pass can use the memory, and the first micro-batch stores instead of
            # adding.
            part.zero_grad(set_to_none=True)


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSection, *, seed: int = 0
) -> Optimizers:
    """Builds the optimizers for the parameters that require a gradient.

    Call it last, when the parameters have their final sharding and storage.

    Args:
        named_parameters: `model.named_parameters()`; Muon selects matrices by name.
        settings: the job's `[optimizer]`.
        seed: of stochastic rounding.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not named:
        raise ValueError("optimizer: no weight requires a gradient; check model.mode and lora.targets.")
    parts: list[Optimizer] = []
    # One optimizer per block would otherwise round all of them with the same numbers.
    for number, group in enumerate(_groups(named, settings)):
        if settings.name == "muon":
            matrices = [item for item in group if is_matrix(*item)]
            others = [item for item in group if not is_matrix(*item)]
            if matrices:
                parts.append(Muon(parameter_groups(matrices, settings), lr=settings.lr, momentum=settings.momentum))
            if others:
                parts.append(_adamw(others, settings, seed + number))
        elif settings.name == "adafactor":
            parts.append(
                Adafactor(
                    parameter_groups(group, settings),
                    lr=settings.lr,
                    stochastic_rounding=settings.stochastic_rounding,
                    seed=seed + number,
                )
            )
        elif settings.name == "adamw_schedulefree":
            parts.append(
                ScheduleFreeAdamW(
                    parameter_groups(group, settings), lr=settings.lr, betas=settings.betas, eps=settings.eps
                )
            )
        elif settings.name == "prodigy":
            parts.append(
                Prodigy(
                    parameter_groups(group, settings),
                    lr=settings.lr,
                    betas=settings.betas,
                    eps=settings.eps,
                    d_coef=settings.d_coef,
                )
            )
        else:
            parts.append(_adamw(group, settings, seed + number))
    if settings.offload_state:
        for part in parts:
            keep_state_on_host(part)
    return Optimizers(parts, settings)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: weights of the blocks' linear layers and their adapters.

    Scale-shift tables are two-dimensional but not linear maps. Embeddings, output heads and gates map between unlike
    spaces, for which an orthogonal update is not meaningful.
    """
    in_block = "transformer_blocks." in name and "to_gate_logits" not in name
    return in_block and parameter.ndim == 2 and name.endswith(".weight")


def _groups(named: Named, settings: OptimizerSection) -> list[Named]:
    """Parameters grouped by optimizer: all together, or those of each block."""
    if not settings.in_backward and not settings.offload_state:
        return [named]
    # Everything outside the blocks is about as large as one block (0.43 and 0.39 B weights in LTX-2.3): one more group.
    groups: dict[str, Named] = {}
    for name, parameter in named:
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] == "transformer_blocks" else ""
        groups.setdefault(key, []).append((name, parameter))
    return list(groups.values())


def _adamw(named: Named, settings: OptimizerSection, seed: int) -> Optimizer:
    parameters = parameter_groups(named, settings)
    # Stochastic rounding is a feature of torchao's update alone, so it selects that with unquantized moments (32 bits).
    bits = {"adamw8bit": 8, "adamw4bit": 4}.get(settings.name, 32)
    if bits < 32 or settings.stochastic_rounding:
        # Imported here: torchao takes seconds to import.
        from ltx_titan.optim.lowbit import LowBitAdamW

        return LowBitAdamW(
            parameters,
            bits=bits,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            stochastic_rounding=settings.stochastic_rounding,
            seed=seed,
        )
    return ShardedAdamW(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def _step_and_free(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
