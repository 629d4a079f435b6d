"""Official safetensors files: metadata, names, reading, writing, quantized weights, LoRA files."""

from ltx_titan.weights.connectors import load_text_connectors
from ltx_titan.weights.export import ExportTensor, export_safetensors, export_transformer
from ltx_titan.weights.load import check_fits, load_parameters
from ltx_titan.weights.metadata import CheckpointMetadata, read_metadata, scale_factors
from ltx_titan.weights.names import CONNECTORS, TEXT_PROJECTION, TRANSFORMER, Component, stream_of, unused_by
from ltx_titan.weights.shapes import released_config
from ltx_titan.weights.stored import StoredWeight, quantized_forms, refuse_quantized, stored_weights
from ltx_titan.weights.tensors import module_tensors, official_name, plain_tensor

__all__ = [
    "CONNECTORS",
    "TEXT_PROJECTION",
    "TRANSFORMER",
    "CheckpointMetadata",
    "Component",
    "ExportTensor",
    "StoredWeight",
    "check_fits",
    "export_safetensors",
    "export_transformer",
    "load_parameters",
    "load_text_connectors",
    "module_tensors",
    "official_name",
    "plain_tensor",
    "quantized_forms",
    "read_metadata",
    "refuse_quantized",
    "released_config",
    "scale_factors",
    "stored_weights",
    "stream_of",
    "unused_by",
]
