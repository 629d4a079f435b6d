"""Benchmark cases: each kernel at the shapes of a block, with its reference, inputs and minimal memory traffic.

Bytes count one read of each input [S, D] and one write of each output [S, D]. Modulation, tables and partials are not
counted: a better kernel might avoid them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.rope import PackedRotation, Rotation, distinct_coordinates, rotary_tables
from ltx_titan_kernels import gated_residual_norm, qk_norm_rope, rms_norm_modulate
from ltx_titan_kernels.launches import Launch

HEADS = 32
EPS = 1e-6
TEXT_TOKENS = 1024
AUDIO_TOKENS = 126


@dataclass(frozen=True)
class KernelCase:
    """One operation on one set of inputs.

    Attributes:
        kernel, reference: functions of the leaves that return the outputs.
        leaves: all inputs with a gradient.
        launch_forward, launch_backward: run one kernel with a given launch.
        default_forward, default_backward: launches of the operation itself.
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
    """Random inputs of a case, from one seed."""

    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def leaf(self, *shape: int) -> Tensor:
        """Normal numbers that require a gradient."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype).requires_grad_()

    def like(self, x: Tensor) -> Tensor:
        """Normal numbers of the same shape, as an incoming gradient."""
        return torch.randn(x.shape, generator=self.generator, device=self.device).to(x.dtype)

    def index(self, timesteps: int) -> Tensor | None:
        """Timestep 0 for the first frame (a twelfth of the tokens), 1 for the rest; None for a single timestep."""
        if timesteps == 1:
            return None
        return (torch.arange(self.tokens, device=self.device) >= self.tokens // 12).long()[None]

    def bytes(self, tensors: int) -> int:
        """Size of that many [S, D] tensors."""
        return tensors * self.tokens * self.width * self.dtype.itemsize


def _norm_modulate(inputs: _Inputs, timesteps: int) -> KernelCase:
    leaves = {
        "x": inputs.leaf(1, inputs.tokens, inputs.width),
        "embedding": inputs.leaf(1, timesteps, 2, inputs.width),
        "table": inputs.leaf(2, inputs.width),
    }
    index = inputs.index(timesteps)

    def of(operation: Callable) -> Callable[..., Sequence[Tensor]]:
        return lambda x, embedding, table: [operation(x, *ops.rows_of(table, embedding), index, EPS)]

    x, embedding, table = (leaf.detach() for leaf in leaves.values())
    (scale, shift), (scale_table, shift_table) = embedding.unbind(2), table.unbind(0)
    grad = inputs.like(x)
    # What backward reads of forward, computed once, so that each direction is timed alone.
    _, rstd = rms_norm_modulate.launch_forward(x, scale, shift, scale_table, shift_table, index, EPS)
    return KernelCase(
        kernel=of(rms_norm_modulate.rms_norm_modulate),
        reference=of(rms_norm_modulate.reference),
        leaves=leaves,
        launch_forward=partial(rms_norm_modulate.launch_forward, x, scale, shift, scale_table, shift_table, index, EPS),
        launch_backward=partial(rms_norm_modulate.launch_backward, grad, x, rstd, scale, scale_table, index),
        default_forward=rms_norm_modulate.FORWARD.scaled_to(inputs.width),
        default_backward=rms_norm_modulate.BACKWARD.scaled_to(inputs.width),
        forward_bytes=inputs.bytes(2),
        backward_bytes=inputs.bytes(3),
    )


def _residual_norm(inputs: _Inputs, norms: int, timesteps: int) -> KernelCase:
    count = 1 + 2 * norms
    leaves = {
        "x": inputs.leaf(1, inputs.tokens, inputs.width),
        "y": inputs.leaf(1, inputs.tokens, inputs.width),
        "embedding": inputs.leaf(1, timesteps, count, inputs.width),
        "table": inputs.leaf(count, inputs.width),
    }
    index = inputs.index(timesteps)

    def of(operation: Callable) -> Callable[..., Sequence[Tensor]]:
        def run(x: Tensor, y: Tensor, embedding: Tensor, table: Tensor) -> Sequence[Tensor]:
            gate, *pairs = ops.rows_of(table, embedding)
            modulations = [(pairs[i], pairs[i + 1]) for i in range(0, 2 * norms, 2)]
            return operation(x, y, gate, modulations, index, EPS)

        return run

    x, y, embedding, table = (leaf.detach() for leaf in leaves.values())
    embeddings, tables = list(embedding.unbind(2)), list(table.unbind(0))
    outputs = gated_residual_norm.launch_forward(x, y, embeddings, tables, index, EPS)
    grads = [inputs.like(x) for _ in range(1 + norms)]
    saved = [outputs[0], outputs[-1]] if norms else []
    scales, scale_tables = [embeddings[0], *embeddings[1::2]], [tables[0], *tables[1::2]]
    return KernelCase(
        kernel=of(gated_residual_norm.gated_residual_norm),
        reference=of(gated_residual_norm.reference),
        leaves=leaves,
        launch_forward=partial(gated_residual_norm.launch_forward, x, y, embeddings, tables, index, EPS),
        launch_backward=partial(gated_residual_norm.launch_backward, grads, saved, y, scales, scale_tables, index),
        default_forward=gated_residual_norm.FORWARD[norms].scaled_to(inputs.width),
        default_backward=gated_residual_norm.BACKWARD[norms].scaled_to(inputs.width),
        forward_bytes=inputs.bytes(3 + norms),
        # Reads dr, dh, r, y; writes dx, dy. Without a norm dx is dr, and r is not read.
        backward_bytes=inputs.bytes(5 + norms if norms else 3),
    )


def _qk(inputs: _Inputs, axes: int, k_tokens: int | None) -> KernelCase:
    """Queries and keys with the same cosines and sines; with `k_tokens`, keys of another stream."""
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
        # Latent frames of 14 x 24, as in 89 frames of 768 x 448; the keys of another stream have other times.
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
    *_, q_rstd, k_rstd = qk_norm_rope.launch_forward(q, k, weights, *rotation, [], *sizes, EPS)
    moved = inputs.bytes(1) + k.numel() * k.itemsize
    return KernelCase(
        kernel=of(qk_norm_rope.qk_norm_rope, (packed[0], packed[-1]) if packed else (None, None)),
        reference=of(qk_norm_rope.reference, expanded),
        leaves=leaves,
        launch_forward=partial(qk_norm_rope.launch_forward, q, k, weights, *rotation, [], *sizes, EPS),
        launch_backward=partial(
            qk_norm_rope.launch_backward, grads, q, k, [q_rstd, k_rstd], weights, *rotation, False, *sizes
        ),
        default_forward=qk_norm_rope.forward_launch(inputs.width, len(packed)),
        default_backward=qk_norm_rope.backward_launch(inputs.width, len(packed)),
        forward_bytes=2 * moved,
        backward_bytes=3 * moved,
    )


CASES: dict[str, Callable[[_Inputs], KernelCase]] = {
    "norm_modulate": partial(_norm_modulate, timesteps=1),
    "norm_modulate, 2 timesteps": partial(_norm_modulate, timesteps=2),
    "residual_norm": partial(_residual_norm, norms=1, timesteps=1),
    "residual_norm, 2 timesteps": partial(_residual_norm, norms=1, timesteps=2),
    "residual_norm, 2 norms": partial(_residual_norm, norms=2, timesteps=1),
    "residual": partial(_residual_norm, norms=0, timesteps=1),
    "qk_norm_rope": partial(_qk, axes=3, k_tokens=None),
    "qk_norm_rope, audio keys": partial(_qk, axes=1, k_tokens=AUDIO_TOKENS),
    "qk_norm, text": partial(_qk, axes=0, k_tokens=TEXT_TOKENS),
}

WIDTHS = {**dict.fromkeys(CASES, 4096), "qk_norm_rope, audio keys": 2048}
"""Width of each operation on video tokens: cross-modal attention has the width of the audio stream."""
