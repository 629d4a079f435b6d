"""The `[lora]` section: what is adapted, how strongly, and in which form the frozen base is kept."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

BaseDtype = Literal["float32", "bfloat16", "int8", "int4", "float8", "nvfp4"]


class LoRASection(BaseModel):
    """Low-rank adapters on a frozen base, `y = W x + (alpha / rank) B A x`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    rank: Annotated[int, Field(ge=1)] = 32
    """Width of an adapter; more learns more and is larger. 8-16 for motion, 32-64 for a style, 96-128 for many."""
    alpha: float = Field(32.0, gt=0.0)
    """Scale of an adapter is alpha / rank. Exported files have it multiplied into B, for readers do not know it."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs set to zero in training; steadies small data sets, costs a pass over the input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("all_attention",)
    """Presets (`all_attention`, `video`, `v2v`, ...) or dotted name endings (`attn1.to_q`), in any mixture."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps large ranks learning at the same rate."""
    dora: bool = False
    """Learn each output's magnitude apart from its direction. Slower, and exportable only as a merged checkpoint."""
    base_dtype: BaseDtype = "bfloat16"
    """Form of the frozen weights. int8 and float8 halve their memory, int4 quarters it, nvfp4 takes a fifth more than
    int4 and is more exact. An official fp8 or NVFP4 file keeps its bits in float8 or nvfp4."""

    @field_validator("targets", mode="before")
    @classmethod
    def _is_a_list(cls, targets: object) -> object:
        # Without this, a bare string would be taken apart into letters.
        if isinstance(targets, str):
            raise ValueError(f'expected a list of presets or name endings, found a string; write ["{targets}"].')
        return targets

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
