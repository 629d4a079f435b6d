"""A module's tensors as checkpoints store them: official names, plain storage.

Some wrappers change what `state_dict()` returns. Activation checkpointing and torch.compile insert a level into the
names, and float8 all-gather replaces a weight's local tensor by a subclass that other processes cannot read back. Both
are removed here, for loading, saving and exporting alike. The tensors share storage with the module, so writing into
them loads the module.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ltx_titan.common.tensors import without_wrappers

Box = tuple[slice, ...]
"""A rectangular part of a tensor, one slice per dimension; empty for a scalar."""


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and persistent buffer by name, unwrapped, detached, sharing storage with the module.

    Goes through `state_dict()` rather than `named_parameters()`: FSDP2 returns its parameters to the sharded state
    there, also the ones that a forward pass left gathered.
    """
    return {without_wrappers(name): plain_tensor(tensor) for name, tensor in module.state_dict().items()}


def parameter_names(module: nn.Module) -> dict[Tensor, str]:
    """Returns the name of each parameter object without wrapper levels, to translate an optimizer's state."""
    tensors = module.state_dict(keep_vars=True)
    return {tensor: without_wrappers(name) for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def plain_tensor(tensor: Tensor) -> Tensor:
    """Removes a float8 all-gather subclass, locally or inside a DTensor; any other tensor is returned detached."""
    if not isinstance(tensor, DTensor):
        return _unwrap(tensor.detach())
    # The attribute, not to_local(): that one would record or redistribute, and here storage must be shared.
    local = tensor._local_tensor.detach()
    inner = _unwrap(local)
    if inner is local:
        return tensor.detach()
    # The global shape must be given: `from_local` would infer it from this rank's shard, wrongly for uneven shards.
    return DTensor.from_local(
        inner, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def local_box(tensor: Tensor) -> tuple[Tensor, Box]:
    """Returns this rank's shard of a tensor, sharing storage, and the part of the full tensor that it covers."""
    if not isinstance(tensor, DTensor):
        return tensor, full_box(tensor.shape)
    assert not any(placement.is_partial() for placement in tensor.placements), "parameters are never partial sums"
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor._local_tensor
    assert tuple(local.shape) == tuple(shape), f"local shape {tuple(local.shape)}, expected {tuple(shape)}"
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def full_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor of `shape`."""
    return tuple(slice(0, size) for size in shape)


def _unwrap(tensor: Tensor) -> Tensor:
    # By name, so that torchao is imported only where it is used. It keeps the high-precision weight as `_tensor`.
    if type(tensor).__name__ != "WeightWithDynamicFloat8CastTensor":
        return tensor
    return tensor._tensor  # type: ignore[attr-defined]
