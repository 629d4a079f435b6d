"""A module with a few official parameter names, uneven sizes, and the ways it gets sharded and wrapped."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, CHANNELS, BLOCKS = 12, 5, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()
        self.scale_shift_table = nn.Parameter(torch.randn(9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x * self.scale_shift_table[0]) * self.scale_shift_table[1]


class Toy(nn.Module):
    """`audio` adds a parameter of the other stream; `keyframes_abs_pos_embedding` never gets a gradient."""

    def __init__(self, audio: bool = False):
        super().__init__()
        self.patchify_proj = nn.Linear(CHANNELS, WIDTH)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH))
        self.keyframes_abs_pos_embedding = nn.Parameter(torch.randn(1, WIDTH))
        if audio:
            self.audio_patchify_proj = nn.Linear(CHANNELS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify_proj(x)
        for block in self.transformer_blocks:
            x = block(x)
        return x * self.scale_shift_table[0]


def toy(seed: int = 0, audio: bool = False) -> Toy:
    """A toy with weights drawn from `seed`, in bfloat16-representable values."""
    torch.manual_seed(seed)
    module = Toy(audio)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn_like(tensor).bfloat16())
    return module


def _mesh(sizes: tuple[int, ...], names: tuple[str, ...]):
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _shard_all(module: Toy, mesh) -> Toy:
    for block in module.transformer_blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def fsdp(module: Toy) -> Toy:
    """Sharded over all ranks; with four of them some shards are empty and some are uneven."""
    return _shard_all(module, _mesh((dist.get_world_size(),), ("dp_shard",)))


def hsdp(module: Toy) -> Toy:
    """Two replicas, sharded over the rest."""
    return _shard_all(module, _mesh((2, dist.get_world_size() // 2), ("dp_replicate", "dp_shard")))


def fsdp_tp(module: Toy) -> Toy:
    """Tensor parallel over two ranks, sharded over the rest."""
    mesh = _mesh((dist.get_world_size() // 2, 2), ("dp_shard", "tp"))
    for block in module.transformer_blocks:
        parallelize_module(block.attn1, mesh["tp"], {"to_q": ColwiseParallel(), "to_out.0": RowwiseParallel()})
    return _shard_all(module, mesh["dp_shard"])


def wrapped(module: Toy) -> Toy:
    """Compiled blocks under activation checkpointing, then sharded: every level that changes names."""
    for index, block in enumerate(module.transformer_blocks):
        module.transformer_blocks[index] = checkpoint_wrapper(torch.compile(block, backend="eager"))
    return fsdp(module)


def plain(module: Toy) -> Toy:
    """As it is."""
    return module


LAYOUTS: dict[str, Callable[[Toy], Toy]] = {
    "fsdp": fsdp,
    "hsdp": hsdp,
    "fsdp_tp": fsdp_tp,
    "wrapped": wrapped,
    "plain": plain,
}


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, as a copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
