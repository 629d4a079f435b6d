"""`[validation]` of a job: which clips are sampled while training, how they are guided, and what is given of them.

A sample's conditions say the same things as the training conditions, but name media files instead of folders of
latents, and there are two more: `video_to_audio` and `audio_to_video` give one stream altogether. What can be said
without opening a file is checked here; what needs files or the model's sizes is checked by `check_validation`.
"""

import os
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Scale = Annotated[float, Field(ge=1.0)]
Region = Annotated[tuple[StrictInt, StrictInt, StrictInt, StrictInt], Field(strict=False)]
Dims = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class _EitherStream(_Table):
    """A condition that gives a video or an audio."""

    video: PathText | None = None
    """Video file."""
    audio: PathText | None = None
    """Audio file, or a video file for its audio."""

    @property
    def stream(self) -> Literal["video", "audio"]:
        """The stream that it gives."""
        return "video" if self.video is not None else "audio"

    @model_validator(mode="after")
    def _names_one_file(self) -> Self:
        if (self.video is None) == (self.audio is None):
            found = "both" if self.video is not None else "neither"
            raise ValueError(f"a {self.type} condition has exactly one of video and audio, found {found}.")
        return self


class GivenFirstFrame(_Table):
    """The first frame is an image: image to video."""

    type: Literal["first_frame"]
    image_or_video: PathText
    """Image, or video whose first frame is taken."""

    stream: ClassVar[str] = "video"


class _GivenEnd(_EitherStream):
    num_frames: Positive | None = None
    """Video: pixel frames that are given; unset gives the whole file."""
    duration: float | None = Field(None, gt=0.0)
    """Audio: seconds that are given; unset gives the whole file."""

    @model_validator(mode="after")
    def _has_its_own_length(self) -> Self:
        wrong = ("duration", "num_frames") if self.stream == "video" else ("num_frames", "duration")
        if getattr(self, wrong[0]) is not None:
            raise ValueError(f"a {self.type} condition on {self.stream} has {wrong[1]}, not {wrong[0]}.")
        return self


class GivenPrefix(_GivenEnd):
    """The beginning is given, and continued."""

    type: Literal["prefix"]


class GivenSuffix(_GivenEnd):
    """The end is given, and led up to."""

    type: Literal["suffix"]


