"""Peak memory of a training step on the fullest GPU, from the sizes of what is alive at the two fullest moments.

    start of backward   everything saved by the forward pass is there, no gradients yet
    end of backward     all gradients are there, one block's activations are left

In between, blocks trade activations for gradients one by one, so the peak is at one of the ends; at both, the weights,
the optimizer's state, one block's working set and FSDP2's buffers are there too. Counted are bytes that tensors hold,
as `peak_mem_gib` in metrics.jsonl; what the allocator and the driver take on top is `RESERVE` and `SLACK`.

Activations are counted in units: one value of the compute dtype per token and column of the stream's residual.
"""

from dataclasses import dataclass

from ltx_titan.common.hardware import GIB
from ltx_titan.estimate.workload import Setup, Workload

RESERVE = 2.5 * GIB
"""CUDA context, NCCL's buffers, cuBLAS workspaces: assumed."""
SLACK = 1.04
"""Memory that the allocator reserves over memory that tensors hold, with expandable segments: assumed."""

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adamw4bit": 1.1, "muon": 4.0, "adafactor": 0.0}
"""Optimizer state per trained weight, see `OptimizerSection`."""


@dataclass(frozen=True)
class SavedUnits:
    """What autograd keeps of one block for its backward pass, in units per token.

    Attributes:
        own: a stream's self-attention, text attention and feed-forward.
        video_cross, audio_cross: its part in the attention between the streams.
        own_timestep, cross_timestep: more of both where tokens of a sample have two timesteps.
        text: a text attention's keys, values and modulated text, per text token.
    """

    own: float
    video_cross: float
    audio_cross: float
    own_timestep: float
    cross_timestep: float
    text: float


# Counted by saved-tensor hooks on blocks of these proportions (tests/estimate/test_estimate.py repeats it). Compiled:
# what the partitioner of AOTAutograd decides to keep. (is compiled, trained) -> units.
SAVED = {
    (False, "full"): SavedUnits(49.1, 18.6, 25.1, 12.0, 4.0, 9.0),
    (True, "full"): SavedUnits(18.1, 6.0, 8.2, 13.0, 5.0, 2.0),
    (False, "lora"): SavedUnits(26.3, 10.7, 15.4, 12.0, 4.0, 5.1),
    (True, "lora"): SavedUnits(20.7, 6.3, 10.2, 10.0, 4.0, 4.1),
}
KERNELS_TIMESTEP = 0.6
"""Kept for a second timestep with the fused kernels: a block grew by 1.16 instead of 1.14 GiB (bench block, H100)."""
SELECTIVE = {1: SavedUnits(4.0, 2.0, 1.0, 0.0, 0.0, 0.0), 2: SavedUnits(6.0, 1.5, 2.0, 0.0, 0.0, 0.0)}
"""Selective checkpointing, compiled: the block's input, results of attention, and without tensor parallelism (1,
counted) products that narrow, the feed-forward's and the cross-modal ones; with it (2, reckoned) what reduce-scatters
gave."""
TRANSIENT = {False: 20.0, True: 10.0}
"""Gradients and temporaries within a block's backward pass, most in the feed-forward: two of 4 x width, and its input
and result; in float32 where blocks are not compiled."""
OUTSIDE = 7.5
"""Kept outside the blocks, counted like `SAVED`: rotary tables in float32 (3 units), and the output head, whose norm is
in float32; 2 units less with one timestep."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, and what they are for.

    Attributes:
        parameters: shards.
        optimizer: its state, and a moving average where there is one.
        gradients: shards, once all are there.
        connectors: shards of resident text connectors.
        activations: kept by the forward pass at the start of the backward pass.
        working_set: one block's recomputed activations and temporaries.
        buffers: gathered weights and unsharded gradients.
        start_of_backward, end_of_backward: sums at these moments.
    """

    parameters: float
    optimizer: float
    gradients: float
    connectors: float
    activations: float
    working_set: float
    buffers: float
    start_of_backward: float
    end_of_backward: float

    @property
    def peak(self) -> float:
        """Most that tensors hold at once."""
        return max(self.start_of_backward, self.end_of_backward)

    @property
    def needed(self) -> float:
        """Memory a GPU must have."""
        return self.peak * SLACK + RESERVE


