"""`[validation]` of a job: clips that are sampled during training, their guidance and their conditions.

A sample's conditions mirror the training conditions, but name media files instead of folders of latents. Two more
condition a whole stream: `video_to_audio` and `audio_to_video`. This module checks what can be checked without opening
a file; `ltx_titan.validation.check` does the rest.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ltx_titan.config.base import (
    AboveZero,
    Fraction,
    FrameRate,
    NonNegative,
    PathText,
    Positive,
    Region,
    Section,
    Seed,
    StreamName,
)
from ltx_titan.config.streams import FixedLatentTime

# 1 means no guidance; below it, guidance would weaken what it is meant to strengthen.
GuidanceScale = Annotated[float, Field(ge=1.0)]
# At sigma 0 the input contains no noise, so the velocity cannot be predicted from it.
Sigma = Annotated[float, Field(gt=0, le=1)]
Dims = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class _EitherStream(Section):
    """A condition on the video or on the audio."""

    if TYPE_CHECKING:
        type: str  # declared by the subclasses

    video: PathText | None = None
    """Video file; conditions the video."""
    audio: PathText | None = None
    """Audio file, or a video file whose audio is used; conditions the audio."""

    @property
    def stream(self) -> StreamName:
        """The conditioned stream."""
        return "video" if self.video is not None else "audio"

    @model_validator(mode="after")
    def _names_one_file(self) -> Self:
        if (self.video is None) == (self.audio is None):
            found = "both" if self.video is not None else "neither"
            raise ValueError(
                f"{self.type} condition: expected exactly one of video and audio, found {found}; set one of them"
            )
        return self


class SampleFirstFrame(Section):
    """The first frame is an image: image to video."""

    type: Literal["first_frame"]
    image_or_video: PathText
    """Image, or video whose first frame is used."""

    # Constants of the kind, not keys of the file: it is a keyframe at the first latent frame.
    stream: ClassVar[StreamName] = "video"
    at: ClassVar[FixedLatentTime] = "first"
    length: ClassVar[int] = 1


class SampleKeyframe(Section):
    """Latent frames at any time are an image or a clip; several conditions make several keyframes."""

    type: Literal["keyframe"]
    image_or_video: PathText
    """Image, which is held still, or video. A keyframe that does not begin the clip takes the frames after the video's
    first one, which gives the codec their past as in training."""
    at: FixedLatentTime
    """Latent frame that it starts at (0 is the first, -1 the last), or "first", "middle" or "last"."""
    length: Positive = 1
    """Number of conditioned latent frames."""

    stream: ClassVar[StreamName] = "video"


class _SampleEnd(_EitherStream):
    num_frames: Positive | None = None
    """Video: number of conditioned pixel frames; unset uses the whole file."""
    duration: AboveZero | None = None
    """Audio: conditioned seconds; unset uses the whole file."""

    @model_validator(mode="after")
    def _has_the_length_of_its_stream(self) -> Self:
        wrong, right = ("duration", "num_frames") if self.stream == "video" else ("num_frames", "duration")
        if getattr(self, wrong) is not None:
            raise ValueError(
                f"{self.type} condition on {self.stream}: expected {right}, not {wrong}; remove {wrong} or use {right}"
            )
        return self


class SamplePrefix(_SampleEnd):
    """The beginning is conditioned; the model continues it."""

    type: Literal["prefix"]


class SampleSuffix(_SampleEnd):
    """The end is conditioned; the model generates what precedes it."""

    type: Literal["suffix"]


class SampleSpatialCrop(Section):
    """A rectangle of every frame is conditioned: outpainting."""

    type: Literal["spatial_crop"]
    video: PathText
    """Video of the sample's length, from which the rectangle is cut."""
    spatial_region: Region
    """[top, left, bottom, right] in pixels; bottom and right are exclusive."""

    stream: ClassVar[StreamName] = "video"


