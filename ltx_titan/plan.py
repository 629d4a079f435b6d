"""Resolves and validates a job on the host, before a process group is created or a device touched.

Reads the checkpoint's header and the shapes of all samples, and checks that model, data, conditions and mesh fit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from ltx_titan.common.tensors import on_meta
from ltx_titan.conditioning import FlexibleStrategy, check_text
from ltx_titan.conditioning.sources import (
    DataPart,
    check_part,
    check_trigger_word,
    common_reference_scale,
    open_prepared,
)
from ltx_titan.config import Degrees, JobConfig, check_world
from ltx_titan.config.streams import Reference
from ltx_titan.data import (
    BatchPlan,
    MixedDataset,
    PrecomputedDataset,
    ShapeKey,
    stores_text_features,
    stream_tokens,
    token_counts,
)
from ltx_titan.data.bad_samples import SkippingDataset
from ltx_titan.diffusion import sigma_sampler
from ltx_titan.lora import adapter_weights, apply_lora, check_ranks
from ltx_titan.model import LTXTransformer, TransformerConfig
from ltx_titan.model.flops import training_flops
from ltx_titan.model.ops import TORCH, Operators
from ltx_titan.model.transformer import Modalities
from ltx_titan.nano.synthetic import SyntheticDataset
from ltx_titan.optim import check_groups, freeze_groups
from ltx_titan.optim.sharding import cuts_blocks
from ltx_titan.parallel.graphs import obstacle
from ltx_titan.parallel.limits import check_parallelism, check_sharding
from ltx_titan.weights import (
    ModelSource,
    build_connectors,
    check_fits,
    check_lora,
    find_connectors,
    read_metadata,
    read_source,
    refuse_quantized,
    scale_factors,
    unused_by,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ltx_titan.encode.media_dataset import MediaDataset

# Combinations of shapes above which compilation takes an hour or more.
_MANY_SHAPES = 64

Dataset: TypeAlias = "PrecomputedDataset | SyntheticDataset | MediaDataset | SkippingDataset | MixedDataset"


@dataclass(frozen=True)
class Plan:
    """A checked job.

    Attributes:
        job: the job file with its overrides.
        degrees: sizes of the mesh axes.
        source: config and file of the transformer.
        architecture: sizes and options of the transformer.
        modalities: streams that the transformer has.
        strategy: turns batches into inputs and predictions into a loss, with the conditions of [video] and [audio].
        dataset: the samples.
        parts: of the dataset, each with its conditions: the sources, or the whole.
        batches: samples of each global batch.
        connectors_path: file of the text connectors; None if the data holds finished contexts.
        reference_scale: (spatial, temporal) factors of the video references; None without references.
    """

    job: JobConfig
    degrees: Degrees
    source: ModelSource
    architecture: TransformerConfig
    modalities: Modalities
    strategy: FlexibleStrategy
    dataset: Dataset
    parts: tuple[DataPart, ...]
    batches: BatchPlan
    connectors_path: Path | None
    reference_scale: tuple[int, int] | None

    @property
    def folder(self) -> Path:
        """The job's dump folder."""
        return Path(self.job.job.dump_folder)

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.job.training.stop_at or self.job.training.steps

    @property
    def exports(self) -> bool:
        """Whether the job ends with an export."""
        return self.job.checkpoint.enable and self.job.checkpoint.export

    @property
    def num_shapes(self) -> int:
        """Combinations of shapes that a forward in training can have, each of which is compiled.

        A batch has 1 to `local_batch_size` samples of one shape; a reference lengthens it in some steps only.
        """
        strategies = [part.strategy for part in self.parts]
        conditions = [[c for block in strategy.blocks.values() for c in block.conditions] for strategy in strategies]
        occasional = max(sum(isinstance(c, Reference) and 0 < c.probability < 1 for c in own) for own in conditions)
        return self.batches.num_shapes * self.job.training.local_batch_size * 2**occasional

    def export_path(self, step: int) -> Path:
        """File of the export of `step`."""
        return self.folder / "export" / export_name(self.job, step)

    def part_of(self, index: int) -> DataPart:
        """The part of the dataset that a sample belongs to; all samples of a forward have equal strategies."""
        return next(part for part in self.parts if index in part.indices)

    def drawn(self, num_batches: int) -> dict[str, tuple[int, float]]:
        """Samples and epochs of each source in the first global batches of the run; empty without sources."""
        counts = self.batches.drawn(num_batches)
        parts = [part for part in self.parts if part.name]
        return {part.name: (count, count / len(part.indices)) for part, count in zip(parts, counts, strict=False)}

    def sample_flops(self, index: int) -> float:
        """Model FLOPs of a training step on one sample of the dataset."""
        tokens = stream_tokens(self.dataset.shape_key(index), self.modalities)
        step = training_flops(self.architecture, **vars(tokens), trained=self.job.model.mode)
        parts = self.job.preservation.parts
        if not parts:
            return step
        base = training_flops(self.architecture, **vars(tokens), trained="none")
        return step * self.job.preservation.passes + base * len(parts)

    def sample_tokens(self, index: int) -> int:
        """Video and audio tokens of one sample, references included."""
        return sum(token_counts(self.dataset.shape_key(index)).values())


