"""Sampled clips of a job: prepared once before training, then sampled, decoded and written at every validation.

    prepare_validation   encodes media and prompts to initial latents and contexts on the host; frees the encoders
    Validation.run       sample -> decode -> files and previews

Every rank calls both. The first rank of a data-parallel group decodes and writes the samples of its group; rank 0
gathers the previews of all groups.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ltx_titan.codecs import load_audio_codec, load_upscaler, load_video_codec, upscaler_scale
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.config.validation import ValidationSample, ValidationSection
from ltx_titan.diffusion import StepReport
from ltx_titan.model import TransformerConfig
from ltx_titan.optim.sharding import reshard
from ltx_titan.validation.check import check_validation, generated_streams, with_stg_blocks
from ltx_titan.validation.decode import (
    DecodedSample,
    Decoders,
    codec_dtype,
    decode_sample,
    load_decoders,
    side_by_side,
    write_sample,
)
from ltx_titan.validation.encode import (
    ClipShape,
    EncodedSample,
    Encoders,
    encode_sample,
    needed_encoders,
    scaled_down,
)
from ltx_titan.validation.offload import offloaded
from ltx_titan.validation.preview import Preview, make_preview, wandb_media, write_contact_sheet, write_preview
from ltx_titan.validation.prompts import PromptContext, default_negative_prompt, prompt_contexts
from ltx_titan.validation.quality import QualityClip, score_clips
from ltx_titan.validation.sampling import (
    Contexts,
    PreparedSample,
    SampledLatents,
    SampleGroups,
    guidance_of,
    sample_all,
)
from ltx_titan.weights import fused_loras, scale_factors

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodecFiles:
    """Files that codecs are loaded from."""

    video: Path
    audio: Path


@dataclass(frozen=True)
class SampledFile:
    """One finished sample: its index in the job, its prompt, its file, its preview and its scores by metric."""

    index: int
    prompt: str
    path: Path
    preview: Preview
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """Name of the sample in TensorBoard and W&B, and stem of its file."""
        return f"sample-{self.index + 1:02d}"


@dataclass(frozen=True)
class DatasetSample:
    """A sample whose conditions and caption come from prepared data.

    Attributes:
        title: its name.
        encoded: starts of its streams.
        shape: its size.
        contexts: contexts of its caption for video and audio [1, T, D].
    """

    title: str
    encoded: EncodedSample
    shape: ClipShape
    contexts: PromptContext


@dataclass(frozen=True)
class Validation:
    """The prepared samples of a job; those of other groups are None.

    Attributes:
        section: the job's `[validation]`.
        titles: prompts of all samples; names of samples that come from a dataset.
        samples: initial latents and contexts.
        encoded: encoded conditions, with the frames of references that are shown next to results.
        shapes: sizes of all samples, those of other groups too.
        negative: contexts of the negative prompt for video and audio; None without one.
        files: files of the decoders.
        device: device of the model.
        groups: distribution of the samples over data-parallel groups.
    """

    section: ValidationSection
    titles: tuple[str, ...]
    samples: tuple[PreparedSample | None, ...]
    encoded: tuple[EncodedSample | None, ...]
    shapes: tuple[ClipShape, ...]
    negative: PromptContext | None
    files: CodecFiles
    device: torch.device | str
    groups: SampleGroups

    def with_dataset_samples(self, found: Sequence["DatasetSample"]) -> Self:
        """Appends samples whose conditions come from prepared data; every rank passes the same ones."""
        samples: list[PreparedSample | None] = list(self.samples)
        encoded: list[EncodedSample | None] = list(self.encoded)
        for sample in found:
            is_own = len(samples) % self.groups.size == self.groups.rank
            contexts = Contexts(*sample.contexts, *(self.negative or (None, None)))
            streams = sample.encoded.video, sample.encoded.audio
            samples.append(PreparedSample(*streams, contexts, self.section.seed) if is_own else None)
            encoded.append(sample.encoded if is_own else None)
        return replace(
            self,
            titles=(*self.titles, *(sample.title for sample in found)),
            samples=tuple(samples),
            encoded=tuple(encoded),
            shapes=(*self.shapes, *(sample.shape for sample in found)),
        )

    def run(
        self,
        model: nn.Module,
        folder: str | Path,
        step: int,
        *,
        writer: SummaryWriter | None = None,
        wandb_run: "Run | None" = None,
        averaged_weights: Callable[[], AbstractContextManager] | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        on_step: Callable[[StepReport], None] | None = None,
    ) -> list[SampledFile]:
        """Samples, decodes and writes every clip; a collective call.

        Args:
            model: the transformer as it is trained.
            folder: output folder of `sample-01.mp4` (`.png`, `.wav`) and so on, and of `contact-sheet.png`.
            step: optimizer step, for TensorBoard and W&B.
            writer: TensorBoard writer, on rank 0.
            wandb_run: Weights & Biases run, on rank 0.
            averaged_weights: returns a context in which the model has its averaged weights; required with `use_ema`.
            optimizers: optimizers whose state is offloaded with `offload_optimizer`; not the averaged weights.
            on_step: called after each sampling step of this rank's samples, for a progress bar.

        Returns:
            All samples on rank 0, the samples that this rank wrote on other ranks.

        Raises:
            ValueError: `use_ema` is set and the job has no averaged weights.
        """
        with ExitStack() as stack:
            for optimizer in optimizers if self.section.offload_optimizer else ():
                # First, so that averaged weights and activations find the memory free.
                stack.enter_context(offloaded(optimizer))
            if self.section.use_ema:
                if averaged_weights is None:
                    raise ValueError("validation.use_ema is true, but the job has no averaged weights; remove it.")
                # Weights that FSDP2 gathered for the last forward would shadow the averaged ones.
                reshard(model)
                stack.enter_context(averaged_weights())
            if self.section.loras:
                reshard(model)  # as above
                loras = [(lora.path, lora.strength) for lora in self.section.loras]
                stack.enter_context(fused_loras(model, loras))
            latents = self.sample(model, on_step)
            # Within the stack: decoders use the memory of the optimizer state as well.
            written = self.write(latents, folder) if self.groups.is_first else []
        found = gather_samples(written, self.groups)
        if self.groups.is_first and self.groups.rank == 0 and found:
            write_contact_sheet(Path(folder) / "contact-sheet.png", [(s.prompt, s.preview) for s in found])
        if writer is not None:
            for sample in found:
                write_preview(writer, sample.tag, sample.prompt, sample.preview, step)
            writer.flush()
        if wandb_run is not None:
            with wandb_media((s.tag, s.prompt, s.path, s.preview) for s in found) as media:
                wandb_run.log({**media, "step": step})
        return found

    def sample(
        self, model: nn.Module, on_step: Callable[[StepReport], None] | None = None
    ) -> dict[int, SampledLatents]:
        """Samples this rank's share; returns latents by sample index. A collective call."""
        upsampler = None
        if self.section.upscaler is not None:
            # On every rank: those of a group sample the same clip. Loaded for each validation, as decoders are.
            upsampler = load_upscaler(self.section.upscaler, self.files.video, self.device, codec_dtype(self.device))
        found = sample_all(
            model, self.samples, self.section, self.device, self.groups, self._announce, on_step, upsampler
        )
        del upsampler
        free_device_memory()
        return found

    def write(self, latents: Mapping[int, SampledLatents], folder: str | Path) -> list[SampledFile]:
        """Decodes samples, writes their files and scores them; decoders are loaded for it and freed."""
        if not latents:
            return []
        decoders = load_decoders(
            # Each decoder only if a sample of this rank needs it: a few GB of reading less.
            self.files.video if any(found.video is not None for found in latents.values()) else None,
            self.files.audio if any(found.audio is not None for found in latents.values()) else None,
            self.device,
            self.section.vae_tiling,
            [found.video.shape for found in latents.values() if found.video is not None],
        )
        written, clips = [], []
        for index, found in latents.items():
            file, decoded = self._write_one(index, found, decoders, folder)
            written.append(file)
            # Samples of a dataset have a title and no prompt.
            if self.section.quality.metrics and index < len(self.section.samples):
                clips.append(QualityClip.from_decoded(index, self.titles[index], decoded, self.section.quality))
        del decoders
        free_device_memory()
        if not clips:
            return written
        scores = score_clips(self.section.quality, clips, self.device)
        return [replace(file, scores=scores.get(file.index, {})) for file in written]

    def _write_one(
        self, index: int, latents: SampledLatents, decoders: Decoders, folder: str | Path
    ) -> tuple[SampledFile, DecodedSample]:
        """Writes a sample; returns its file, and what was generated without the reference beside it."""
        sample, shape, encoded = self.samples[index], self.shapes[index], self.encoded[index]
        assert sample is not None and encoded is not None, f"sample {index} was sampled by another group"
        decoded = generated = decode_sample(latents, decoders, sample.seed)
        reference = encoded.reference_frames
        if encoded.reference_latents is not None:
            reference = decode_sample(SampledLatents(encoded.reference_latents, None), decoders, sample.seed).frames
        if reference is not None and decoded.frames is not None:
            frames = side_by_side(reference, decoded.frames, encoded.reference_temporal_scale)
            decoded = DecodedSample(frames, decoded.audio)
        path = write_sample(folder, f"sample-{index + 1:02d}", decoded, shape.fps)
        return SampledFile(index, self.titles[index], path, make_preview(decoded, shape.fps)), generated

    def _announce(self, index: int) -> None:
        logger.info("sampling %d of %d: %s", index + 1, len(self.samples), self.titles[index])


