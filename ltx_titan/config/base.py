"""The base class of every table of a job file, and the field types that several tables share.

Types are strict: `"5"` is not 5. An integer is accepted where a number is expected. Unknown keys are errors.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt


class Section(BaseModel):
    """One table of a job file; the string below a field is its documentation."""

    # Frozen: a validated job cannot become invalid. Attribute docstrings: configuration.md is generated from them.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _none_is_zero(value: Any) -> Any:
    return 0 if value is None else value


def _check_rectangle(region: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    top, left, bottom, right = region
    if not (0 <= top < bottom and 0 <= left < right):
        raise ValueError(
            "expected [top, left, bottom, right] in pixels with 0 <= top < bottom and 0 <= left < right; "
            "correct the rectangle"
        )
    return region


PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; `~` is expanded. Text rather than `Path`, so that a job compares and prints as it was written."""

Positive = Annotated[int, Field(ge=1)]
# torch's generators take seeds of 64 bits, signed.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Interval = Annotated[int, BeforeValidator(_none_is_zero), Field(ge=0)]
"""Steps between two events; 0 never happens. Unset means 0."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay rate of a moving average."""
NonNegative = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]

# TOML has lists only; a strict model would refuse them for its tuples.
Words = Annotated[tuple[str, ...], Field(strict=False)]
Region = Annotated[
    tuple[StrictInt, StrictInt, StrictInt, StrictInt], Field(strict=False), AfterValidator(_check_rectangle)
]
"""A rectangle [top, left, bottom, right] in pixels; `bottom` and `right` are exclusive."""

StreamName = Literal["video", "audio"]
ComputeDtype = Literal["bfloat16", "float32"]