def estimate_memory(work: Workload, setup: Setup) -> Memory:
    """Peak memory of a step with the largest sample."""
    parts = _states(work, setup)
    kept, one_block = _activations(work, setup)
    temporary = _units_to_bytes(work, setup, TRANSIENT[setup.compile])
    outside = _units_to_bytes(work, setup, OUTSIDE)
    buffers = _buffers(work, setup)
    states = parts["parameters"] + parts["optimizer"] + parts["connectors"]
    shard = _gradient_shard(work, setup)  # of one block
    all_shards = parts["gradients"]
    if _micro_batches(work, setup) > 1:
        states, shard, all_shards = states + all_shards, 0.0, 0.0
    resident = states + buffers.outside + buffers.block + outside
    recomputed = 0.0 if setup.recompute == "none" else one_block

    # In a block's backward pass its activations are there, and the gradients of the block behind, which are being
    # reduced; at its end its own gradients, once in the compute dtype and once on their way.
    activations_peak = one_block + temporary + buffers.reducing
    gradients_peak = buffers.gradients + buffers.reducing
    block_peak = max(activations_peak, gradients_peak)
    last = kept + recomputed + temporary + buffers.travelling
    second_last = kept + (buffers.travelling if work.num_layers > 2 else 0.0) + shard
    if setup.recompute == "none":
        second_last += max(activations_peak - 2 * one_block, gradients_peak - 2 * one_block, 0.0)
    else:
        second_last += block_peak
    # The first block has no other to be gathered beside it.
    second = buffers.travelling + max(work.num_layers - 2, 0) * shard + block_peak
    first = (work.num_layers - 1) * shard + block_peak
    root = states + buffers.outside + all_shards + buffers.outside_gradients
    return Memory(
        **parts,
        activations=kept + outside,
        working_set=recomputed + temporary,
        buffers=buffers.outside + buffers.block + buffers.travelling + buffers.reducing,
        start_of_backward=resident + max(last, second_last),
        end_of_backward=max(resident + max(first, second), root),
    )