def prepare_validation(
    section: ValidationSection,
    *,
    checkpoint_path: str | Path,
    config: Mapping[str, Any],
    modalities: str,
    device: torch.device | str,
    cache_folder: str | Path,
    groups: SampleGroups | None = None,
    contexts: Mapping[str, PromptContext] | None = None,
    connectors_path: str | Path | None = None,
) -> Validation:
    """Checks the section, encodes prompts and media, and frees the encoders; a collective call.

    Args:
        section: the job's `[validation]`.
        checkpoint_path: official file with the text projection, the connectors and, unless the section names others,
            the VAEs and the vocoder.
        config: config object of the checkpoint's metadata.
        modalities: streams of the model: `av`, `video` or `audio`.
        device: device of encoders and decoders.
        cache_folder: folder of cached prompt contexts.
        groups: distribution of the samples over data-parallel groups; None for a single process.
        contexts: contexts of prompts that are already encoded.
        connectors_path: file of the text connectors; None: the checkpoint.

    Raises:
        ValueError: the section does not fit the model, or a file cannot be used.
    """
    groups = groups or SampleGroups()
    architecture = TransformerConfig.from_metadata(config["transformer"])
    has_video, has_audio = modalities != "audio", modalities != "video"
    factors = scale_factors(dict(config))
    check_validation(
        section,
        has_video=has_video,
        has_audio=has_audio,
        num_blocks=architecture.num_layers,
        scale_factors=factors,
    )
    section = with_stg_blocks(section, architecture.num_layers)
    files = CodecFiles(Path(section.video_vae_path or checkpoint_path), Path(section.audio_vae_path or checkpoint_path))
    shapes = tuple(ClipShape(*section.dims_of(sample), section.frame_rate) for sample in section.samples)
    # Prompts before codecs, so that the text encoder has the device to itself. All groups take part: rank 0 encodes for
    # all.
    known = _contexts(section, contexts, checkpoint_path, connectors_path, cache_folder, device)
    # Conditions are encoded only by the group that samples them: they can be large, and groups may be many.
    own = {index: section.samples[index] for index in range(groups.rank, len(section.samples), groups.size)}
    wants_video, wants_audio = needed_encoders(tuple(own.values()))
    encoders = Encoders(
        load_video_codec(files.video, device, codec_dtype(device), part="encoder") if wants_video else None,
        load_audio_codec(files.audio, device, part="encoder") if wants_audio else None,
        factors,
        architecture.keyframe_embedding,
    )
    # Lists of all samples with gaps: an index means the same clip on every rank.
    samples: list[PreparedSample | None] = [None] * len(shapes)
    encoded: list[EncodedSample | None] = [None] * len(shapes)
    for index, sample in own.items():
        streams = _streams(section, sample, has_video, has_audio)
        start = encoded[index] = encode_sample(sample, shapes[index], streams, encoders)
        coarse = None
        if section.upscaler is not None and start.video is not None:
            scale = upscaler_scale(section.upscaler)
            coarse = encode_sample(scaled_down(sample, scale), shapes[index].scaled_down(scale), streams, encoders)
        samples[index] = PreparedSample(
            start.video,
            start.audio,
            _contexts_of(section, sample, known),
            section.seed_of(sample),
            None if coarse is None else coarse.video,
        )
    # Freed here: in training the model is loaded next and needs the memory.
    del encoders
    free_device_memory()
    negative = _negative_prompt(section)
    return Validation(
        section,
        tuple(sample.prompt for sample in section.samples),
        tuple(samples),
        tuple(encoded),
        shapes,
        None if negative is None else known[negative],
        files,
        device,
        groups,
    )