def plan_job(job: JobConfig, world_size: int) -> Plan:
    """Checks a job against the number of ranks, its checkpoint and its data.

    Raises:
        ValueError: something does not fit; the message names the file, key or tensor, and the remedy.
    """
    # The cheapest checks come first: these read no file.
    degrees = check_world(job, world_size)
    model = job.model
    source = read_source(model.checkpoint_path if model.init == "checkpoint" else None, model.shape, model.num_layers)
    if source.path is not None and model.mode == "full":
        # Rounding to 8 or 4 bits is not undone by training; only a frozen base may be quantized.
        refuse_quantized(read_metadata(source.path))
    modalities = trained_modalities(job)
    # Built on the meta device for its check of names and shapes; the trainer builds its own.
    transformer = build_transformer(source, modalities)
    architecture = transformer.config
    check_parallelism(
        degrees,
        architecture,
        modalities,
        recompute=job.activation_checkpoint.mode,
        k=job.activation_checkpoint.k or 1,
        offload=job.activation_checkpoint.offload,
        float8=job.float8.recipe,
        float8_all_gather=job.float8.all_gather,
        dora=model.mode == "lora" and job.lora.dora,
        stream_blocks=0 if job.parallelism.stream_blocks == "auto" else job.parallelism.stream_blocks,
    )
    if model.mode == "lora":
        # Targets without a match and widths that a quantized base does not support are refused here.
        check_ranks(apply_lora(transformer, job.lora), job.lora)
        if model.adapter_path is not None:
            check_lora(adapter_weights(transformer), model.adapter_path)
    check_groups(transformer, job.optimizer.groups)
    freeze_groups(transformer, job.optimizer.groups)
    check_sharding(
        transformer,
        degrees,
        float8=job.float8.recipe,
        float8_all_gather=job.float8.all_gather,
        float8_skip_blocks=job.float8.skip_blocks,
        cuts_moments=cuts_blocks if job.optimizer.name in ("adamw8bit", "adamw4bit") else None,
    )
    # Whatever the machine, such as one without a GPU that estimates the job.
    if job.compile.graphs == "on" and (reason := obstacle(job, degrees, torch.device("cuda"))) is not None:
        raise ValueError(f"compile.graphs = 'on': {reason}; set compile.graphs to 'auto' or 'off'.")
    factors = scale_factors(source.config)
    strategy = FlexibleStrategy.from_config(
        {"name": "flexible", "video": job.video, "audio": job.audio}, factors, architecture.keyframe_embedding
    )
    for stream in strategy.blocks:
        # Raises if a range of [sigma] leaves nothing to draw.
        sigma_sampler(job.sigma, "audio" if stream == "audio" else "video")
    dataset, parts = _open_dataset(job, strategy, architecture, factors)
    check_trigger_word(job.job.trigger, job.data)
    # Shapes only: no latents are read before training.
    keys = [dataset.shape_key(index) for index in range(len(dataset))]
    weights = {"video": job.loss.video_weight, "audio": job.loss.audio_weight}
    for part in parts:
        for warning in check_part(part, dataset, keys, weights):
            logger.warning("%s", warning)
    # Finished contexts have passed the connectors already, which are then neither read nor kept in memory.
    connectors_path = None
    if any(stores_text_features(key) for key in set(keys)):
        connectors_path = find_connectors(source, model.connectors_path)
        connectors = build_connectors(source, connectors_path)
        video, audio = connectors.video_embeddings_connector, connectors.audio_embeddings_connector
        registers = 1 if video.learnable_registers is None else video.learnable_registers.shape[0]
        # Both, whatever the streams: the connectors always run together.
        widths = {"video": video.width, "audio": audio.width}
        check_text(keys, dataset.name, widths=widths, multiple_of=registers, is_features=True)
        if job.preservation.blank_prompt_weight > 0 and not connectors.fills_padding:
            raise ValueError(
                "preservation.blank_prompt_weight: expected text connectors with registers, which stand for a blank "
                f"prompt, found none in {connectors_path}; remove it."
            )
    if job.preservation.blank_prompt_weight > 0 and not all(stores_text_features(key) for key in set(keys)):
        raise ValueError(
            f"preservation.blank_prompt_weight = {job.preservation.blank_prompt_weight}: expected text features, found "
            f"finished contexts, which cannot be made blank; remove it, or prepare the data without --contexts."
        )
    streams = {"video": architecture.video, "audio": architecture.audio}
    widths = {name: stream.stored_context_dim for name, stream in streams.items() if modalities in ("av", name)}
    check_text(keys, dataset.name, widths=widths, is_features=False)
    _warn_of_data(job, keys)
    # Datasets have few distinct shapes, so FLOPs are computed once per shape, not per sample.
    flops = {
        key: training_flops(architecture, **vars(stream_tokens(key, modalities)), trained=model.mode)
        for key in set(keys)
    }
    plan = Plan(
        job=job,
        degrees=degrees,
        source=source,
        architecture=architecture,
        modalities=modalities,
        strategy=strategy,
        dataset=dataset,
        parts=parts,
        batches=BatchPlan(
            # Samples of sources with other conditions cannot share a forward.
            [(dataset.source_of(i).group, key) for i, key in enumerate(keys)]
            if isinstance(dataset, MixedDataset)
            else keys,
            [flops[key] for key in keys],
            job.training.seed,
            job.training.global_batch_size,
            dataset.fingerprint,
            dataset.mixture if isinstance(dataset, MixedDataset) else None,
        ),
        connectors_path=connectors_path,
        reference_scale=common_reference_scale(parts, dataset, keys),
    )
    if job.compile.enable and plan.num_shapes > _MANY_SHAPES:
        logger.warning(
            "compile.enable = true: batches have up to %d combinations of shapes, each of which is compiled when it "
            "first occurs; fewer buckets, one frame rate (--fps) or fixed audio durations need fewer",
            plan.num_shapes,
        )
    return plan


