"""The `[optimizer]` section: the update rule, and how much memory it may take."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

OptimizerName = Literal["adamw", "adamw8bit", "adamw4bit", "muon", "adafactor"]
_PER_PARAMETER = ("adamw", "adamw8bit", "adamw4bit")
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSection(BaseModel):
    """Update rule. Bytes of state per trained weight: adamw 8, adamw8bit 2.1, adamw4bit 1.1, muon 4, adafactor 0."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: OptimizerName = "adamw"
    """`muon` orthogonalises the update of each matrix of the blocks (AdamW does the rest) and gathers it to do so."""
    lr: float = Field(1e-4, gt=0.0)
    """Peak learning rate; the schedule multiplies it. Muon's updates are scaled so that AdamW's rates fit."""
    betas: Annotated[tuple[_Share, _Share], Field(strict=False)] = (0.9, 0.999)
    """AdamW: memory of the first and second moment; a lower second one adapts faster and is noisier."""
    eps: float = Field(1e-8, gt=0.0)
    """AdamW: guards the division; raise it when updates of rarely used weights explode."""
    weight_decay: float = Field(0.01, ge=0.0)
    """Pull towards zero, times the learning rate."""
    momentum: _Share = 0.95
    """Muon: memory of the direction."""
    stochastic_rounding: bool = False
    """AdamW on bfloat16 weights: round up or down at random, so that small updates are not lost on average."""
    offload_state: bool = False
    """Keep state in host memory and bring it over block by block; costs its size over the bus twice a step."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is ready and drop that: no memory for gradients, and no clipping."""
    ema_decay: _Share | None = None
    """Also keep a moving average of the trained weights (4 bytes each), such as 0.999; unset keeps none."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        adamw = ", ".join(_PER_PARAMETER)
        if self.in_backward and self.name not in _PER_PARAMETER:
            raise ValueError(f'in_backward = true: expected name to be one of {adamw}, found "{self.name}".')
        if self.in_backward and self.offload_state:
            raise ValueError("in_backward and offload_state: expected at most one of them to be true.")
        if self.stochastic_rounding and self.name not in _PER_PARAMETER:
            raise ValueError(f'stochastic_rounding = true: expected name to be one of {adamw}, found "{self.name}".')
        return self
