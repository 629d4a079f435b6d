"""The two streams of a job: the `[video]` and `[audio]` sections and their conditions.

A stream without a section is not passed to the transformer at all. A section with `is_generated = false` freezes its
stream: it stays clean and has no loss, but the other stream still attends to it.

Five conditions are intrinsic: they keep some of the target's own tokens clean. The sixth, a reference, prepends clean
tokens of another clip. `ltx_titan.conditioning.conditions` turns an intrinsic condition into a token mask.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ltx_titan.config.base import FolderName, Fraction, Positive, Region, Section


class _Condition(Section):
    probability: Fraction = 1.0
    """Probability that the condition applies, drawn in every step."""


class FirstFrame(_Condition):
    """The first latent frame is clean: image to video."""

    type: Literal["first_frame"]


class Prefix(_Condition):
    """The beginning is clean: the model learns to continue a clip."""

    type: Literal["prefix"]
    temporal_boundary: Positive
    """Number of clean latent frames (video) or latent steps (audio)."""


class Suffix(_Condition):
    """The end is clean: the model learns to lead up to it."""

    type: Literal["suffix"]
    temporal_boundary: Positive
    """Number of clean latent frames (video) or latent steps (audio)."""


class SpatialCrop(_Condition):
    """A rectangle of every frame is clean: outpainting."""

    type: Literal["spatial_crop"]
    spatial_region: Region
    """[top, left, bottom, right] in pixels; bottom and right are exclusive."""


class Mask(_Condition):
    """A mask stored with each sample selects the clean tokens: inpainting."""

    type: Literal["mask"]
    mask_dir: FolderName
    """Folder of the masks under the data root; 1 is conditioned, 0 is generated."""


class Reference(_Condition):
    """Clean tokens of another clip are prepended: in-context conditioning. Drawn once for a global batch."""

    type: Literal["reference"]
    latents_dir: FolderName
    """Folder of the reference latents under the data root."""


# Discriminated by `type`: an error concerns the keys of that one kind, not of all in turn.
VideoCondition = Annotated[FirstFrame | Prefix | Suffix | SpatialCrop | Mask | Reference, Field(discriminator="type")]
AudioCondition = Annotated[Prefix | Suffix | Mask | Reference, Field(discriminator="type")]
IntrinsicCondition = FirstFrame | Prefix | Suffix | SpatialCrop | Mask


class _StreamSection(Section):
    is_generated: bool
    """False freezes the stream: clean, without loss, still attended to by the other stream."""
    latents_dir: FolderName
    """Folder of the stream's latents under the data root."""
    loss_mask_dir: FolderName | None = None
    """Folder of masks under the data root, as `process-dataset` makes them: the loss of tokens where a mask is dark
    weighs `unmasked_weight`, so that a subject is learned rather than what surrounds it. Unset weighs all alike."""
    unmasked_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Weight of the tokens where a mask is dark, relative to the others."""
    conditions: tuple[Any, ...] = ()
    """Conditions of the stream."""

    @property
    def applied(self) -> tuple[bool, ...]:
        """Whether each condition has an effect. On a frozen stream only references have: its own tokens are clean."""
        return tuple(self.is_generated or isinstance(condition, Reference) for condition in self.conditions)


class VideoSection(_StreamSection):
    """`[video]`: the video stream."""

    conditions: Annotated[tuple[VideoCondition, ...], Field(strict=False)] = ()
    """Conditioned parts of the video: the union of the conditions that apply to a sample."""


class AudioSection(_StreamSection):
    """`[audio]`: the audio stream."""

    conditions: Annotated[tuple[AudioCondition, ...], Field(strict=False)] = ()
    """Conditioned parts of the audio: the union of the conditions that apply to a sample."""


class StrategyConfig(Section):
    """Both streams together, as `FlexibleStrategy.from_config` takes them."""

    name: Literal["flexible"] = "flexible"
    """Name of the strategy."""
    video: VideoSection | None = None
    """The video stream."""
    audio: AudioSection | None = None
    """The audio stream."""

    @model_validator(mode="after")
    def _generates_something(self) -> Self:
        if not any(stream is not None and stream.is_generated for stream in (self.video, self.audio)):
            raise ValueError(
                "expected a generated stream, found none: there is nothing to learn; set is_generated = true in "
                "[video] or [audio]"
            )
        return self
