from ltx_titan.checkpoint.background import BackgroundSaver
from ltx_titan.checkpoint.connectors import load_text_connectors
from ltx_titan.checkpoint.export import ExportTensor, export_safetensors, export_transformer
from ltx_titan.checkpoint.folders import latest_complete, read_trainer_state, step_folder
from ltx_titan.checkpoint.load import check_fits, load_parameters
from ltx_titan.checkpoint.metadata import CheckpointMetadata, read_metadata, scale_factors
from ltx_titan.checkpoint.names import CONNECTORS, TEXT_PROJECTION, TRANSFORMER, Component, stream_of, unused_by
from ltx_titan.checkpoint.shapes import released_config
from ltx_titan.checkpoint.state import TrainingState, load_state, save_state
from ltx_titan.checkpoint.stored import StoredWeight, quantized_forms, refuse_quantized, stored_weights
from ltx_titan.checkpoint.tensors import module_tensors, official_name, plain_tensor

__all__ = [
    "CONNECTORS",
    "TEXT_PROJECTION",
    "TRANSFORMER",
    "BackgroundSaver",
    "CheckpointMetadata",
    "Component",
    "ExportTensor",
    "StoredWeight",
    "TrainingState",
    "check_fits",
    "export_safetensors",
    "export_transformer",
    "latest_complete",
    "load_parameters",
    "load_state",
    "load_text_connectors",
    "module_tensors",
    "official_name",
    "plain_tensor",
    "quantized_forms",
    "read_metadata",
    "read_trainer_state",
    "refuse_quantized",
    "released_config",
    "save_state",
    "scale_factors",
    "step_folder",
    "stored_weights",
    "stream_of",
    "unused_by",
]
