"""Prepared datasets: files, the order of samples, and batches read ahead."""

from ltx_titan.data.dataset import (
    PrecomputedDataset,
    Sample,
    ShapeKey,
    TokenCounts,
    fingerprint_of,
    resolve_root,
    shape_key_of,
    stores_text_features,
    stream_tokens,
    token_counts,
)
from ltx_titan.data.layout import read_sample, read_shapes, write_sample
from ltx_titan.data.loader import Batch, MicroBatch, StepBatches, StepLoader, collate, map_tensors
from ltx_titan.data.mixed import MixedDataset, Source
from ltx_titan.data.plan import BatchPlan, DataPosition, Mixture, resume_step

__all__ = [
    "Batch",
    "BatchPlan",
    "DataPosition",
    "MicroBatch",
    "MixedDataset",
    "Mixture",
    "PrecomputedDataset",
    "Sample",
    "ShapeKey",
    "Source",
    "StepBatches",
    "StepLoader",
    "TokenCounts",
    "collate",
    "fingerprint_of",
    "map_tensors",
    "read_sample",
    "read_shapes",
    "resolve_root",
    "resume_step",
    "shape_key_of",
    "stores_text_features",
    "stream_tokens",
    "token_counts",
    "write_sample",
]
