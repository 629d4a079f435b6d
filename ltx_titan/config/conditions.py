"""Conditions of a stream: the `[[video.conditions]]` and `[[audio.conditions]]` tables of a job file.

Five are intrinsic: they leave some of the target's own tokens clean. The sixth, a reference, prepends further tokens.
`ltx_titan.conditioning.conditioned` turns an intrinsic one into a token mask.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator


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
