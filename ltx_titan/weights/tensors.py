"""A module's tensors as checkpoints want them: official names, plain storage.

Wrappers that train faster leave traces. Activation checkpointing and torch.compile insert a level into the names, and
float8 all-gather replaces a weight's local tensor by a subclass that other processes cannot read back. Both are taken
off here, for loading, saving and exporting alike. What is returned shares storage with the module, so writing into it
loads the module.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_WRAPPER_LEVELS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def official_name(name: str) -> str:
    """`name` without the levels that wrappers insert."""
    for level in _WRAPPER_LEVELS:
        name = name.replace(level, "")
    return name


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by official name, unwrapped, detached, sharing storage with the module.

    Goes through `state_dict()` rather than `named_parameters()`: FSDP2 brings its parameters back to the sharded
    state there, also the ones that a forward pass left gathered.
    """
    return {official_name(name): plain_tensor(tensor) for name, tensor in module.state_dict().items()}


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Official name of each parameter object, to translate what an optimizer holds."""
    tensors = module.state_dict(keep_vars=True)
    return {tensor: official_name(name) for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def plain_tensor(tensor: Tensor) -> Tensor:
    """`tensor` without a float8 all-gather subclass, locally or inside a DTensor; anything else as it is."""
    if not isinstance(tensor, DTensor):
        return _unwrap(tensor.detach())
    # The attribute, not to_local(): that one would record or redistribute, and here storage must be shared.
    local = tensor.detach()._local_tensor
    inner = _unwrap(local)
    if inner is local:
        return tensor.detach()
    return DTensor.from_local(
        inner, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _unwrap(tensor: Tensor) -> Tensor:
    # By name, so that torchao is imported only where it is used. It keeps the high-precision weight as `_tensor`.
    return tensor._tensor if type(tensor).__name__ == "WeightWithDynamicFloat8CastTensor" else tensor
