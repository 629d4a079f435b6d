"""Preservation of the base in LoRA jobs: `[preservation]`.

    loss + prior_weight mse(v(x, caption), v_base(x, caption)) + blank_prompt_weight mse(v(x, ""), v_base(x, ""))

v_base is the same model with its adapters switched off, on the same noised tokens, without a gradient. The first term
needs one more forward pass, the second a forward pass of the base and a training pass without caption, whose backward
pass runs by itself, so that activations of one pass are in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ltx_titan.conditioning import ModelInputs, absent_streams
from ltx_titan.config import PreservationSection
from ltx_titan.lora import AdapterSwitch

_MASK = "prompt_attention_mask"


@dataclass(frozen=True)
class TrainedPass:
    """A forward and a backward pass.

    Attributes:
        inputs: of the model.
        is_blank: whether captions are blank, so that the pass has no loss but that of preservation.
        weights: factor on the loss of each sample [B], but not on that of preservation; None: all are 1.
    """

    inputs: ModelInputs
    is_blank: bool = False
    weights: Tensor | None = None


class Preservation:
    """Targets that keep a model close to its base.

    Args:
        model: with its adapters.
        settings: the job's `[preservation]`.
    """

    def __init__(self, model: nn.Module, settings: PreservationSection) -> None:
        self._model = model
        self._settings = settings
        self._switch = AdapterSwitch(model)

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts of the loss, in the order in which they are logged."""
        return self._settings.parts

    @property
    def has_blank_pass(self) -> bool:
        """Whether each micro-batch is also trained on without captions."""
        return self._settings.blank_prompt_weight > 0

    def weight(self, is_blank: bool) -> float:
        """Weight of the difference from the base in a pass; 0 does not compute it."""
        return self._settings.blank_prompt_weight if is_blank else self._settings.prior_weight

    @torch.no_grad()
    def base_targets(self, inputs: ModelInputs) -> ModelInputs:
        """The same inputs with the base's velocities as targets, for every generated token alike."""
        with self._switch.off():
            video, audio = self._model(inputs.video, inputs.audio, absent_streams(inputs))
        return replace(
            inputs,
            video_target=_of_target(video, inputs.video_target),
            audio_target=_of_target(audio, inputs.audio_target),
            video_loss_weights=None,
            audio_loss_weights=None,
        )


def without_captions(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text features with all tokens masked, as caption dropout masks them; the connectors fill in registers."""
    return {**conditions, _MASK: torch.zeros_like(conditions[_MASK])}


def _of_target(prediction: Tensor | None, target: Tensor | None) -> Tensor | None:
    # References come first in training, so the target's tokens are the last ones.
    return None if prediction is None or target is None else prediction[:, -target.shape[1] :]
