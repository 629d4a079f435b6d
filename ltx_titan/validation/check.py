"""Checks a job's `[validation]` before training starts, so that it does not fail in the middle of it.

These checks need what the section alone does not have: the codec's compression factors, the number of blocks and the
file system.
"""

from collections.abc import Iterator
from pathlib import Path

from ltx_titan.conditioning import Grid, video_grid
from ltx_titan.conditioning.conditioned import span_bounds
from ltx_titan.config.streams import Span
from ltx_titan.config.validation import (
    AudioToVideo,
    SampleCondition,
    SampleFirstFrame,
    SampleKeyframe,
    SampleMask,
    SamplePrefix,
    SampleReference,
    SampleSuffix,
    ValidationSample,
    ValidationSection,
)
from ltx_titan.diffusion import distilled_schedule
from ltx_titan.validation.quality import quality_problems

_STG_BLOCK = 28

NO_GUIDANCE = {
    "video_cfg_scale": 1.0,
    "audio_cfg_scale": 1.0,
    "video_stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "video_modality_guidance_scale": 1.0,
    "audio_modality_guidance_scale": 1.0,
}
"""Keys of `[validation]` with which no guidance pass is computed."""


def check_validation(
    section: ValidationSection,
    *,
    has_video: bool,
    has_audio: bool,
    num_blocks: int,
    scale_factors: tuple[int, int, int],
) -> None:
    """Checks the section against the model and the files on this machine.

    Args:
        section: the job's `[validation]`.
        has_video: whether the model has the video stream.
        has_audio: whether the model has the audio stream.
        num_blocks: transformer blocks of the model.
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: the section does not fit; one line per problem.
    """
    # All problems at once: finding them one by one would cost a start of the job each.
    problems = list(_section_problems(section, has_video, has_audio, num_blocks))
    scale = 1.0
    if section.upscaler is not None:
        # Here, because it imports diffusers.
        from ltx_titan.codecs import upscaler_scale

        try:
            scale = upscaler_scale(section.upscaler)
        except (OSError, ValueError) as error:
            problems.append(f"validation.upscaler: {error}")
    for index, sample in enumerate(section.samples):
        problems += [
            f"validation.samples[{index}]{problem}"
            for problem in _sample_problems(section, sample, has_video, has_audio, scale_factors, scale)
        ]
    if problems:
        raise ValueError("\n".join(problems))


def with_stg_blocks(section: ValidationSection, num_blocks: int) -> ValidationSection:
    """Fills in an unset `stg_blocks`: that of the released pipelines for LTX-2.3, or the last one of a small model."""
    if section.stg_blocks is not None:
        return section
    return section.model_copy(update={"stg_blocks": (min(_STG_BLOCK, num_blocks - 1),)})


def with_schedule(section: ValidationSection, path: str | Path | None, version: str | None) -> ValidationSection:
    """Chooses schedule, guidance and stepper of `schedule = "auto"` by the kind of the checkpoint.

    Headers do not state whether a checkpoint is distilled; the names of all released files do.

    Args:
        section: the job's `[validation]`.
        path: of the checkpoint; None for random weights.
        version: of the model in its header, such as "2.5.0"; None if it states none.
    """
    if section.schedule != "auto":
        return section
    if path is None or "distilled" not in Path(path).name.lower():
        return section.model_copy(update={"schedule": "standard"})
    changes: dict[str, object] = {"schedule": "distilled"}
    # Compared with defaults instead of `model_fields_set`: a resolved job spells all defaults out.
    fields = ValidationSection.model_fields
    changes |= {key: value for key, value in NO_GUIDANCE.items() if getattr(section, key) == fields[key].default}
    # The released pipelines of LTX-2.5 and later add noise in every step of their distilled models.
    major, _, minor = (version or "0.0").partition(".")
    numbers = [int(part) if part.isdecimal() else 0 for part in (major, minor.partition(".")[0])]
    if section.stepper == fields["stepper"].default and numbers >= [2, 5]:
        changes["stepper"] = "euler_ancestral"
    return section.model_copy(update=changes)


def generated_streams(
    section: ValidationSection, sample: ValidationSample, has_video: bool, has_audio: bool
) -> tuple[str, ...]:
    """Names of the streams that a sample generates; a frozen stream is not one of them."""
    # Unset means every stream of the model.
    wanted = {
        "video": has_video if section.generate_video is None else section.generate_video,
        "audio": has_audio if section.generate_audio is None else section.generate_audio,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted and name != sample.frozen_stream)


