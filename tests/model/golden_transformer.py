"""Builds the transformer and its inputs from a golden case."""

from torch import Tensor

from ltx_titan.model import LTXTransformer, Modality, Perturbations
from tests.golden_cases import Case

_MODALITIES = {"av": "av", "video_only": "video", "audio_only": "audio"}


def build_transformer(case: Case) -> LTXTransformer:
    """The case's transformer with the case's weights, loaded strictly."""
    model = LTXTransformer.from_config(case.entry["config"]["transformer"], _MODALITIES[case.entry["model"]])
    model.load_state_dict(case.weights, strict=True)
    return model


def build_inputs(case: Case, variant: str) -> tuple[Modality | None, Modality | None, Perturbations | None]:
    """Video, audio and perturbations of one variant."""
    entry = case.entry["variants"][variant]

    def modality(fields: dict | None) -> Modality | None:
        if fields is None:
            return None
        values = {k: case.tensors[v] if isinstance(v, str) else v for k, v in fields.items()}
        return Modality(**values)

    lists = entry["perturbations"]
    return (
        modality(entry["video"]),
        modality(entry["audio"]),
        None if lists is None else Perturbations.from_lists(lists),
    )


def weighted_sum(case: Case, variant: str, video: Tensor | None, audio: Tensor | None) -> Tensor:
    """The scalar whose gradients the case states."""
    loss = case.entry["variants"][variant]["loss"]
    total = 0.0
    for output, cotangent in ((video, loss["video_cotangent"]), (audio, loss["audio_cotangent"])):
        if cotangent is not None:
            total = total + (output * case.tensors[cotangent]).sum()
    return total
