"""The parallel plan, applied to a model on the meta device from outside, in one fixed order.

Each step is one call. After this the parameters are sharded DTensors without storage: `to_empty`, then load.
"""

import logging

import torch

from ltx_titan.config import JobConfig
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from ltx_titan.parallel.compile import apply_compile
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def parallelize(model: LTXTransformer, job: JobConfig, mesh: Mesh) -> None:
    """Applies compilation, activation checkpointing and sharding to `model`, in place."""
    blocks = model.transformer_blocks
    if job.compile.enable:
        apply_compile(blocks)
        logger.info("compile: each of %d blocks, static shapes", len(blocks))
    if job.activation_checkpoint.mode == "full":
        apply_activation_checkpointing(blocks)
        logger.info("activation checkpointing: full, each block recomputed in the backward pass")
    dtype = compute_dtype(job)
    apply_fsdp(model, blocks, mesh.fsdp, dtype)
    logger.info("FSDP2: %s, parameters gathered as %s", mesh.fsdp, dtype)


def compute_dtype(job: JobConfig) -> torch.dtype:
    """The dtype of matrix products."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[job.training.dtype]
