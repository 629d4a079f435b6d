"""Which rank holds which tokens, under tensor and context parallelism and for float8.

Every rank hands the transformer the whole sequences and gets the whole velocities back, so neither its caller nor the
loss knows of this. Inside, between the two hooks that `shard_tokens` puts on the model, the residual streams are split:

    video  [B, S, D]   over cp, and each part over tp    S / (cp * tp) tokens on a rank
    audio  [B, A, D]   over tp, the same on all cp ranks    (a clip has about a hundred audio tokens)

Sequences are padded once, at their end, so that all parts are equal; attention sees true lengths only (cp.py), and the
velocities of padding are dropped before the loss. Text is held in full by every rank.
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

# What the dims of a float8 product's factors must be multiples of; in the backward pass one of them counts tokens.
FLOAT8_MULTIPLE = 16


@dataclass
class TokenLayout:
    """How tokens are split, and the true lengths of the sequences in the current forward pass.

    Lengths change from call to call; the hooks on the model set them, attention reads them.
    """

    cp: Axis
    tp: Axis
    multiple: int
    video: int = 0
    audio: int = 0

    def padded(self, length: int, cp: int) -> int:
        """`length` rounded up so that it splits evenly and each rank's matrix products have `multiple` rows."""
        unit = cp * lcm(self.tp.size, self.multiple)
        return -(-length // unit) * unit


def shard_tokens(model: LTXTransformer, mesh: Mesh, *, multiple: int = 1) -> TokenLayout:
    """Makes `model` split its tokens on the way in and join its velocities on the way out.

    Needed once, before tensor and context parallelism, which rely on it. Gradients of the loss are then to be summed
    over cp (FSDP2 does so, its axis contains cp) and tp (which `apply_tensor_parallel` arranges).

    Args:
        model: changed in place; its inputs and outputs stay what they were.
        mesh: the job's mesh.
        multiple: what the number of tokens in a matrix product must divide by.
    """
    layout = TokenLayout(Axis.of(mesh.data["cp"]), Axis.of(mesh.data["tp"]), multiple)
    parameters = signature(model.forward)

    def enter(_: LTXTransformer, args: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]]:
        given = parameters.bind(*args, **kwargs).arguments
        video, audio = given["video"], given["audio"]
        layout.video = 0 if video is None else video.latent.shape[1]
        layout.audio = 0 if audio is None else audio.latent.shape[1]
        given["video"] = None if video is None else _own_tokens(video, layout, layout.cp.size, layout.cp.rank)
        given["audio"] = None if audio is None else _own_tokens(audio, layout, 1, 0)
        return (), given

    def leave(
        _: LTXTransformer, args: tuple, velocities: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        video, audio = velocities
        if video is not None:
            video = gather_output(gather_output(video, 1, layout.tp), 1, layout.cp)[:, : layout.video]
        if audio is not None:
            audio = share_gradient(gather_output(audio, 1, layout.tp), layout.cp)[:, : layout.audio]
        return video, audio

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)
    return layout


def _own_tokens(whole: Modality, layout: TokenLayout, cp: int, cp_rank: int) -> Modality:
    """This rank's part of one stream.

    Coordinates stay those of the cp part: attention rotates queries and keys after tp has gathered their tokens.
    """
    values, index = whole.timestep_values, whole.timestep_index
    if values is None:
        # Found before the split: K must be the same on all ranks.
        values, index = distinct_timesteps(whole.timesteps)
    coordinate_values, coordinate_index = whole.coordinate_values, whole.coordinate_index
    if coordinate_values is None:
        coordinate_values, coordinate_index = distinct_coordinates(midpoints(whole.positions.float()))

    length = whole.latent.shape[1]
    padding = layout.padded(length, cp) - length
    per_cp = (length + padding) // cp
    per_tp = per_cp // layout.tp.size

    def part(x: Tensor, dim: int, start: int, count: int) -> Tensor:
        pads = [0, 0] * (x.ndim - 1 - dim) + [0, padding]
        return F.pad(x, pads).narrow(dim, start, count)

    def own(x: Tensor | None) -> Tensor | None:
        if x is None or x.shape[1] != length:
            return x
        return part(x, 1, cp_rank * per_cp + layout.tp.rank * per_tp, per_tp)

    return replace(
        whole,
        latent=own(whole.latent),
        timesteps=own(whole.timesteps),
        keyframes_mask=own(whole.keyframes_mask),
        timestep_values=values,
        timestep_index=own(index),
        coordinate_values=coordinate_values,
        coordinate_index=part(coordinate_index, 2, cp_rank * per_cp, per_cp),
    )
