"""Sharding of tokens over ranks for tensor and context parallelism, and padding for float8.

Every rank passes whole sequences to the transformer and receives whole velocities, so the caller and the loss do not
depend on it. In between, from the pre-hook to the hook that `shard_tokens` registers on the model, the residual streams
are sharded:

    video  [B, S, D]   over cp, and each shard over tp   S / (cp * tp) tokens on a rank
    audio  [B, A, D]   over tp, the same on all cp ranks    (a clip has about a hundred audio tokens)

Sequences are padded once, at their end, so that all shards have equal length; attention sees true lengths only (cp.py),
and the velocities of padding are dropped before the loss. Every rank holds the whole text.
"""

from dataclasses import dataclass, replace
from inspect import signature
from math import lcm
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ltx_titan.model import LTXTransformer, Modality
from ltx_titan.model.adaln import distinct_timesteps
from ltx_titan.model.rope import distinct_coordinates, midpoints
from ltx_titan.parallel.collectives import Axis, gather_output, share_gradient
from ltx_titan.parallel.mesh import Mesh


@dataclass
class TokenLayout:
    """Axes that tokens are sharded over, and the true lengths of the sequences in the current forward pass.

    Lengths change from call to call: the pre-hook on the model sets them, attention reads them.
    """

    cp: Axis
    tp: Axis
    multiple: int
    video: int = 0
    audio: int = 0

    def padded(self, length: int, cp: int) -> int:
        """Rounds `length` up so that it shards evenly and each rank's matmuls have a multiple of `multiple` rows."""
        unit = cp * lcm(self.tp.size, self.multiple)
        return -(-length // unit) * unit


def shard_tokens(model: LTXTransformer, mesh: Mesh, *, multiple: int = 1) -> TokenLayout:
    """Registers hooks on `model` that shard its input tokens and gather its output velocities.

    Call it once, before tensor and context parallelism, which rely on it. Gradients of parameters are then partial over
    cp (FSDP2 sums them, its axis contains cp) and tp (`apply_tensor_parallel` declares them so).

    Args:
        model: changed in place; its inputs and outputs stay the same.
        mesh: the job's mesh.
        multiple: the number of tokens in a matmul is padded to a multiple of this.

    Returns:
        The layout, which the hooks keep up to date.
    """
    layout = TokenLayout(Axis.of(mesh.data["cp"]), Axis.of(mesh.data["tp"]), multiple)
    parameters = signature(model.forward)

    def enter(_: LTXTransformer, args: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]]:
        # Callers pass the streams by position or by name.
        arguments = parameters.bind(*args, **kwargs).arguments
        video, audio = arguments["video"], arguments["audio"]
        layout.video = 0 if video is None else video.latent.shape[1]
        layout.audio = 0 if audio is None else audio.latent.shape[1]
        if video is not None:
            arguments["video"] = _own_tokens(video, layout, layout.cp.size, layout.cp.rank)
        if audio is not None:
            # About a hundred tokens: replicated over cp, because exchanging them would cost more than computing them.
            arguments["audio"] = _own_tokens(audio, layout, 1, 0)
        return (), arguments

    def leave(
        _: LTXTransformer, args: tuple, velocities: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        video, audio = velocities
        if video is not None:
            # The inverse of `_own_tokens`: tp shards a cp shard, so tp is gathered first.
            video = gather_output(gather_output(video, 1, layout.tp), 1, layout.cp)[:, : layout.video]
        if audio is not None:
            # Every cp rank computes all audio, so without the division its loss would count cp times.
            audio = share_gradient(gather_output(audio, 1, layout.tp), layout.cp)[:, : layout.audio]
        return video, audio

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)
    return layout


def _own_tokens(whole: Modality, layout: TokenLayout, cp: int, cp_rank: int) -> Modality:
    """This rank's shard of one stream.

    Coordinates are those of the whole cp shard: attention rotates queries and keys after tp has gathered their tokens.
    """
    values, index = whole.timestep_values, whole.timestep_index
    if values is None:
        # Before sharding, so that the number of distinct timesteps is the same on all ranks.
        values, index = distinct_timesteps(whole.timesteps)
    coordinate_values, coordinate_index = whole.coordinate_values, whole.coordinate_index
    if coordinate_values is None:
        coordinate_values, coordinate_index = distinct_coordinates(midpoints(whole.positions.float()))

    length = whole.latent.shape[1]
    padding = layout.padded(length, cp) - length
    per_cp = (length + padding) // cp
    per_tp = per_cp // layout.tp.size

    def part(x: Tensor, dim: int, start: int, count: int) -> Tensor:
        # F.pad takes two numbers per dim, from the last dim on. Padded tokens get index 0, which is valid in any table;
        # their outputs are dropped.
        pads = [0, 0] * (x.ndim - 1 - dim) + [0, padding]
        return F.pad(x, pads).narrow(dim, start, count)

    def own(x: Tensor) -> Tensor:
        if x.shape[1] != length:  # one value for all tokens
            return x
        return part(x, 1, cp_rank * per_cp + layout.tp.rank * per_tp, per_tp)

    assert coordinate_index is not None, "distinct coordinates come with an index per token"

    return replace(
        whole,
        latent=own(whole.latent),
        timesteps=own(whole.timesteps),
        keyframes_mask=None if whole.keyframes_mask is None else own(whole.keyframes_mask),
        timestep_values=values,
        # None if each sample has a single timestep: then no token needs an index.
        timestep_index=None if index is None else own(index),
        coordinate_values=coordinate_values,
        coordinate_index=part(coordinate_index, 2, cp_rank * per_cp, per_cp),
    )