class GivenCrop(_Table):
    """A rectangle of every frame is given: outpainting."""

    type: Literal["spatial_crop"]
    video: PathText
    """Video of the sample's length; the rectangle is cut from it."""
    spatial_region: Region
    """[top, left, bottom, right] in pixels; the last two are not part of it."""

    stream: ClassVar[str] = "video"

    @field_validator("spatial_region")
    @classmethod
    def _is_a_rectangle(cls, region: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        top, left, bottom, right = region
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError(
                f"spatial_region is {list(region)}; it is [top, left, bottom, right] in pixels "
                "with 0 <= top < bottom and 0 <= left < right."
            )
        return region


class GivenMask(_EitherStream):
    """What a mask marks is given: inpainting."""

    type: Literal["mask"]
    mask: PathText
    """Image or video (bright is given) for video; `.pt` or audio (loud is given) for audio."""


class GivenReference(_EitherStream):
    """Another clip that the model looks at: in-context conditioning."""

    type: Literal["reference"]
    downscale_factor: Positive = 1
    """Video: how many times smaller than the sample the reference is encoded; as in training."""
    temporal_scale_factor: Positive = 1
    """Video: how many times fewer frames per second the reference has; as in training."""
    include_in_output: bool = False
    """Video: show the reference to the left of the result."""

    @model_validator(mode="after")
    def _audio_has_no_size(self) -> Self:
        if self.stream == "audio":
            # Compared with defaults, not with what was written: a job as resolved spells defaults out.
            for name in ("downscale_factor", "temporal_scale_factor", "include_in_output"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to a video reference; remove it from the audio reference.")
        return self


class VideoToAudio(_Table):
    """The whole video is given, its audio is generated."""

    type: Literal["video_to_audio"]
    video: PathText
    """Video of the sample's length."""

    stream: ClassVar[str] = "video"


class AudioToVideo(_Table):
    """The whole audio is given, its video is generated."""

    type: Literal["audio_to_video"]
    audio: PathText
    """Audio file, or a video file for its audio; its length, up to that of the clip, is the audio's."""

    stream: ClassVar[str] = "audio"


SampleCondition = Annotated[
    GivenFirstFrame | GivenPrefix | GivenSuffix | GivenCrop | GivenMask | GivenReference | VideoToAudio | AudioToVideo,
    Field(discriminator="type"),
]


class ValidationSample(_Table):
    """`[[validation.samples]]`: one clip to sample."""

    prompt: str
    """What is to be seen and heard."""
    conditions: Annotated[tuple[SampleCondition, ...], Field(strict=False)] = ()
    """What is given of it."""
    video_dims: Dims | None = None
    """[width, height, frames]; unset takes those of [validation]."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of the noise; unset takes that of [validation]."""

    @property
    def frozen_stream(self) -> Literal["video", "audio"] | None:
        """The stream that is given altogether."""
        kinds = {condition.type for condition in self.conditions}
        return "video" if "video_to_audio" in kinds else "audio" if "audio_to_video" in kinds else None

    @model_validator(mode="after")
    def _conditions_agree(self) -> Self:
        kinds = [condition.type for condition in self.conditions]
        whole = [kind for kind in kinds if kind in ("video_to_audio", "audio_to_video")]
        if len(whole) > 1:
            raise ValueError(f"conditions give a whole stream {len(whole)} times ({', '.join(whole)}); keep one.")
        for condition in self.conditions:
            if whole and condition.type not in whole and condition.stream == self.frozen_stream:
                raise ValueError(
                    f"condition {condition.type} gives part of the {condition.stream}, which {whole[0]} gives "
                    "altogether; remove one of them."
                )
        return self


class ValidationSection(_Table):
    """`[validation]`: sampled clips to watch and hear, and a loss on data that is not trained on."""

    interval: Positive | None = None
    """Steps between validations; unset never validates."""
    skip_initial_validation: bool = False
    """Leave out the one before the first step, which shows what the untrained model does."""
    samples: Annotated[tuple[ValidationSample, ...], Field(strict=False)] = ()
    """Clips to sample; a guided one costs up to four forwards of the model per sampling step."""
    negative_prompt: str | None = None
    """What to steer away from, in all samples; unset takes the list of defects of the released pipelines."""
    video_dims: Dims = (960, 544, 89)
    """[width, height, frames] in pixels; smaller is quicker, but looks worse than the model can do."""
    frame_rate: float = Field(24.0, gt=0.0)
    """Frames per second."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the noise: the same in every validation, so that clips can be compared."""
    inference_steps: Positive | None = None
    """Sampling steps; unset means 30, and 8 with the distilled schedule, which has no other number."""
    schedule: Literal["standard", "distilled"] = "standard"
    """`distilled` for distilled checkpoints; then set the CFG and modality scales to 1 and the STG scales to 0."""
    stepper: Literal["euler", "euler_ancestral"] = "euler"
    """`euler_ancestral` adds fresh noise in every step, as distilled models of 2.5 were made for."""
    video_cfg_scale: Scale = 3.0
    """How closely the video follows the prompt; 1 leaves the unconditional pass out."""
    audio_cfg_scale: Scale = 7.0
    """The same for the audio."""
    video_stg_scale: Weight = 1.0
    """Weight of the difference from a model with skipped self-attentions; 0 leaves that pass out."""
    audio_stg_scale: Weight = 1.0
    """The same for the audio."""
    stg_blocks: Annotated[tuple[int, ...], Field(strict=False)] | Literal["all"] = (28,)
    """Blocks whose self-attention is skipped: [29] for LTX-2, [28] for later models."""
    guidance_rescale: Share = 0.7
    """Pulls the contrast of a guided result back to that of the plain one; 0 leaves it."""
    video_modality_guidance_scale: Scale = 3.0
    """How closely the video follows the audio; 1 leaves the pass with separate streams out."""
    audio_modality_guidance_scale: Scale = 3.0
    """How closely the audio follows the video."""
    generate_video: bool | None = None
    """Unset generates video if the job has a [video] block."""
    generate_audio: bool | None = None
    """Unset generates audio if the job has an [audio] block."""
    tokens_at_once: Positive = 65536
    """Most tokens in one forward: guided passes run together as far as they fit; less needs less memory."""
    use_ema: bool = False
    """Sample with the averaged weights of `optimizer.ema_decay`; the held-out loss is that of the trained ones."""
    offload_optimizer: bool = False
    """Move the optimizer's state to the host while sampling; slower, for when a decoder does not fit beside it."""
    vae_tiling: bool = True
    """Decode in overlapping tiles: less memory, faint seams."""
    text_encoder_path: PathText | None = None
    """Folder of the text encoder; prompts are encoded once before training, then it is let go."""
    video_vae_path: PathText | None = None
    """Video VAE file of a split pack; unset means `model.checkpoint_path`."""
    audio_vae_path: PathText | None = None
    """Audio VAE file of a split pack; unset means `model.checkpoint_path`."""
    held_out_root: PathText | None = None
    """Preprocessed data set that is not trained on, for a loss curve that noise levels and draws do not shake."""
    held_out_samples: Positive = 16
    """How many of its samples are used."""
    held_out_sigmas: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False, min_length=1)] = (
        0.1,
        0.3,
        0.5,
        0.7,
        0.9,
    )
    """Noise levels of that loss; each costs one forward per sample."""

    def dims_of(self, sample: ValidationSample) -> tuple[int, int, int]:
        """Width, height and frames of a sample."""
        return self.video_dims if sample.video_dims is None else sample.video_dims

    def seed_of(self, sample: ValidationSample) -> int:
        """Seed of a sample."""
        return self.seed if sample.seed is None else sample.seed

    @model_validator(mode="after")
    def _generates_something(self) -> Self:
        if self.samples and self.generate_video is False and self.generate_audio is False:
            raise ValueError("generate_video and generate_audio are both false; set one to true, or remove samples.")
        if self.interval is not None and not self.samples and self.held_out_root is None:
            raise ValueError("interval is set but there is nothing to do; add samples or held_out_root.")
        return self

    @field_validator("stg_blocks", mode="before")
    @classmethod
    def _no_empty_list(cls, blocks: Any) -> Any:
        if isinstance(blocks, list | tuple) and not blocks:
            raise ValueError("stg_blocks is empty; set the STG scales to 0 to leave that pass out.")
        return blocks
