from ltx_titan.model.config import TransformerConfig
from ltx_titan.model.connectors import TextConnector, TextConnectors
from ltx_titan.model.feature_extractor import FeatureExtractor
from ltx_titan.model.modality import Modality
from ltx_titan.model.perturbations import Perturbations
from ltx_titan.model.transformer import LTXTransformer

__all__ = [
    "FeatureExtractor",
    "LTXTransformer",
    "Modality",
    "Perturbations",
    "TextConnector",
    "TextConnectors",
    "TransformerConfig",
]
