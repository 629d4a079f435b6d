"""The base class of every table of a job file, and the field types that several tables share.

Types are strict: `"5"` is not 5. An integer is accepted where a number is expected. Unknown keys are errors.
"""

import os
import re
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


def _check_path(text: str) -> str:
    """Refuses texts that no file system has as a path, which would otherwise fail where the path is first used."""
    if not text:
        raise ValueError("expected a path, found an empty text; set it, or remove the key")
    if "\0" in text:
        raise ValueError("expected a path, found a null byte in it; correct the path")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in text.split("/")):
        raise ValueError(
            f"expected names of at most {_LONGEST_NAME} bytes, found one that is too long; correct the path"
        )
    return text


def _check_folder_name(name: str) -> str:
    if "\0" in name or os.path.isabs(name) or ".." in name.split("/"):
        raise ValueError(f"expected the name of a folder below the data root, found {name!r}; correct the name")
    return name


def _check_repo(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"expected OWNER/NAME, found {name!r}; write the name as on the repository's page")
    return name


# Of every file system in use.
_LONGEST_NAME = 255

PathText = Annotated[str, AfterValidator(_check_path), AfterValidator(os.path.expanduser)]
"""A path; `~` is expanded. Text rather than `Path`, so that a job compares and prints as it was written."""
FolderName = Annotated[str, Field(min_length=1), AfterValidator(_check_folder_name)]
"""A folder below the data root; it cannot lead outside."""

RepoName = Annotated[str, AfterValidator(_check_repo)]
"""A repository of the Hugging Face Hub."""

# More steps, samples or tokens than any run has; beyond 2^63 tensors and ranges overflow.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
# torch's generators take seeds of 64 bits, signed.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Interval = Annotated[int, BeforeValidator(_none_is_zero), Field(ge=0)]
"""Steps between two events; 0 never happens. Unset means 0."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay rate of a moving average."""
NonNegative = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
FrameRate = Annotated[float, Field(ge=0.01, le=10_000.0)]
"""Frames per second; beyond these bounds positions in time lose their meaning."""

# TOML has lists only; a strict model would refuse them for its tuples.
Words = Annotated[tuple[str, ...], Field(strict=False)]
Region = Annotated[
    tuple[StrictInt, StrictInt, StrictInt, StrictInt], Field(strict=False), AfterValidator(_check_rectangle)
]
"""A rectangle [top, left, bottom, right] in pixels; `bottom` and `right` are exclusive."""

StreamName = Literal["video", "audio"]
ComputeDtype = Literal["bfloat16", "float32"]
