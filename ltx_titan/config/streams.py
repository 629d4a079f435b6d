"""The two streams of a job: the `[video]` and `[audio]` sections and their conditions.

A stream without a section is not passed to the transformer at all. A section with `is_generated = false` freezes its
stream: it stays clean and has no loss, but the other stream still attends to it.

Intrinsic conditions keep some of the target's own tokens clean: a keyframe, first frame, prefix or suffix all of some
latent frames, a spatial crop or mask a part of them. A reference prepends clean tokens of another clip.
`ltx_titan.conditioning.conditioned` turns an intrinsic condition into a token mask.
"""

from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from ltx_titan.config.base import FolderName, Fraction, Positive, Region, Section

FixedTime = Literal["first", "middle", "last"]
RandomTime = Literal["random"]


def _check_time(value: Any, names: tuple[str, ...]) -> Any:
    # Here and not by the union's own errors, one for each of its members.
    is_frame = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if not (is_frame or value in names):
        quoted = ", ".join(f'"{name}"' for name in names)
        raise ValueError(
            f"expected a latent frame (0 is the first, -1 the last) or one of {quoted}, found {value!r}; correct it"
        )
    return value


LatentTime = Annotated[
    int | FixedTime | RandomTime,
    BeforeValidator(lambda value: _check_time(value, get_args(FixedTime) + get_args(RandomTime))),
]
"""The latent frame that a keyframe starts at, negative from the end, or where it is placed in the clip."""
FixedLatentTime = Annotated[int | FixedTime, BeforeValidator(lambda value: _check_time(value, get_args(FixedTime)))]
"""As `LatentTime`, without a draw."""


class Span(NamedTuple):
    """Consecutive latent frames (video) or steps (audio).

    Attributes:
        at: index of the first one, negative from the end; or the beginning, middle or end of the clip, where the whole
            span fits; or anywhere it fits, drawn for each sample.
        length: number of them.
    """

    at: int | FixedTime | RandomTime
    length: int


class _Condition(Section):
    probability: Fraction = 1.0
    """Probability that the condition applies, drawn in every step."""


class Keyframe(_Condition):
    """Latent frames at any time are clean: the model learns to generate what lies between images or short clips."""

    type: Literal["keyframe"]
    at: Annotated[tuple[LatentTime, ...], Field(strict=False, min_length=1)]
    """Where keyframes start: latent frames (0 is the first, -1 the last), "first", "middle", "last", or "random", which
    is drawn for each sample in every step. Latent frame 0 is one frame, each other one 8."""
    length: Positive = 1
    """Number of clean latent frames from each: 1 for an image, more for a clip."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The clean latent frames."""
        return tuple(Span(at, self.length) for at in self.at)


class FirstFrame(_Condition):
    """The first latent frame is clean: image to video."""

    type: Literal["first_frame"]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The clean latent frames."""
        return (Span("first", 1),)


class Prefix(_Condition):
    """The beginning is clean: the model learns to continue a clip."""

    type: Literal["prefix"]
    temporal_boundary: Positive
    """Number of clean latent frames (video) or latent steps (audio)."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The clean latent frames or steps."""
        return (Span("first", self.temporal_boundary),)


class Suffix(_Condition):
    """The end is clean: the model learns to lead up to it."""

    type: Literal["suffix"]
    temporal_boundary: Positive
    """Number of clean latent frames (video) or latent steps (audio)."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The clean latent frames or steps."""
        return (Span("last", self.temporal_boundary),)


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
VideoCondition = Annotated[
    FirstFrame | Prefix | Suffix | Keyframe | SpatialCrop | Mask | Reference, Field(discriminator="type")
]
AudioCondition = Annotated[Prefix | Suffix | Mask | Reference, Field(discriminator="type")]
IntrinsicCondition = FirstFrame | Prefix | Suffix | Keyframe | SpatialCrop | Mask


def random_spans(condition: Any) -> int:
    """Number of spans of a condition whose start is drawn for each sample."""
    return sum(span.at == "random" for span in getattr(condition, "spans", ()))


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
