"""How long a training step takes on given clips, from the operations it needs and what a GPU reaches of its peak."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltx_titan.model.flops import training_flops
from ltx_titan.weights import read_source

# bf16 operations a second without sparsity, by the makers' data sheets. Not from torchtitan, which answers for the GPU
# of the machine it runs on, whatever is asked.
PEAKS = {"A100": 312e12, "L40S": 362e12, "H20": 148e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
# Prompts are padded to this.
_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class StepTimes:
    """Estimates for one sample on one GPU.

    Attributes:
        config: the `transformer` section of the model.
        gpu: name of the GPU.
        peak: its operations a second.
        mfu: part of the peak that is reached.
        trained: "full" or "lora".
    """

    config: Mapping[str, Any]
    gpu: str
    peak: float
    mfu: float
    trained: Literal["full", "lora"]

    def seconds(self, video_tokens: int, audio_tokens: int) -> float:
        """Seconds of a forward and backward on one sample; nothing for loading, the optimizer or communication."""
        flops = training_flops(
            self.config,
            video_tokens=video_tokens,
            audio_tokens=audio_tokens,
            text_tokens=_TEXT_TOKENS,
            trained=self.trained,
        )
        return flops / (self.peak * self.mfu)

    @property
    def assumption(self) -> str:
        """What the estimates stand on, in words."""
        kind = "LoRA" if self.trained == "lora" else "full fine-tuning"
        return f"one sample on one {self.gpu} at {self.mfu:.0%} of its peak, {kind}"


def step_times(
    model_path: Path | None, shape: str | None, gpu: str, mfu: float, trained: Literal["full", "lora"]
) -> StepTimes:
    """Prepare estimates.

    Args:
        model_path: the checkpoint to be trained; None: a released shape.
        shape: the released shape, where no checkpoint is given.
        gpu: name of the GPU, as in H100.
        mfu: part of its peak that is reached, in (0, 1].
        trained: "full" or "lora".

    Raises:
        ValueError: the checkpoint or shape cannot be read, or the GPU is not known.
    """
    peak = PEAKS.get(gpu.upper())
    if peak is None:
        raise ValueError(f"--gpu: the peak of {gpu!r} is not known; expected one of {', '.join(PEAKS)}")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu: expected a part of the peak, above 0 and at most 1, found {mfu}")
    source = read_source(None if model_path is None else str(model_path), None if model_path else shape, None)
    return StepTimes(source.config["transformer"], gpu, peak, mfu, trained)
