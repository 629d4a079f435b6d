"""Prodigy (Mishchenko and Defazio, 2024, arXiv 2306.06101): AdamW that estimates its own step size.

    r <- b3 r + lr' d^2 / d0 <g, p0 - p>        p0: the initial weights; lr': lr with Adam's bias correction
    s <- b3 s + d^2 / d0 g                      b3 = sqrt(b2)
    d <- max(d, d_coef r / |s|_1)               the step size, from d0 = 1e-6 upwards
    m, v: AdamW's moments of d g                p <- p - lr' d (m / (sqrt(v) + d eps) + wd p), with the old d before m

The formulas are those of the package `prodigyopt` with its options for diffusion models, `use_bias_correction` and
`safeguard_warmup`; so are the numbers on one rank. The package sums r and |s|_1 on the host, two waits for the device
per weight, and over ranks counts a replicated weight once per replica. Here d stays on the device, and each sharding
has one all-reduce. State takes 16 bytes per weight.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltx_titan.common.tensors import local
from ltx_titan.optim.sharding import chunks, like, sum_over_shards

# Step size before the first estimate; the package's default.
_D0 = 1e-6


class Prodigy(Optimizer):
    """Prodigy on plain or sharded parameters; the step size is estimated from all of them together.

    Args:
        params: parameters or groups, which may differ in weight decay only.
        lr: factor on the estimated step size.
        betas, eps, weight_decay: as in AdamW.
        d_coef: factor on the estimate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d_coef: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.d_coef = d_coef

    @property
    def step_size(self) -> Tensor | None:
        """d, a float64 scalar on the parameters' device; None before the first step."""
        known = (self.state[p]["estimate"][0] for p in self._parameters() if p in self.state)
        return next(known, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Updates every parameter that has a gradient; a collective call, since the ranks estimate together."""
        assert closure is None, "closures are not supported"
        updated = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if not updated:
            return
        # Before any state is read: parameters that are new here take part in the estimate of the others.
        known = next((self.state[p] for p in updated if p in self.state), None)
        for parameter in updated:
            if parameter not in self.state:
                self._init_state(parameter, known)
        first = self.state[updated[0]]
        lr, (beta1, beta2) = self.param_groups[0]["lr"], self.param_groups[0]["betas"]
        first["step"] += 1
        taken = float(first["step"])
        rate = lr * (1 - beta2**taken) ** 0.5 / (1 - beta1**taken)
        d, r = first["estimate"].unbind()
        alignment, norm = self._accumulate(updated, d, rate)
        r = beta2**0.5 * r + alignment
        # Without any gradient both sums are 0.
        estimate = torch.where(norm > 0, self.d_coef * r / norm, d)
        new = torch.maximum(d, estimate)
        for group in self.param_groups:
            self._move([p for p in group["params"] if p.grad is not None], group, d * rate, new)
        state = torch.stack([new, r])
        for parameter in updated:
            self.state[parameter] |= {"step": first["step"], "estimate": state}

    def _accumulate(self, parameters: list[Tensor], d: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Adds the gradients to moments and sums; returns the step's term of r, and |s|_1, over all ranks."""
        beta1, beta2 = self.param_groups[0]["betas"]
        scale = d / _D0
        sums: dict[Tensor, Tensor] = {}
        for chunk in chunks(parameters):
            gradients = [local(parameter.grad) for parameter in chunk if parameter.grad is not None]
            moves = torch._foreach_sub(self._local("p0", chunk), [local(parameter) for parameter in chunk])
            dots = [torch.dot(g.flatten(), move.flatten()) for g, move in zip(gradients, moves, strict=True)]
            del moves  # each of these lists takes as much memory as the chunk
            scaled = torch._foreach_mul(gradients, d.to(gradients[0].dtype))
            first, second, s = (self._local(name, chunk) for name in ("exp_avg", "exp_avg_sq", "s"))
            torch._foreach_lerp_(first, scaled, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, scaled, scaled, value=1 - beta2)
            _scale(scaled, scale)
            torch._foreach_mul_(s, beta2**0.5)
            torch._foreach_add_(s, scaled)
            norms = torch._foreach_norm(s, 1)
            for parameter, dot, norm in zip(chunk, dots, norms, strict=True):
                sums[parameter] = torch.stack([dot, norm])
        alignment, norm = sum_over_shards(sums).unbind()
        return scale * d * rate * alignment, norm

    def _move(self, parameters: list[Tensor], group: dict[str, Any], size: Tensor, d: Tensor) -> None:
        """Moves weights by `size`, from the step size before this step, with `d` after it in the denominator."""
        for chunk in chunks(parameters):
            weights = [local(parameter) for parameter in chunk]
            # Divided by d, so that eps is added as a number: a dry run cannot add a tensor to a list of them.
            denominators = torch._foreach_sqrt(self._local("exp_avg_sq", chunk))
            _scale(denominators, 1 / d)
            torch._foreach_add_(denominators, group["eps"])
            moves = torch._foreach_div(self._local("exp_avg", chunk), denominators)
            if group["weight_decay"]:
                # Of the decayed weights, as the package does it.
                _scale(weights, 1 - group["weight_decay"] * size)
            _scale(moves, size / d)
            torch._foreach_sub_(weights, moves)

    def _init_state(self, parameter: Tensor, known: dict[str, Any] | None) -> None:
        shard = local(parameter)
        state = self.state[parameter]
        state["p0"] = like(parameter, shard.clone(), parameter.shape)
        for name in ("s", "exp_avg", "exp_avg_sq"):
            state[name] = like(parameter, torch.zeros_like(shard), parameter.shape)
        if known is None:
            # The count on the host, which needs it as a number; the estimate where it is computed.
            estimate = torch.tensor([_D0, 0.0], dtype=torch.float64, device=shard.device)
            known = {"step": torch.tensor(0.0), "estimate": estimate}
        state |= {name: known[name] for name in ("step", "estimate")}

    def _local(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        return [local(self.state[parameter][name]) for parameter in parameters]

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


def _scale(tensors: list[Tensor] | tuple[Tensor, ...], factor: Tensor) -> None:
    torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))
