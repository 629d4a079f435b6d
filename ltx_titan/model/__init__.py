from ltx_titan.model.modality import Modality

__all__ = ["Modality"]