def _warn_of_data(job: JobConfig, keys: Sequence[ShapeKey]) -> None:
    batch = job.training.global_batch_size
    if batch > len(keys):
        logger.warning(
            "training.global_batch_size = %d: the dataset has only %d samples, which repeat within a batch; lower it "
            "or add samples",
            batch,
            len(keys),
        )


def export_name(job: JobConfig, step: int) -> str:
    """File name of the exported model: adapters, or the whole transformer; DoRA is merged into it."""
    kind = "lora" if job.model.mode == "lora" and not job.lora.dora else "transformer"
    return f"{kind}-step-{step}.safetensors"


def build_transformer(source: ModelSource, modalities: Modalities, operators: Operators = TORCH) -> LTXTransformer:
    """Builds the transformer on the meta device; names and shapes are checked against its file.

    Args:
        source: config, and the file to check against; without one nothing is checked.
        modalities: streams to build; the file may hold more.
        operators: implementation of the fused operations.

    Raises:
        ValueError: names, shapes or dtypes in the file differ.
    """
    try:
        with on_meta():
            model = LTXTransformer.from_config(source.config["transformer"], modalities, operators)
    except ValueError as error:  # of the config, which does not know its file
        raise ValueError(f"{source.path or 'model.shape'}: {error}") from error
    if source.path is not None:
        check_fits(model, source.path, allow_unused=unused_by(modalities))
    return model


def trained_modalities(job: JobConfig) -> Modalities:
    """Streams of the job's transformer: as set, or those of its `[video]` and `[audio]` tables."""
    if job.model.modalities != "auto":
        return job.model.modalities
    # A frozen stream is built as well, because the other one attends to it.
    if job.video is not None and job.audio is not None:
        return "av"
    return "video" if job.video is not None else "audio"


def _open_dataset(
    job: JobConfig, strategy: FlexibleStrategy, architecture: TransformerConfig, factors: tuple[int, int, int]
) -> tuple[Dataset, tuple[DataPart, ...]]:
    folder = Path(job.job.dump_folder)
    dataset: Dataset
    if job.data.source == "precomputed":
        return open_prepared(job.data, strategy, folder)
    if job.data.source == "media":
        # Imported here: it loads the encoders' libraries, which other jobs do not need.
        from ltx_titan.encode.media_dataset import MediaDataset

        assert job.model.checkpoint_path is not None, "required by the section"
        dataset = MediaDataset(job.data.media, strategy.sources, job.model.checkpoint_path)
    else:
        dataset = SyntheticDataset(
            strategy.sources,
            **job.data.synthetic.model_dump(),
            video_text_dim=architecture.video.caption_dim or architecture.video.context_dim,
            audio_text_dim=architecture.audio.caption_dim or architecture.audio.context_dim,
            seed=job.training.seed,
            scale_factors=factors,
        )
    if job.data.on_bad_sample == "skip":
        dataset = SkippingDataset(dataset, folder)
    return dataset, (DataPart("", range(len(dataset)), strategy, job.data.caption_dropout),)
