"""The kernels at the shapes of a block, each with its reference, its inputs and the fewest bytes it must move.

Bytes count one read of each [S, D] tensor that goes in and one write of each that comes out; rows, tables and partial
sums are what a better kernel might avoid, so they are not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.ops import Row
from ltx_titan.model.rope import PackedRotation, Rotation, distinct_coordinates, rotary_tables
from ltx_titan_kernels import gated_residual_norm, qk_norm_rope, rms_norm_modulate
from ltx_titan_kernels.launches import Launch
from ltx_titan_kernels.qk_norm_rope_backward import backward_launch, launch_backward
from ltx_titan_kernels.qk_norm_rope_forward import forward_launch, launch_forward

HEADS = 32
EPS = 1e-6
TEXT_TOKENS = 1024
AUDIO_TOKENS = 126


@dataclass(frozen=True)
class KernelCase:
    """One operation on one set of inputs.

    Attributes:
        kernel, reference: from the leaves to the outputs.
        leaves: everything that has a gradient.
        launch_forward, launch_backward: the kernels alone, by launch.
        default_forward, default_backward: the launches that the operation itself takes.
        forward_bytes, backward_bytes: see above.
    """

    kernel: Callable[..., Sequence[Tensor]]
    reference: Callable[..., Sequence[Tensor]]
    leaves: dict[str, Tensor]
    launch_forward: Callable[[Launch], object]
    launch_backward: Callable[[Launch], object]
    default_forward: Launch
    default_backward: Launch
    forward_bytes: int
    backward_bytes: int


def make_case(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> KernelCase:
    """Builds the case `name` (see `CASES`) for one sample of `tokens` tokens."""
    return CASES[name](_Inputs(tokens, width, dtype, device, seed))


@dataclass
class _Inputs:
    """Draws what cases need, from one seed."""

    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def leaf(self, *shape: int) -> Tensor:
        """Normal numbers that want a gradient."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype).requires_grad_()

    def like(self, x: Tensor) -> Tensor:
        """Normal numbers of the same shape, as a gradient that comes in."""
        return torch.randn(x.shape, generator=self.generator, device=self.device).to(x.dtype)

    def index(self, rows: int) -> Tensor | None:
        """The first frame (a twelfth of the tokens) has row 0, the rest row 1."""
        if rows == 1:
            return None
        return (torch.arange(self.tokens, device=self.device) >= self.tokens // 12).long()[None]

    def bytes(self, tensors: int) -> int:
        """Size of that many [S, D] tensors."""
        return tensors * self.tokens * self.width * self.dtype.itemsize


def _norm_modulate(inputs: _Inputs, rows: int) -> KernelCase:
    leaves = {
        "x": inputs.leaf(1, inputs.tokens, inputs.width),
        "embedding": inputs.leaf(1, rows, 2, inputs.width),
        "table": inputs.leaf(2, inputs.width),
    }
    index = inputs.index(rows)

    def of(operation: Callable) -> Callable[..., Sequence[Tensor]]:
        return lambda x, embedding, table: [operation(x, *ops.rows_of(table, embedding), index, EPS)]

    x, embedding, table = (leaf.detach() for leaf in leaves.values())
    (scale, shift), (scale_table, shift_table) = embedding.unbind(2), table.unbind(0)
    grad = inputs.like(x)
    _, rstd = rms_norm_modulate.launch_forward(x, scale, shift, scale_table, shift_table, index, EPS)
    return KernelCase(
        kernel=of(rms_norm_modulate.rms_norm_modulate),
        reference=of(rms_norm_modulate.reference),
        leaves=leaves,
        launch_forward=partial(rms_norm_modulate.launch_forward, x, scale, shift, scale_table, shift_table, index, EPS),
        launch_backward=partial(rms_norm_modulate.launch_backward, grad, x, rstd, scale, scale_table, index),
        default_forward=rms_norm_modulate.FORWARD.at(inputs.width),
        default_backward=rms_norm_modulate.BACKWARD.at(inputs.width),
        forward_bytes=inputs.bytes(2),
        backward_bytes=inputs.bytes(3),
    )


def _residual_norm(inputs: _Inputs, norms: int, rows: int) -> KernelCase:
    count = 1 + 2 * norms
    leaves = {
        "x": inputs.leaf(1, inputs.tokens, inputs.width),
        "y": inputs.leaf(1, inputs.tokens, inputs.width),
        "embedding": inputs.leaf(1, rows, count, inputs.width),
        "table": inputs.leaf(count, inputs.width),
    }
    index = inputs.index(rows)

    def of(operation: Callable) -> Callable[..., Sequence[Tensor]]:
        def run(x: Tensor, y: Tensor, embedding: Tensor, table: Tensor) -> Sequence[Tensor]:
            gate, *pairs = ops.rows_of(table, embedding)
            modulations: list[tuple[Row, Row]] = [tuple(pairs[i : i + 2]) for i in range(0, 2 * norms, 2)]
            return operation(x, y, gate, modulations, index, EPS)

        return run

    x, y, embedding, table = (leaf.detach() for leaf in leaves.values())
    row_list, tables = list(embedding.unbind(2)), list(table.unbind(0))
    outputs = gated_residual_norm.launch_forward(x, y, row_list, tables, index, EPS)
    grads = [inputs.like(x) for _ in range(1 + norms)]
    saved = [outputs[0], outputs[-1]] if norms else []
    scales, scale_tables = [row_list[0], *row_list[1::2]], [tables[0], *tables[1::2]]
    return KernelCase(
        kernel=of(gated_residual_norm.gated_residual_norm),
        reference=of(gated_residual_norm.reference),
        leaves=leaves,
        launch_forward=partial(gated_residual_norm.launch_forward, x, y, row_list, tables, index, EPS),
        launch_backward=partial(gated_residual_norm.launch_backward, grads, saved, y, scales, scale_tables, index),
        default_forward=gated_residual_norm.FORWARD[norms].at(inputs.width),
        default_backward=gated_residual_norm.BACKWARD[norms].at(inputs.width),
        forward_bytes=inputs.bytes(3 + norms),
        # dr, dh, r, y in; dx, dy out. Without a norm dx is dr and r is not read.
        backward_bytes=inputs.bytes(5 + norms if norms else 3),
    )


def _qk(inputs: _Inputs, axes: int, k_tokens: int | None) -> KernelCase:
    """Queries and keys that share their angles; with `k_tokens`, keys of another stream, rotated if there are axes."""
    head_dim = inputs.width // HEADS
    leaves = {
        "q": inputs.leaf(1, inputs.tokens, inputs.width),
        "k": inputs.leaf(1, k_tokens or inputs.tokens, inputs.width),
        "q_weight": inputs.leaf(inputs.width),
        "k_weight": inputs.leaf(inputs.width),
    }
    packed: list[PackedRotation] = []
    expanded: list[Rotation | None] = [None, None]
    if axes:
        # Latent frames of 14 x 24, as in 89 frames of 768 x 448; the keys of another stream have times of their own.
        token = torch.arange(inputs.tokens, device=inputs.device)
        coordinates = [torch.stack([token // 336 / 24, token // 24 % 14 * 32, token % 24 * 32])[None, :axes].float()]
        if k_tokens is not None:
            coordinates.append(torch.arange(k_tokens, device=inputs.device)[None, None] / 25)
        tables = [
            rotary_tables(
                *distinct_coordinates(of_tokens),
                width=inputs.width,
                heads=HEADS,
                max_positions=(20, 2048, 2048)[:axes],
                theta=1e4,
                double_precision=True,
            )
            for of_tokens in coordinates
        ]
        packed = [table.pack() for table in tables]
        expanded = [tables[0].expand(), tables[-1].expand()]

    def of(operation: Callable, rotations: Sequence) -> Callable[..., Sequence[Tensor]]:
        def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Sequence[Tensor]:
            return operation(q, k, q_weight, k_weight, *rotations, head_dim=head_dim, eps=EPS)

        return run

    q, k, *weights = (leaf.detach() for leaf in leaves.values())
    grads = [inputs.like(q), inputs.like(k)]
    rotation = ([p.table for p in packed], [p.rows for p in packed])
    sizes = (head_dim, inputs.width, 0)
    *_, q_rstd, k_rstd = launch_forward(q, k, weights, *rotation, [], *sizes, EPS)
    moved = inputs.bytes(1) + k.numel() * k.itemsize
    return KernelCase(
        kernel=of(qk_norm_rope.qk_norm_rope, (packed[0], packed[-1]) if packed else (None, None)),
        reference=of(qk_norm_rope.reference, expanded),
        leaves=leaves,
        launch_forward=partial(launch_forward, q, k, weights, *rotation, [], *sizes, EPS),
        launch_backward=partial(launch_backward, grads, q, k, [q_rstd, k_rstd], weights, *rotation, False, *sizes),
        default_forward=forward_launch(inputs.width, len(packed)),
        default_backward=backward_launch(inputs.width, len(packed)),
        forward_bytes=2 * moved,
        backward_bytes=3 * moved,
    )


CASES: dict[str, Callable[[_Inputs], KernelCase]] = {
    "norm_modulate": partial(_norm_modulate, rows=1),
    "norm_modulate, 2 timesteps": partial(_norm_modulate, rows=2),
    "residual_norm": partial(_residual_norm, norms=1, rows=1),
    "residual_norm, 2 timesteps": partial(_residual_norm, norms=1, rows=2),
    "residual_norm, 2 norms": partial(_residual_norm, norms=2, rows=1),
    "residual": partial(_residual_norm, norms=0, rows=1),
    "qk_norm_rope": partial(_qk, axes=3, k_tokens=None),
    "qk_norm_rope, audio keys": partial(_qk, axes=1, k_tokens=AUDIO_TOKENS),
    "qk_norm, text": partial(_qk, axes=0, k_tokens=TEXT_TOKENS),
}

WIDTHS = {**dict.fromkeys(CASES, 4096), "qk_norm_rope, audio keys": 2048}
"""Of each operation where it is as long as the video: attention between the streams is as wide as the sound."""
