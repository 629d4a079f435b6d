"""Official safetensors files: metadata, names, reading, writing, quantized weights, LoRA files."""

from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.export import ExportTensor, export_safetensors, save_safetensors, transformer_tensors
from ltx_titan.weights.layout import complete_export
from ltx_titan.weights.load import (
    build_connectors,
    check_fits,
    find_connectors,
    load_module,
    load_parameters,
    load_text_connectors,
    match_weights,
    read_tensors,
    refuse_not_finite,
)
from ltx_titan.weights.lora_dialects import Dialect, dialect_of, read_lora, write_lora
from ltx_titan.weights.lora_files import (
    LoRAWeights,
    check_layers,
    check_lora,
    export_lora,
    export_merged,
    load_lora,
    merged_weight,
    reference_metadata,
)
from ltx_titan.weights.lora_fusion import check_fusion, fuse_lora, fused_loras
from ltx_titan.weights.lora_header import LoRAFacts, job_digest, lora_header, model_generation
from ltx_titan.weights.lora_svd import Approximation, extract_lora, resize_lora, update_norm
from ltx_titan.weights.metadata import (
    CheckpointMetadata,
    ModelSource,
    read_config,
    read_metadata,
    read_source,
    scale_factors,
)
from ltx_titan.weights.names import (
    CONNECTORS,
    TEXT_PROJECTION,
    TRANSFORMER,
    Component,
    is_adapter,
    official_name,
    stream_of,
    unused_by,
)
from ltx_titan.weights.quantized import QUANTIZED, QuantizedLinear, use_float8_matmuls
from ltx_titan.weights.shapes import RELEASED, released_config
from ltx_titan.weights.stored import StoredWeight, quantized_forms, refuse_quantized, stored_weights
from ltx_titan.weights.tensors import module_tensors, parameter_names, plain_tensor

__all__ = [
    "CONNECTORS",
    "QUANTIZED",
    "RELEASED",
    "TEXT_PROJECTION",
    "TRANSFORMER",
    "Approximation",
    "CheckpointMetadata",
    "Component",
    "Dialect",
    "ExportTensor",
    "LoRAFacts",
    "LoRAWeights",
    "ModelSource",
    "QuantizedLinear",
    "StoredWeight",
    "build_connectors",
    "check_contents",
    "check_fits",
    "check_fusion",
    "check_layers",
    "check_lora",
    "complete_export",
    "dialect_of",
    "export_lora",
    "export_merged",
    "export_safetensors",
    "extract_lora",
    "find_connectors",
    "fuse_lora",
    "fused_loras",
    "is_adapter",
    "job_digest",
    "load_lora",
    "load_module",
    "load_parameters",
    "load_text_connectors",
    "lora_header",
    "match_weights",
    "merged_weight",
    "model_generation",
    "module_tensors",
    "official_name",
    "parameter_names",
    "plain_tensor",
    "quantized_forms",
    "read_config",
    "read_lora",
    "read_metadata",
    "read_source",
    "read_tensors",
    "reference_metadata",
    "refuse_not_finite",
    "refuse_quantized",
    "released_config",
    "resize_lora",
    "save_safetensors",
    "scale_factors",
    "stored_weights",
    "stream_of",
    "transformer_tensors",
    "unused_by",
    "update_norm",
    "use_float8_matmuls",
    "write_lora",
]