def saved_per_block(work: Workload, setup: Setup, *, keeps_everything: bool = False) -> float:
    """Bytes that one block keeps for its backward pass under the setup's checkpointing (every_k: of a kept block).

    Args:
        work: the workload.
        setup: the setup.
        keeps_everything: what the block would keep without checkpointing.
    """
    video, audio = _tokens(work, setup)
    both = work.video_tokens > 0 and work.audio_tokens > 0
    gathered = 0.0
    if setup.recompute == "full" and not keeps_everything:
        units = SavedUnits(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    elif setup.recompute == "selective" and not keeps_everything:
        units = SELECTIVE[min(setup.degrees.tp, 2)]
    else:
        units = SAVED[setup.compile, work.trained]
        if setup.degrees.tp > 1:
            # What the products of attention and feed-forward read: tokens of all tp ranks.
            gathered = (3 + 2 * both) * setup.degrees.tp
    per_video = units.own + gathered + both * units.video_cross
    per_audio = units.own + gathered + both * units.audio_cross
    timestep = units.own_timestep + both * units.cross_timestep
    if setup.kernels:
        timestep = min(timestep, KERNELS_TIMESTEP)
    per_video += (work.video_timesteps > 1) * timestep
    per_audio += (work.audio_timesteps > 1) * timestep
    columns = video * per_video * work.video_width + audio * per_audio * work.audio_width
    widths = (work.video_tokens > 0) * work.video_width + (work.audio_tokens > 0) * work.audio_width
    columns += setup.local_batch_size * work.text_tokens * units.text * widths / setup.degrees.tp
    return columns * work.itemsize


def _activations(work: Workload, setup: Setup) -> tuple[float, float]:
    """Bytes kept at the start of the backward pass, and of one block with everything."""
    everything = saved_per_block(work, setup, keeps_everything=True)
    if setup.recompute == "none":
        return work.num_layers * everything, everything
    video, audio = _tokens(work, setup)
    inputs = (video * work.video_width + audio * work.audio_width) * work.itemsize
    waiting = 0.0 if setup.offload_activations else 1.0
    if setup.recompute == "every_k":
        dropped = -(-work.num_layers // setup.k)
        return dropped * inputs * waiting + (work.num_layers - dropped) * everything, everything
    kept = saved_per_block(work, setup)
    # Two blocks' inputs are on the device: one in use, one on its way.
    return (work.num_layers * kept if waiting else 2 * inputs), everything


def _states(work: Workload, setup: Setup) -> dict[str, float]:
    elements, size = _sharded(work, setup, trained_only=False)
    trained, trained_size = _sharded(work, setup, trained_only=True)
    state = STATE_BYTES[work.optimizer]
    ema = 4.0 if work.ema else 0.0
    optimizer = trained * (state + ema)
    if work.offload_state:
        block = work.block.sharded(setup.degrees, trained_only=True)[0]
        optimizer = trained * ema + 2 * block * state
    on_device = 0.0 if setup.cpu_offload else 1.0
    return {
        "parameters": size * on_device,
        "optimizer": optimizer * on_device,
        # In the parameter's dtype; updated and dropped at once with in_backward.
        "gradients": 0.0 if work.in_backward else trained_size * on_device,
        "connectors": 2.0 * work.connectors / setup.fsdp,
    }


def _sharded(work: Workload, setup: Setup, *, trained_only: bool) -> tuple[int, int]:
    block = work.block.sharded(setup.degrees, trained_only=trained_only)
    outside = work.outside.sharded(setup.degrees, trained_only=trained_only)
    return tuple(work.num_layers * b + o for b, o in zip(block, outside, strict=True))


@dataclass(frozen=True)
class _Buffers:
    """FSDP2's, bytes.

    Attributes:
        outside: gathered weights outside the blocks, which stay.
        block, travelling: gathered weights of a block, and of the next one on its way.
        gradients: of a block, before their reduction.
        reducing: the same in float32, on their way; waited for only at the end of the next block's backward pass.
        outside_gradients: both, of what is outside the blocks.
    """

    outside: float
    block: float
    travelling: float
    gradients: float
    reducing: float
    outside_gradients: float


def _buffers(work: Workload, setup: Setup) -> _Buffers:
    tp, size = setup.degrees.tp, work.itemsize
    block, outside = (size * weights.gathered(tp) for weights in (work.block, work.outside))
    trained, trained_outside = (weights.gathered(tp, trained_only=True) for weights in (work.block, work.outside))
    travelling = block / size if setup.float8_all_gather else block
    return _Buffers(outside, block, travelling, size * trained, 4.0 * trained, (size + 4.0) * trained_outside)


def _gradient_shard(work: Workload, setup: Setup) -> float:
    if work.in_backward or setup.cpu_offload:
        return 0.0
    return work.block.sharded(setup.degrees, trained_only=True)[1]


def _tokens(work: Workload, setup: Setup) -> tuple[float, float]:
    """Video and audio tokens of the largest micro-batch on one rank; between the layers, tp splits both, cp video."""
    video, audio = work.largest
    degrees = setup.degrees
    return (
        setup.local_batch_size * video / (degrees.cp * degrees.tp),
        setup.local_batch_size * audio / degrees.tp,
    )


def _units_to_bytes(work: Workload, setup: Setup, units: float) -> float:
    video, audio = _tokens(work, setup)
    return (video * work.video_width + audio * work.audio_width) * units * work.itemsize


def _micro_batches(work: Workload, setup: Setup) -> int:
    return -(-work.global_batch_size // (setup.local_batch_size * setup.degrees.dp))
