"""The parallel plan, applied to a model on the meta device from outside, in one fixed order.

    float8 -> token split -> tensor parallel -> context parallel -> compile -> activation checkpointing -> FSDP2

Adapters (LoRA) are in place before. Each step is one call and one line in the log. After this the parameters are
sharded DTensors without storage: `to_empty`, then load.
"""

import logging

import torch

from ltx_titan.config import JobConfig
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from ltx_titan.parallel.compile import apply_compile
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.float8 import apply_float8
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.tokens import FLOAT8_MULTIPLE, shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel

logger = logging.getLogger(__name__)


def parallelize(model: LTXTransformer, job: JobConfig, mesh: Mesh) -> None:
    """Applies what `job` asks for to `model`, in place. Combinations that cannot work are refused by `plan_job`."""
    blocks, degrees = model.transformer_blocks, mesh.degrees
    recipe = job.float8.recipe
    if recipe != "none":
        # A CPU has no float8 products: it rounds as float8 does and multiplies in float32.
        emulate = mesh.parameters.device_type == "cpu"
        layers = apply_float8(model, recipe, emulate=emulate, tp=degrees.tp, fsdp_all_gather=job.float8.all_gather)
        logger.info("float8: %s on %d layers%s", recipe, len(layers), ", gathered as float8" * job.float8.all_gather)

    if degrees.tp * degrees.cp > 1 or recipe != "none":
        layout = shard_tokens(model, mesh, multiple=1 if recipe == "none" else FLOAT8_MULTIPLE)
        if degrees.tp > 1:
            apply_tensor_parallel(model, mesh, layout)
            logger.info("tensor parallel: heads, hidden units and, between them, tokens over %d ranks", degrees.tp)
        apply_context_parallel(model, layout)  # also cuts off what the tokens were padded with
        if degrees.cp > 1:
            logger.info("context parallel: video tokens over %d ranks", degrees.cp)

    if job.compile.enable:
        apply_compile(blocks)
        logger.info("compile: each of %d blocks, static shapes", len(blocks))

    recompute = job.activation_checkpoint
    apply_activation_checkpointing(blocks, recompute.mode, k=recompute.k or 1, offload=recompute.offload, tp=degrees.tp)
    if recompute.mode != "none":
        every = f", every {recompute.k}th block" if recompute.mode == "every_k" else ""
        where = ", inputs in host memory" * recompute.offload
        logger.info("activation checkpointing: %s%s%s", recompute.mode, every, where)

    dtype = compute_dtype(job)
    apply_fsdp(model, blocks, mesh.fsdp, dtype, cpu_offload=job.parallelism.cpu_offload)
    logger.info("FSDP2: %s, parameters gathered as %s", mesh.fsdp, dtype)


def compute_dtype(job: JobConfig) -> torch.dtype:
    """The dtype of matrix products."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[job.training.dtype]
