"""Trains a job:  torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]

Everything that can be wrong with a job is found on the host first: its text, its checkpoint's header, its data. Only
then are process groups made and memory taken. `Trainer.__init__` builds (meta device), shards, loads, resumes;
`Trainer.train` loops; each step is data -> contexts -> inputs -> forward -> loss -> backward -> optimizer.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_titan.checkpoint import (
    CONNECTORS,
    ModelSource,
    TrainingState,
    check_fits,
    export_transformer,
    latest_complete,
    load_parameters,
    load_state,
    read_source,
    read_trainer_state,
    save_state,
    scale_factors,
    unused_by,
)
from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.conditioning.text import to_contexts
from ltx_titan.config import ConfigError, JobConfig, changed_settings, check_world, dump_job, load_job
from ltx_titan.data import BatchPlan, MicroBatch, StepLoader, open_dataset, resume_step
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws, UniformSigma, draw_step
from ltx_titan.metrics import MetricsLogger, StepMetrics, peak_memory_gib, plot_loss, profile_steps, training_flops
from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.optim import build_optimizer, lr_factor
from ltx_titan.parallel import Mesh, build_mesh, clip_grad_norm_, compute_dtype, init_distributed, parallelize
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.titan import GarbageCollection

logger = logging.getLogger(__name__)
