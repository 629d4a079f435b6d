"""What a job does with each of its two streams: the `[video]` and `[audio]` sections of a job file.

A stream whose block is absent is not passed to the transformer at all. A block with `is_generated = false` freezes its
stream: it stays clean and has no loss, yet the other stream hears or sees it.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ltx_titan.config.conditions import AudioCondition, IntrinsicCondition, Reference, VideoCondition

AUDIO_CONDITIONS = ("prefix", "suffix", "mask", "reference")
VIDEO_ONLY_CONDITIONS = ("first_frame", "spatial_crop")


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    is_generated: bool = Field(description="False freezes the stream: clean, no loss, still attended to.")
    latents_dir: str = Field(min_length=1, description="Folder of the stream's latents under the data root.")
    conditions: tuple[Any, ...] = ()

    @property
    def applied(self) -> tuple[bool, ...]:
        """Which conditions have an effect: on a frozen stream only references have, for all else is given already."""
        return tuple(self.is_generated or isinstance(condition, Reference) for condition in self.conditions)

    @property
    def ignored_conditions(self) -> tuple[IntrinsicCondition, ...]:
        """Conditions without effect, worth a warning."""
        return tuple(c for c, is_applied in zip(self.conditions, self.applied, strict=True) if not is_applied)


class VideoSection(_Block):
    """The `[video]` section."""

    conditions: Annotated[tuple[VideoCondition, ...], Field(strict=False)] = Field(
        default=(), description="What part of the video is given; the union of all that apply to a sample."
    )


class AudioSection(_Block):
    """The `[audio]` section."""

    conditions: Annotated[tuple[AudioCondition, ...], Field(strict=False)] = Field(
        default=(), description="What part of the audio is given; the union of all that apply to a sample."
    )

    @field_validator("conditions", mode="before")
    @classmethod
    def _has_no_pictures(cls, conditions: Any) -> Any:
        for condition in conditions if isinstance(conditions, Iterable) else ():
            kind = condition.get("type") if isinstance(condition, dict) else getattr(condition, "type", None)
            if kind in VIDEO_ONLY_CONDITIONS:
                raise ValueError(f"audio does not support {kind!r}; it supports {', '.join(AUDIO_CONDITIONS)}.")
        return conditions


class StrategyConfig(BaseModel):
    """Both blocks together, as `FlexibleStrategy.from_config` takes them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Literal["flexible"] = "flexible"
    video: VideoSection | None = None
    audio: AudioSection | None = None

    @model_validator(mode="after")
    def _generates_something(self) -> Self:
        if not any(block is not None and block.is_generated for block in (self.video, self.audio)):
            raise ValueError(
                "no stream is generated, so there is nothing to learn: set is_generated = true in [video] or [audio]."
            )
        return self
