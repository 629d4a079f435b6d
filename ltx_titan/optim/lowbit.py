"""AdamW with moments in 8 or 4 bits, in torchao's formats and with its update function.

torchao's own optimizer stores a moment as a tensor subclass and decides shard by shard whether to quantize it, so its
state fits one sharding only. Here the decision depends on the parameter alone, and state is plain tensors:

    codes   uint8, in the parameter's shape (8-bit), or half as wide (4-bit, two codes in a byte)
    scale   float32, one for every 128 elements of a row

Both are sharded like the parameter, so a run resumes exactly on any number of ranks. Biases, tables and matrices whose
rows are not a multiple of 128 have float32 moments: they are small. With `bits = 32` all do.

On GPUs the kernels of `ltx_titan_kernels.adamw8bit` and `adamw` update all weights in a few launches. They have no
codes of 4 bits; weights with such moments have torchao's update, compiled, one after the other.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from ltx_titan.common.tensors import local, runs_triton, seed_of
from ltx_titan.optim.adamw import Skippable
from ltx_titan.optim.sharding import BLOCK, has_blocks, like

if TYPE_CHECKING:
    from ltx_titan_kernels import adamw, adamw8bit


class LowBitAdamW(Skippable, Optimizer):
    """AdamW with quantized moments.

    Args:
        params: parameters or groups.
        bits: 8, 4 or 32.
        lr, betas, eps, weight_decay: as in AdamW.
        stochastic_rounding: round bfloat16 parameters up or down at random, with the exact value as the mean.
        seed: of the rounding. Random numbers depend on (seed, step), the weight, and the element's place in the shard:
            they are the same on all ranks, so that replicas of a weight stay equal.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        bits: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        assert bits in (4, 8, 32), bits
        self.bits = bits
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._maps: dict[tuple[torch.device, bool], Tensor] = {}
        self._updaters: tuple[adamw8bit.Updater | None, adamw.Updater] | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Of the kernels: every weight has random numbers of its own.
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._seeds = {p: seed_of(f"{seed}/{number}", num_bytes=4) >> 1 for number, p in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Updates every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        rest: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self._init_state(parameter)
            rest += [(parameter, group) for parameter in self._update_by_kernels(parameters, group)]
        if not rest or (self.found_inf is not None and bool(self.found_inf)):
            return
        with self._seeded_rounding(rest[0][0]):
            for parameter, group in rest:
                self._update(parameter, group)

    def _update_by_kernels(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Updates weights of a group in a few launches; returns those that the kernels do not take."""
        if not parameters or not self._has_kernels(parameters[0]):
            return parameters
        if self._updaters is None:
            # Imported here: Triton is not everywhere.
            from ltx_titan_kernels import adamw, adamw8bit

            device = local(parameters[0]).device
            levels = [self._levels(device, signed) for signed in (True, False)] if self.bits == 8 else None
            self._updaters = None if levels is None else adamw8bit.Updater(*levels), adamw.Updater()
        by_codes, by_values = self._updaters
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        settings |= {"scale": self.grad_scale, "skip": self.found_inf}
        coded = [parameter for parameter in parameters if self._is_quantized(parameter)]
        others = [parameter for parameter in parameters if not self._is_quantized(parameter)]
        moments = ["exp_avg", "exp_avg_sq"]
        rest = []
        for update, members, names in (
            (by_codes, coded, [f"{moment}.{part}" for moment in moments for part in ("codes", "scale")]),
            (by_values, others, moments),
        ):
            seeds = [self._seeds[member] for member in members] if self.stochastic_rounding else None
            if members and (update is None or not update(*self._tensors(members, names), **settings, seeds=seeds)):
                rest += members
        return rest

    def _has_kernels(self, parameter: Tensor) -> bool:
        # Torchao's rounding needs the step on the host, where kernels cannot count it.
        return (self.bits != 4 or not self.stochastic_rounding) and runs_triton(local(parameter).device)

    def _tensors(self, parameters: list[Tensor], state: list[str]) -> list[list[Tensor]]:
        """Local weights, their gradients, their state by name, and their steps."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        values = [[local(self.state[parameter][name]) for parameter in parameters] for name in state]
        steps = [self.state[parameter]["step"] for parameter in parameters]
        return [[local(p).detach() for p in parameters], [local(g) for g in gradients], *values, steps]

    @contextmanager
    def _seeded_rounding(self, parameter: Tensor) -> Iterator[None]:
        """Seeds torch's global generators for one step if it rounds at random, and restores them afterwards."""
        if not self.stochastic_rounding:
            yield
            return
        step = int(self.state[parameter]["step"])
        devices = [local(parameter).device] if local(parameter).is_cuda else []
        # torchao's update draws from the global generator and takes no other.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(f"{self.seed}/{step}", num_bytes=7))
            yield

    def _init_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        # On the device, where kernels count, unless the host reads it.
        is_read = self.stochastic_rounding and not self._has_kernels(parameter)
        state["step"] = torch.zeros((), device="cpu" if is_read else local(parameter).device)
        for name in ("exp_avg", "exp_avg_sq"):
            shard = local(parameter)
            if not self._is_quantized(parameter):
                zeros = torch.zeros_like(shard, dtype=torch.float32)
                state[name] = like(parameter, zeros, parameter.shape)
                continue
            width = parameter.shape[-1]
            # A block must not span ranks: its scale is a maximum over all of its elements.
            if shard.shape[-1] % BLOCK != 0:
                raise ValueError(
                    f"optimizer.name: a weight's rows are split into {shard.shape[-1]} of {width} columns, expected a "
                    f'multiple of {BLOCK}; lower parallelism.tp, or use "adamw".'
                )
            rows, columns = shard.shape[:-1], shard.shape[-1]
            per_byte = 8 // self.bits
            # With a scale of zero, every code decodes to zero.
            codes = torch.zeros(*rows, columns // per_byte, dtype=torch.uint8, device=shard.device)
            scale = torch.zeros(*rows, columns // BLOCK, device=shard.device)
            state[f"{name}.codes"] = like(parameter, codes, (*parameter.shape[:-1], width // per_byte))
            state[f"{name}.scale"] = like(parameter, scale, (*parameter.shape[:-1], width // BLOCK))

    def _is_quantized(self, parameter: Tensor) -> bool:
        # Global sizes only: the decision is the same for every sharding, so a checkpoint fits all of them.
        return self.bits < 32 and has_blocks(parameter.shape)

    def _moment(self, parameter: Tensor, name: str, signed: bool) -> Tensor:
        """The moment as a tensor subclass for torchao's update function; shares the state's storage."""
        state = self.state[parameter]
        if name in state:
            return local(state[name])
        codes = local(state[f"{name}.codes"])
        # torchao keeps scales flat, [rows * blocks]; ours are [rows, blocks] so that they shard like the parameter.
        scale = local(state[f"{name}.scale"]).view(-1)
        levels = self._levels(codes.device, signed)
        if self.bits == 8:
            return OptimState8bit(codes, scale, levels, signed, torch.float32)
        return OptimState4bit(codes.view(-1), scale, levels, signed, local(parameter).shape, torch.float32)

    def _levels(self, device: torch.device, signed: bool) -> Tensor:
        """Torchao's table of the value of each code."""
        if (device, signed) not in self._maps:
            kind = OptimState8bit if self.bits == 8 else OptimState4bit
            self._maps[device, signed] = kind.zeros((1, BLOCK), signed, BLOCK, device).qmap
        return self._maps[device, signed]

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        weight, gradient = local(parameter).detach(), local(parameter.grad)
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        state = self.state[parameter]
        state["step"] += 1
        # FSDP2 chunks dim 0, which leaves the last ranks without rows of a short parameter.
        if prod(weight.shape) == 0:
            return
        # Compiled, the update is one pass over memory. On a CPU, where only tests run, compilation would take longer.
        function = _compiled_adam if weight.is_cuda else single_param_adam
        # One compilation per shape of a weight, which are more than Dynamo allows for one function.
        with torch._dynamo.utils.disable_cache_limit():
            function(
                weight,
                gradient,
                state["step"],
                self._moment(parameter, "exp_avg", True),
                self._moment(parameter, "exp_avg_sq", False),
                None,
                # A tensor, so that a new learning rate does not recompile.
                torch.tensor(group["lr"], dtype=torch.float32),
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                True,
                self.stochastic_rounding and weight.dtype == torch.bfloat16,
            )


_compiled_adam = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