class SampleMask(_EitherStream):
    """A mask selects what is conditioned: inpainting."""

    type: Literal["mask"]
    mask: PathText
    """Video: image or video, bright pixels are conditioned. Audio: `.pt` or audio file, loud steps are conditioned."""


class SampleReference(_EitherStream):
    """Another clip that the model attends to: in-context conditioning."""

    type: Literal["reference"]
    downscale_factor: Positive = 1
    """Video: ratio between the sizes of sample and reference; as in training."""
    temporal_scale_factor: Positive = 1
    """Video: ratio between the frame rates of sample and reference; as in training."""
    include_in_output: bool = False
    """Video: show the reference to the left of the result."""

    @model_validator(mode="after")
    def _audio_has_no_size(self) -> Self:
        if self.stream == "audio":
            # Compared with defaults instead of `model_fields_set`: a resolved job spells all defaults out.
            for name in ("downscale_factor", "temporal_scale_factor", "include_in_output"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to a video reference; remove it from the audio reference")
        return self


class VideoToAudio(Section):
    """The whole video is conditioned, its audio is generated."""

    type: Literal["video_to_audio"]
    video: PathText
    """Video of the sample's length."""

    stream: ClassVar[StreamName] = "video"


class AudioToVideo(Section):
    """The whole audio is conditioned, its video is generated."""

    type: Literal["audio_to_video"]
    audio: PathText
    """Audio file, or a video file whose audio is used; it is cut to the length of the clip."""

    stream: ClassVar[StreamName] = "audio"


SampleCondition = Annotated[
    SampleFirstFrame
    | SampleKeyframe
    | SamplePrefix
    | SampleSuffix
    | SampleSpatialCrop
    | SampleMask
    | SampleReference
    | VideoToAudio
    | AudioToVideo,
    Field(discriminator="type"),
]


class ValidationSample(Section):
    """`[[validation.samples]]`: one clip to sample."""

    prompt: str
    """Text prompt for video and audio."""
    conditions: Annotated[tuple[SampleCondition, ...], Field(strict=False)] = ()
    """Conditioned parts of the clip."""
    video_dims: Dims | None = None
    """[width, height, frames]; unset means those of [validation]."""
    seed: Seed | None = None
    """Seed of the noise; unset means that of [validation]."""

    @property
    def frozen_stream(self) -> StreamName | None:
        """The stream that is conditioned as a whole."""
        kinds = {condition.type for condition in self.conditions}
        if "video_to_audio" in kinds:
            return "video"
        return "audio" if "audio_to_video" in kinds else None

    @model_validator(mode="after")
    def _conditions_agree(self) -> Self:
        whole = [c.type for c in self.conditions if c.type in ("video_to_audio", "audio_to_video")]
        if len(whole) > 1:
            raise ValueError(f"conditions cover a whole stream {len(whole)} times ({', '.join(whole)}); keep one")
        for condition in self.conditions:
            if whole and condition.type not in whole and condition.stream == self.frozen_stream:
                raise ValueError(
                    f"condition {condition.type} covers part of the {condition.stream}, which {whole[0]} covers as a "
                    "whole; remove one of them"
                )
        return self


class SampleLoRA(Section):
    """`[[validation.loras]]`: a LoRA that clips are sampled with, besides what is trained."""

    path: PathText
    """LoRA file in any form that `model.adapter_path` takes."""
    strength: float = 1.0
    """Factor on its change; several LoRAs add up."""


class QualitySection(Section):
    """`[validation.quality]`: scores of the sampled clips by models in local folders.

    Each is the mean over `validation.samples` of the cosine similarity between embeddings of clip and prompt, logged as
    `quality/NAME`. Scores are computed after decoding; one that fails is logged, and training continues.
    """

    clip_path: PathText | None = None
    """Folder of a CLIP or X-CLIP model in the layout of transformers, for `quality/text_video`."""
    clap_path: PathText | None = None
    """Folder of a CLAP model in the layout of transformers, for `quality/text_audio`."""
    frames: Positive = 8
    """Evenly spaced frames of a clip whose similarity is averaged by CLIP; X-CLIP has a number of its own."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that are logged."""
        models = {"quality/text_video": self.clip_path, "quality/text_audio": self.clap_path}
        return tuple(name for name, path in models.items() if path is not None)


class ValidationSection(Section):
    """`[validation]`: sampled clips, and the loss on a held-out dataset."""

    interval: Positive | None = None
    """Steps between validations; unset disables validation."""
    skip_initial_validation: bool = False
    """Skip the validation before the first step, which shows the untrained model."""
    samples: Annotated[tuple[ValidationSample, ...], Field(strict=False)] = ()
    """Clips to sample; a guided one costs up to four forwards of the model per sampling step."""
    prompts_file: PathText | None = None
    """Text file with a prompt in every line, each of which is sampled after `samples`; empty lines and those that begin
    with # are skipped. Read with the job, whose resolved form lists the prompts under `samples`."""
    dataset_samples: Annotated[int, Field(ge=0)] = 0
    """Further clips whose caption, size and conditioned parts (first frame, mask, reference, ...) are those of prepared
    samples, evenly spaced over `held_out_root`, or else over `data.root`."""
    negative_prompt: str | None = None
    """Negative prompt of all samples; unset means the list of defects of the released pipelines."""
    video_dims: Dims = (960, 544, 89)
    """[width, height, frames] in pixels; smaller is faster and looks worse than the model can do."""
    frame_rate: FrameRate = 24.0
    """Frames per second."""
    seed: Seed = 42
    """Seed of the noise; the same in every validation, so that clips can be compared."""
    inference_steps: Positive | None = None
    """Sampling steps; unset means 30, or 8 with the distilled schedule, which supports no other number."""
    schedule: Literal["auto", "standard", "distilled"] = "auto"
    """`distilled` is that of distilled checkpoints, which also need CFG and modality scales of 1 and STG scales of 0.
    `auto` sets all of that if the name of the checkpoint's file contains "distilled", for scales that are left at their
    defaults, with `euler_ancestral` for LTX-2.5; otherwise it is `standard`."""
    stepper: Literal["euler", "euler_ancestral"] = "euler"
    """`euler_ancestral` adds noise in every step, as the distilled models of LTX-2.5 expect."""
    video_cfg_scale: GuidanceScale = 3.0
    """Classifier-free guidance scale of the video; 1 skips the unconditional pass."""
    audio_cfg_scale: GuidanceScale = 7.0
    """Classifier-free guidance scale of the audio; 1 skips the unconditional pass."""
    video_stg_scale: NonNegative = 1.0
    """Spatio-temporal guidance scale of the video: weight of the difference from a pass without some self-attentions;
    0 skips that pass."""
    audio_stg_scale: NonNegative = 1.0
    """Spatio-temporal guidance scale of the audio."""
    stg_blocks: Annotated[tuple[int, ...], Field(strict=False)] | Literal["all"] | None = None
    """Blocks whose self-attention that pass skips: [29] for LTX-2; unset means [28], or the last of a small model."""
    guidance_rescale: Fraction = 0.7
    """Rescales the standard deviation of a guided prediction towards that of the conditional one; 0 disables it."""
    video_modality_guidance_scale: GuidanceScale = 3.0
    """Strength with which the video follows the audio; 1 skips the pass without cross-modal attention."""
    audio_modality_guidance_scale: GuidanceScale = 3.0
    """Strength with which the audio follows the video; 1 skips the pass without cross-modal attention."""
    generate_video: bool | None = None
    """Unset generates video if the job has a [video] section."""
    generate_audio: bool | None = None
    """Unset generates audio if the job has an [audio] section."""
    tokens_at_once: Positive = 65536
    """Maximum number of tokens per forward: guidance passes are batched up to it; lower needs less memory."""
    use_ema: bool = False
    """Sample with the weights averaged by `optimizer.ema_decay`; the held-out loss uses the trained ones."""
    offload_optimizer: bool = False
    """Move the optimizer state to the host while sampling; slower, for when a decoder does not fit next to it."""
    vae_tiling: bool = True
    """Decode in overlapping tiles: less memory, faint seams."""
    text_encoder_path: PathText | None = None
    """Folder of the text encoder; prompts are encoded once before training, then it is freed."""
    video_vae_path: PathText | None = None
    """File of the video VAE (split packs); unset means `model.checkpoint_path`."""
    audio_vae_path: PathText | None = None
    """File of the audio VAE (split packs); unset means `model.checkpoint_path`."""
    upscaler: PathText | None = None
    """File of a spatial upscaler (`ltx-2.3-spatial-upscaler-x2-...`): clips are sampled at the fraction of `video_dims`
    that it undoes, upscaled, and refined in three steps at full size, as in the released two-stage pipelines."""
    loras: Annotated[tuple[SampleLoRA, ...], Field(strict=False)] = ()
    """LoRAs that are added to the weights while sampling, such as the distilled one, or a style that the trained one is
    to be combined with; the held-out loss is without them. Each rank keeps a copy of its changed weights in host memory
    for that time, so that training resumes with the same bits."""
    held_out_root: PathText | None = None
    """Preprocessed dataset that is not trained on, for a loss curve without the noise of random sigmas."""
    held_out_samples: Positive = 16
    """Number of its samples that are used."""
    held_out_sigmas: Annotated[tuple[Sigma, ...], Field(strict=False, min_length=1)] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Sigmas of the held-out loss; each costs one forward per sample."""
    quality: QualitySection = QualitySection()
    """Scores of the sampled clips."""

    @property
    def has_figures(self) -> bool:
        """Whether a validation has numbers to log, not only clips."""
        return self.held_out_root is not None or bool(self.quality.metrics)

    def dims_of(self, sample: ValidationSample) -> tuple[int, int, int]:
        """Width, height and frames of a sample."""
        return self.video_dims if sample.video_dims is None else sample.video_dims

    def seed_of(self, sample: ValidationSample) -> int:
        """Seed of a sample."""
        return self.seed if sample.seed is None else sample.seed

    @model_validator(mode="before")
    @classmethod
    def _read_prompts(cls, table: Any) -> Any:
        if not isinstance(table, dict) or not isinstance(path := table.get("prompts_file"), str):
            return table
        try:
            # Not splitlines(): it also splits at U+0085, U+2028 and U+2029, which prompts may hold.
            lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"prompts_file = {path!r}: expected a text file in UTF-8, found: {reason}; correct the path or the file"
            ) from error
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not prompts:
            raise ValueError(f"prompts_file = {path!r}: expected a prompt in a line, found none; add one")
        # The prompts themselves are kept, so that a resolved job repeats the run without the file.
        samples = [*table.get("samples", ()), *({"prompt": prompt} for prompt in prompts)]
        return {**table, "samples": samples, "prompts_file": None}

    @model_validator(mode="after")
    def _has_work_to_do(self) -> Self:
        # Unset values depend on the job's streams; only an explicit pair of false is known to be wrong here.
        if self.samples and self.generate_video is False and self.generate_audio is False:
            raise ValueError("generate_video and generate_audio are both false; set one to true, or remove samples")
        if self.interval is not None and not (self.samples or self.dataset_samples) and self.held_out_root is None:
            raise ValueError(
                "interval is set, but there is nothing to do; add samples, dataset_samples or held_out_root"
            )
        return self

    @field_validator("stg_blocks", mode="before")
    @classmethod
    def _no_empty_list(cls, blocks: Any) -> Any:
        if isinstance(blocks, list | tuple) and not blocks:
            raise ValueError("stg_blocks is empty; to skip that pass, set video_stg_scale and audio_stg_scale to 0")
        return blocks