def _section_problems(section: ValidationSection, has_video: bool, has_audio: bool, num_blocks: int) -> Iterator[str]:
    for name, has_stream in (("video", has_video), ("audio", has_audio)):
        if getattr(section, f"generate_{name}") and not has_stream:
            yield (
                f"validation.generate_{name} is true, but the model is built without {name}; remove it, "
                f"or add a [{name}] section."
            )
    # A block beyond the model is skipped nowhere: STG would subtract a prediction from itself.
    has_samples = bool(section.samples or section.dataset_samples)
    blocks = section.stg_blocks
    if has_samples and (section.video_stg_scale or section.audio_stg_scale) and isinstance(blocks, tuple):
        beyond = [block for block in blocks if not 0 <= block < num_blocks]
        if beyond:
            yield (
                f"validation.stg_blocks has {beyond}, but the model's blocks are 0 to {num_blocks - 1}; choose from "
                "these, or set video_stg_scale and audio_stg_scale to 0."
            )
    # A distilled model was trained on these sigmas alone, so another number of steps has no meaning.
    own_steps = len(distilled_schedule()) - 1
    if section.schedule == "distilled" and section.inference_steps not in (None, own_steps):
        yield (
            f"validation.inference_steps is {section.inference_steps}, but the distilled schedule has {own_steps} "
            "steps; remove it, or set validation.schedule to standard."
        )
    # Unset is fine while all prompts are cached, which the engine finds out; a wrong path is wrong either way.
    if has_samples and section.text_encoder_path is not None:
        # Here, because it imports transformers and diffusers: 5 s that a job without validation saves on every rank.
        from ltx_titan.codecs import text_encoder_config

        try:
            text_encoder_config(section.text_encoder_path)
        except ValueError as error:
            yield f"validation.text_encoder_path: {error}"
    yield from quality_problems(section.quality)
    if section.held_out_root is not None and not Path(section.held_out_root).is_dir():
        yield f"validation.held_out_root is {section.held_out_root!r}, which is not a folder; correct the path."
    for name in ("video_vae_path", "audio_vae_path"):
        path = getattr(section, name)
        if path is not None and not Path(path).is_file():
            yield f"validation.{name} is {path!r}, which is not a file; correct the path."


def _sample_problems(
    section: ValidationSection,
    sample: ValidationSample,
    has_video: bool,
    has_audio: bool,
    scale_factors: tuple[int, int, int],
    scale: float,
) -> Iterator[str]:
    generated = generated_streams(section, sample, has_video, has_audio)
    if not generated:
        yield ": no stream is generated; set generate_video or generate_audio, or remove the condition on all of it."
    width, height, frames = section.dims_of(sample)
    try:
        grid = video_grid(frames, height, width, scale_factors)
    except ValueError as error:
        # The remaining checks need a valid grid.
        yield f".video_dims: {error}"
        return
    rows, columns = scale_factors[1] * scale, scale_factors[2] * scale
    if height % rows or width % columns:
        yield (
            f".video_dims: {width}x{height} pixels; validation.upscaler, which scales by {scale:g}, needs multiples of "
            f"{columns:g}x{rows:g}."
        )
        return
    has_stream = {"video": has_video, "audio": has_audio}
    for index, condition in enumerate(sample.conditions):
        where = f".conditions[{index}] ({condition.type})"
        stream = condition.stream
        if not has_stream[stream]:
            yield f"{where} conditions the {stream}, but the model is built without it; add a [{stream}] section."
        # A condition on a stream that is neither would be dropped in silence.
        elif stream not in (*generated, sample.frozen_stream):
            yield f"{where} conditions the {stream}, which is not generated; set generate_{stream}."
        for path in _files(condition):
            if not Path(path).is_file():
                yield f"{where}: {path!r} is not a file; correct the path."
        # The smaller size of the first stage is what may not divide.
        coarse = int(width / scale), int(height / scale), frames
        for problem in _size_problems(condition, grid, coarse, scale_factors):
            yield f"{where}: {problem}"


def _files(condition: SampleCondition) -> tuple[str, ...]:
    match condition:
        case SampleFirstFrame() | SampleKeyframe():
            return (condition.image_or_video,)
        case AudioToVideo():
            return (condition.audio,)
        case SampleMask():
            return (getattr(condition, condition.stream), condition.mask)
        case _:
            return (getattr(condition, condition.stream),)


def _size_problems(
    condition: SampleCondition, grid: Grid, dims: tuple[int, int, int], scale_factors: tuple[int, int, int]
) -> Iterator[str]:
    time, vertical, horizontal = scale_factors
    width, height, frames = dims
    # A causal video VAE encodes frame 0 alone and each further `time` frames as one latent frame, so a prefix holds
    # 1 + n * time frames and a suffix, which does not contain frame 0, n * time.
    match condition:
        case SampleKeyframe(at=at, length=length):
            first, stop = span_bounds(Span(at, length), grid.frames)
            if first < 0 or stop > grid.frames:
                yield (
                    f"at = {at!r} with length {length} covers latent frames {first} to {stop - 1}; expected frames "
                    f"within 0 to {grid.frames - 1} ({frames} pixel frames)."
                )
        case SamplePrefix(num_frames=int(count)) if (count - 1) % time or count > frames:
            yield f"num_frames is {count}; expected 1 + a multiple of {time}, at most {frames}, for a prefix."
        case SampleSuffix(num_frames=int(count)) if count % time or count > frames:
            yield f"num_frames is {count}; expected a multiple of {time}, at most {frames}, for a suffix."
        case SampleReference(video=str(), downscale_factor=space, temporal_scale_factor=every):
            if height % (space * vertical) or width % (space * horizontal):
                yield (
                    f"downscale_factor {space} reduces {width}x{height} pixels to {width / space:g}x"
                    f"{height / space:g}; expected multiples of {horizontal}x{vertical}."
                )
            # Frame 0 is kept, then every n-th one; what is left must be encodable, too.
            if (frames - 1) % every or (frames - 1) // every % time:
                yield (
                    f"temporal_scale_factor {every} reduces {frames} frames to 1 + {(frames - 1) / every:g}; expected "
                    f"1 + a multiple of {time}."
                )
