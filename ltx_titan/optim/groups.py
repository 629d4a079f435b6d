"""Groups of weights that are trained differently: `[[optimizer.groups]]`.

A weight belongs to the first group that matches it. Frozen groups require no gradient, before the model is sharded; the
others become parameter groups of torch's optimizers, with a weight decay and a factor on the learning rate.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.config import OptimizerSection, ParameterGroup
from ltx_titan.model.parts import PARTS, matches


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The group of a parameter; None if no group matches it."""
    name = without_wrappers(name)
    return next((group for group in groups if matches(name, group.match, group.blocks)), None)


def freeze_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Freezes the weights of groups with `freeze = true`; call it after adapters are added, before sharding."""
    for name, parameter in model.named_parameters():
        group = group_of(name, groups)
        if group is not None and group.freeze:
            parameter.requires_grad_(False)


def check_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Checks that each group has trained weights and that some weight is left to train.

    Args:
        model: with its adapters, before `freeze_groups`.
        groups: of the job.

    Raises:
        ValueError: a group matches no weight, or only weights of earlier groups, or all weights are frozen.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = {group.name: 0 for group in groups}
    left = 0
    for name in trained:
        group = group_of(name, groups)
        if group is not None:
            found[group.name] += 1
        left += group is None or not group.freeze
    for index, group in enumerate(groups):
        if not found[group.name]:
            overlaps = any(matches(without_wrappers(name), group.match, group.blocks) for name in trained)
            why = "all of its weights are in earlier groups" if overlaps else "it matches no trained weight"
            raise ValueError(
                f"optimizer.groups[{index}] ({group.name}): expected trained weights, found none: {why}. match takes "
                f"{', '.join(PARTS)}, and parts of names such as attn1.to_q; blocks counts from 0."
            )
    if not left:
        raise ValueError("optimizer.groups: every trained weight is frozen; leave some to train.")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSection) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimizer, each with `weight_decay`, and `lr_factor`, which `set_lr` reads."""
    groups: dict[str | None, dict[str, Any]] = {}
    for name, parameter in named:
        group = group_of(name, settings.groups)
        decay = settings.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        new = {"params": [], "weight_decay": decay, "lr_factor": 1.0 if group is None else group.lr_factor}
        groups.setdefault(None if group is None else group.name, new)["params"].append(parameter)
    return list(groups.values())
