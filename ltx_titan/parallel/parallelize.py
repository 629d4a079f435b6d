"""The parallel plan, applied to a model on the meta device from outside, in one fixed order.

    float8 -> token split -> tensor parallel -> context parallel -> selective checkpointing -> compile
           -> full checkpointing -> weight streaming -> FSDP2 -> static slots

LoRA adapters are added before. Each step is one call and one line in the log. Afterwards the parameters are sharded
DTensors without storage: `to_empty`, then load.
"""

import logging
import signal
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

from ltx_titan.config import ActivationCheckpointSection, Float8Section, ParallelismSection
from ltx_titan.model import LTXTransformer
from ltx_titan.model.float8_linear import matmul_refusal
from ltx_titan.parallel.activation_checkpoint import Level, apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.float8 import apply_float8, token_multiple
from ltx_titan.parallel.fsdp import apply_fsdp, use_static_slots
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.stop import STOP_SIGNALS
from ltx_titan.parallel.stream import WeightStream
from ltx_titan.parallel.tokens import shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel

logger = logging.getLogger(__name__)

# Of NVIDIA's GPUs: the first with float8 tensor cores.
_FLOAT8_CAPABILITY = (8, 9)
# Graphs beyond those of a job's own batches: sampling for validation, with its guidance.
_OTHER_GRAPHS = 64


def parallelize(
    model: LTXTransformer,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    float8: Float8Section,
    checkpointing: ActivationCheckpointSection,
    compiled_shapes: int | None,
    parallelism: ParallelismSection,
    levels: Sequence[Level] = (),
    stream_blocks: int = 0,
) -> None:
    """Applies the parallel plan in place. Combinations that cannot work are refused earlier, by `plan_job`.

    Args:
        model: a plain transformer on the meta device, with its adapters.
        mesh: the job's mesh.
        dtype: dtype in which parameters are gathered, hence of matmuls.
        float8: the job's `[float8]`.
        checkpointing: the job's `[activation_checkpoint]`.
        compiled_shapes: compile every block, for this many combinations of shapes; None does not compile.
        parallelism: the job's `[parallelism]`.
        levels: of each block, with `activation_checkpoint.mode = "budget"`.
        stream_blocks: blocks whose frozen weights are on the device at a time; 0 keeps all of them there.

    Raises:
        ValueError: the device or the weights do not support what the job asks for.
    """
    blocks, degrees = model.transformer_blocks, mesh.degrees
    # First, because it replaces modules: every later step addresses them by name or wraps them.
    if float8.recipe != "none":
        # A CPU has no float8 matmuls: it rounds as float8 does and multiplies in float32.
        emulate = mesh.parameters.device_type == "cpu"
        if mesh.parameters.device_type == "cuda" and torch.cuda.get_device_capability() < _FLOAT8_CAPABILITY:
            raise ValueError(
                f"float8.recipe = {float8.recipe!r}: float8 matmuls need compute capability "
                f"{'.'.join(map(str, _FLOAT8_CAPABILITY))} (Ada, Hopper, Blackwell), found "
                f"{torch.cuda.get_device_name()}; set float8.recipe to 'none'."
            )
        if float8.recipe == "native" and not emulate and (reason := _native_refusal()) is not None:
            raise ValueError(f"float8.recipe = 'native': {reason}; set float8.recipe to 'tensorwise' or 'none'.")
        layers = apply_float8(
            model,
            float8.recipe,
            emulate=emulate,
            tp=degrees.tp,
            fsdp_all_gather=float8.all_gather,
            skip_blocks=float8.skip_blocks,
        )
        gathered = ", gathered as float8" if float8.all_gather else ""
        logger.info("float8: %s on %d layers%s", float8.recipe, len(layers), gathered)

    multiple = token_multiple(float8.recipe)
    if degrees.tp * degrees.cp * multiple > 1:
        layout = shard_tokens(model, mesh, multiple=multiple)
        if degrees.tp > 1:
            apply_tensor_parallel(model, mesh, layout)
            logger.info("tensor parallel: heads, hidden units and, between them, tokens over %d ranks", degrees.tp)
        apply_context_parallel(model, layout)  # with cp = 1 it only removes the padding of float8 and tp
        if degrees.cp > 1:
            logger.info("context parallel: video tokens over %d ranks", degrees.cp)

    # Before compilation: its policy selects operations, and a compiled block is a single one.
    if checkpointing.mode == "selective":
        apply_selective_checkpointing(blocks, tp=degrees.tp)
        logger.info("activation checkpointing: selective")
    elif checkpointing.mode == "budget":
        assert len(levels) == len(blocks), (len(levels), len(blocks))
        apply_selective_checkpointing(blocks, levels, tp=degrees.tp)

    if compiled_shapes is not None:
        apply_compile(blocks)
        allow_graphs(compiled_shapes)
        give_gradient_to_block_inputs(model)
        logger.info("compile: each of %d blocks, %d shapes of batches", len(blocks), compiled_shapes)

    # After compilation: inside the compiled region it fails with tensor parallelism on torch 2.13.
    if checkpointing.mode in ("full", "every_k"):
        every = 1
        if checkpointing.mode == "every_k" and checkpointing.k is not None:
            every = checkpointing.k
        apply_full_checkpointing(blocks, range(0, len(blocks), every), offload=checkpointing.offload)
        offloaded = ", inputs in host memory" if checkpointing.offload else ""
        logger.info("activation checkpointing: one block in %d is recomputed%s", every, offloaded)
    elif checkpointing.mode == "budget":
        apply_full_checkpointing(blocks, [number for number, level in enumerate(levels) if level == "full"])

    # Around everything that runs a block again or as one operation.
    streamed = WeightStream(blocks, stream_blocks).parameters() if stream_blocks else frozenset()
    if stream_blocks:
        logger.info("weight streaming: %d of %d blocks on the device at a time", stream_blocks, len(blocks))

    # Last: FSDP2 records each unit's parameters, so their modules, dtypes and tp placements must be final.
    apply_fsdp(model, blocks, mesh.fsdp, dtype, cpu_offload=parallelism.cpu_offload, streamed=streamed)
    logger.info("FSDP2: %s, parameters gathered as %s", mesh.fsdp, dtype)
    use_static_slots(
        model,
        blocks,
        parallelism.fsdp_static_slots,
        copy_engines=parallelism.fsdp_copy_engines,
        exchange_gradients=parallelism.fsdp_exchange_gradients,
    )