def _streams(section: ValidationSection, sample: ValidationSample, has_video: bool, has_audio: bool) -> tuple[str, ...]:
    """Streams of the model's input: the generated ones, and a frozen one."""
    generated = generated_streams(section, sample, has_video, has_audio)
    return generated if sample.frozen_stream is None else (*generated, sample.frozen_stream)


def _negative_prompt(section: ValidationSection) -> str | None:
    """The negative prompt; None if no guidance needs it."""
    if not any(guidance.needs_uncond for guidance in guidance_of(section)):
        return None
    # An empty string is a negative prompt, too, and not the default.
    return default_negative_prompt() if section.negative_prompt is None else section.negative_prompt


def _contexts(
    section: ValidationSection,
    known: Mapping[str, PromptContext] | None,
    checkpoint_path: str | Path,
    connectors_path: str | Path | None,
    cache_folder: str | Path,
    device: torch.device | str,
) -> dict[str, PromptContext]:
    known = dict(known or {})
    negative = _negative_prompt(section)
    wanted = [sample.prompt for sample in section.samples] + ([] if negative is None else [negative])
    missing = [prompt for prompt in wanted if prompt not in known]
    if missing:
        known |= prompt_contexts(
            missing,
            checkpoint_path=checkpoint_path,
            text_encoder_path=section.text_encoder_path,
            cache_folder=cache_folder,
            device=device,
            connectors_path=connectors_path,
        )
    return known


def _contexts_of(section: ValidationSection, sample: ValidationSample, known: Mapping[str, PromptContext]) -> Contexts:
    negative = _negative_prompt(section)
    video, audio = known[sample.prompt]
    negative_video, negative_audio = (None, None) if negative is None else known[negative]
    return Contexts(video, audio, negative_video, negative_audio)


def gather_samples(written: list[SampledFile], groups: SampleGroups) -> list[SampledFile]:
    """Gathers the samples of all groups on the first rank of the first group, in order of their index."""
    if groups.size == 1 or not groups.is_first:
        return sorted(written, key=lambda sample: sample.index)
    gathered: list[list[SampledFile]] | None = [[] for _ in range(groups.size)] if groups.rank == 0 else None
    # Previews are a few MB, so pickling them is cheap; clips stay where they were written.
    dist.gather_object(written, gathered, group=groups.process_group, group_dst=0)
    return sorted((s for part in gathered or [written] for s in part), key=lambda sample: sample.index)
