"""The parallel plan, applied to a model on the meta device from outside, in one fixed order.

    float8 -> token split -> tensor parallel -> context parallel -> selective checkpointing -> compile
           -> full checkpointing -> FSDP2

LoRA adapters are added before. Each step is one call and one line in the log. Afterwards the parameters are sharded
DTensors without storage: `to_empty`, then load.
"""

import logging

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from ltx_titan.config import ActivationCheckpointSection, Float8Section
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.activation_checkpoint import apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.float8 import apply_float8
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.tokens import FLOAT8_MULTIPLE, shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel

logger = logging.getLogger(__name__)

# Dynamo's limit per block: one entry per combination of token counts, streams and masks. The default of 8 is too few.
_RECOMPILE_LIMIT = 64


def parallelize(
    model: LTXTransformer,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    float8: Float8Section,
    checkpointing: ActivationCheckpointSection,
    compile_blocks: bool,
    cpu_offload: bool,
) -> None:
    """Applies the parallel plan in place. Combinations that cannot work are refused earlier, by `plan_job`.

    Args:
        model: a plain transformer on the meta device, with its adapters.
        mesh: the job's mesh.
        dtype: dtype in which parameters are gathered, hence of matmuls.
        float8: the job's `[float8]`.
        checkpointing: the job's `[activation_checkpoint]`.
        compile_blocks: compile every block.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    """
    blocks, degrees = model.transformer_blocks, mesh.degrees
    # First, because it replaces modules: every later step addresses them by name or wraps them.
    if float8.recipe != "none":
        # A CPU has no float8 matmuls: it rounds as float8 does and multiplies in float32.
        emulate = mesh.parameters.device_type == "cpu"
        layers = apply_float8(model, float8.recipe, emulate=emulate, tp=degrees.tp, fsdp_all_gather=float8.all_gather)
        gathered = ", gathered as float8" if float8.all_gather else ""
        logger.info("float8: %s on %d layers%s", float8.recipe, len(layers), gathered)

    if degrees.tp * degrees.cp > 1 or float8.recipe != "none":
        layout = shard_tokens(model, mesh, multiple=1 if float8.recipe == "none" else FLOAT8_MULTIPLE)
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

    if compile_blocks:
        apply_compile(blocks)
        logger.info("compile: each of %d blocks, static shapes", len(blocks))

    # After compilation: inside the compiled region it fails with tensor parallelism on torch 2.13.
    if checkpointing.mode in ("full", "every_k"):
        every = 1
        if checkpointing.mode == "every_k" and checkpointing.k is not None:
            every = checkpointing.k
        apply_full_checkpointing(blocks, every=every, offload=checkpointing.offload)
        offloaded = ", inputs in host memory" if checkpointing.offload else ""
        logger.info("activation checkpointing: one block in %d is recomputed%s", every, offloaded)

    # Last: FSDP2 records each unit's parameters, so their modules, dtypes and tp placements must be final.
    apply_fsdp(model, blocks, mesh.fsdp, dtype, cpu_offload=cpu_offload)
    logger.info("FSDP2: %s, parameters gathered as %s", mesh.fsdp, dtype)


def apply_compile(blocks: nn.ModuleList) -> None:
    """Compiles every block in place, on its first call and for each new set of shapes; names in the state dict stay.

    All layers share one small graph. Static shapes run faster than dynamic ones.

    Args:
        blocks: the model's repeated blocks; they share the compiled code.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    # From rows >= 2 x width on (8,192 tokens), torch 2.11 fuses sums over rows into other reductions, and can then give
    # the gradient of a [1, 1, D] input the shape [D], which autograd refuses.
    torch._inductor.config.triton.mix_order_reduction = False
    # Allow the partitioner to recompute tensors that backward has to materialize as matmul inputs: GELU's output and
    # gated attention, a sixth of a block's saved activations, for one more write in kernels that read the rest anyway.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