def apply_compile(blocks: nn.ModuleList) -> None:
    """Compiles every block in place, on its first call and for each new set of shapes; names in the state dict stay.

    All layers share one small graph. Static shapes run faster than dynamic ones.

    Args:
        blocks: the model's repeated blocks; they share the compiled code.
    """
    allow_graphs(0)
    start_compile_workers()
    # From rows >= 2 x width on (8,192 tokens), torch 2.11 fuses sums over rows into other reductions, and can then give
    # the gradient of a [1, 1, D] input the shape [D], which autograd refuses.
    torch._inductor.config.triton.mix_order_reduction = False
    # Allow the partitioner to recompute tensors that backward has to materialize as matmul inputs: GELU's output and
    # gated attention, a sixth of a block's saved activations, for one more write in kernels that read the rest anyway.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def start_compile_workers() -> None:
    """Starts the processes in which Inductor compiles kernels so that they ignore `STOP_SIGNALS`.

    Schedulers send those signals to every process of a job. Inductor does not notice that its workers have ended: a
    rank that is stopped while it compiles would wait for them forever, instead of saving after the step.
    """
    # Only the main thread may change what signals do. The workers compile Triton's kernels only.
    if threading.current_thread() is not threading.main_thread() or not torch.cuda.is_available():
        return
    # Not at the top: the import takes a second, which jobs that do not compile need not wait.
    from torch._inductor.async_compile import AsyncCompile

    # New processes inherit ignored signals, but no handlers.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        AsyncCompile.warm_pool()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _native_refusal() -> str | None:
    """The reason why this GPU cannot run `float8.recipe = "native"`, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    return matmul_refusal(torch.device("cuda", torch.cuda.current_device()))


def allow_graphs(count: int) -> None:
    """Raises dynamo's limits by `count` graphs; a block that reaches one aborts the run, because no graph may break.

    The defaults, 8 graphs of a function and 256 in all its variants, are for code whose shapes are unknown. Ours are
    counted before training.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _OTHER_GRAPHS) + count
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit) + count


class _WithGradient(torch.autograd.Function):
    """Identity whose output requires a gradient, which ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def give_gradient_to_block_inputs(model: LTXTransformer) -> None:
    """Makes the first block's input require a gradient like that of the others, also if the embedding is frozen.

    Compiled code is specialized on it: with LoRA every shape would be compiled twice, once for the first block alone.
    It adds the input gradient of one block to the FLOPs of a step.
    """

    def require(_: nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or embedded.requires_grad:
            return embedded
        return _WithGradient.apply(embedded, torch.empty(0, requires_grad=True))

    for name in ("patchify_proj", "audio_patchify_proj"):
        if (embedding := getattr(model, name, None)) is not None:
            embedding.register_forward_hook(require)
