"""The six ways of giving a model part of what it would otherwise generate.

Five are intrinsic: they leave some of the target's own tokens clean, chosen by a mask of tokens (True: given). The
sixth, a reference, puts further tokens before the target. The classes are the `[[video.conditions]]` and
`[[audio.conditions]]` of a job file; `given_tokens` builds the mask of an intrinsic one.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator
from torch import Tensor

from ltx_titan.conditioning.tokens import Grid


class _Condition(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    probability: float = Field(default=1.0, ge=0, le=1, description="How often it applies, drawn anew in each step.")


class FirstFrame(_Condition):
    """The first latent frame is given: image to video."""

    type: Literal["first_frame"]


class Prefix(_Condition):
    """The beginning is given: the model learns to continue."""

    type: Literal["prefix"]
    temporal_boundary: int = Field(ge=1, description="Latent frames (video) or latent steps (audio) that are given.")


class Suffix(_Condition):
    """The end is given: the model learns to lead up to it."""

    type: Literal["suffix"]
    temporal_boundary: int = Field(ge=1, description="Latent frames (video) or latent steps (audio) that are given.")


class SpatialCrop(_Condition):
    """A rectangle of every frame is given: outpainting."""

    type: Literal["spatial_crop"]
    spatial_region: Annotated[tuple[StrictInt, StrictInt, StrictInt, StrictInt], Field(strict=False)] = Field(
        description="top, left, bottom, right in pixels; the last two are not part of it."
    )

    @model_validator(mode="after")
    def _is_a_rectangle(self) -> Self:
        top, left, bottom, right = self.spatial_region
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError(
                f"spatial_region is {list(self.spatial_region)}; it is [top, left, bottom, right] in pixels "
                "with 0 <= top < bottom and 0 <= left < right."
            )
        return self


class Mask(_Condition):
    """A mask of each sample says what is given: inpainting."""

    type: Literal["mask"]
    mask_dir: str = Field(min_length=1, description="Folder of the masks under the data root; 1 is given, 0 generated.")


class Reference(_Condition):
    """Another clip is put before the target, clean: in-context conditioning. Drawn once for a whole global batch."""

    type: Literal["reference"]
    latents_dir: str = Field(min_length=1, description="Folder of the reference latents under the data root.")


VideoCondition = Annotated[FirstFrame | Prefix | Suffix | SpatialCrop | Mask | Reference, Field(discriminator="type")]
AudioCondition = Annotated[Prefix | Suffix | Mask | Reference, Field(discriminator="type")]
IntrinsicCondition = FirstFrame | Prefix | Suffix | SpatialCrop | Mask


def given_tokens(
    condition: IntrinsicCondition,
    grid: Grid,
    scale_factors: tuple[int, int, int],
    file_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which tokens an intrinsic condition gives.

    Boundaries and regions that reach beyond the clip are clamped to it.

    Args:
        condition: any condition but a reference.
        grid: latent sizes of the target.
        scale_factors: compression factors (time, height, width).
        file_mask: what the folder of a `mask` condition holds, [B, ...] with as many elements per sample as tokens.
        device: device of the result.

    Returns:
        Booleans [1, S] or, of a `mask` condition, [B, S].

    Raises:
        ValueError: if a mask does not have one element per token.
    """
    if isinstance(condition, Mask):
        assert file_mask is not None
        return _threshold(file_mask.to(device), grid, condition.mask_dir)
    given = torch.zeros(tuple(grid), dtype=torch.bool, device=device)
    match condition:
        case FirstFrame():
            given[:1] = True
        case Prefix(temporal_boundary=count):
            given[:count] = True
        case Suffix(temporal_boundary=count):
            given[max(grid.frames - count, 0) :] = True
        case SpatialCrop():
            top, left, bottom, right = crop_cells(condition, scale_factors)
            given[:, top:bottom, left:right] = True
    return given.flatten()[None]


def crop_cells(condition: SpatialCrop, scale_factors: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The region in latent cells: pixels divided by the compression factor and rounded down."""
    _, down, right = scale_factors
    y1, x1, y2, x2 = condition.spatial_region
    return y1 // down, x1 // right, y2 // down, x2 // right


def _threshold(mask: Tensor, grid: Grid, folder: str) -> Tensor:
    """A token is given where its mask is above 0.5."""
    flat = mask.flatten(1)
    if flat.shape[1] != grid.num_tokens:
        raise ValueError(
            f"{folder}: a mask has shape {list(mask.shape[1:])}, {flat.shape[1]} elements, but its target has "
            f"{grid.num_tokens} latent cells ({grid.frames} x {grid.height} x {grid.width} frames, rows, columns). "
            "Make the masks from the same clips, sizes and frame counts as the latents."
        )
    return flat > 0.5
