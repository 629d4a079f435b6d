"""Resolves and validates a job on the host, before a process group is created or a device touched.

Reads the checkpoint's header and the shapes of all samples, and checks that model, data, conditions and mesh fit.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from ltx_titan.checkpoint import latest_complete, read_trainer_state
from ltx_titan.common.files import LOCK_FILE
from ltx_titan.conditioning import FlexibleStrategy, check_conditions, reference_scale
from ltx_titan.config import Degrees, JobConfig, check_world
from ltx_titan.data import BatchPlan, PrecomputedDataset, ShapeKey, token_counts
from ltx_titan.model import LTXTransformer, TextConnectors, TransformerConfig
from ltx_titan.model.flops import training_flops
from ltx_titan.model.ops import TORCH, Operators
from ltx_titan.model.transformer import Modalities
from ltx_titan.nano.synthetic import SyntheticDataset
from ltx_titan.parallel.limits import check_parallelism
from ltx_titan.weights import (
    CONNECTORS,
    ModelSource,
    check_fits,
    read_metadata,
    read_source,
    refuse_quantized,
    scale_factors,
    unused_by,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ltx_titan.encode.media_dataset import MediaDataset

Dataset: TypeAlias = "PrecomputedDataset | SyntheticDataset | MediaDataset"


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one sample as the transformer meets them, references included; 0 for an absent stream."""

    video_tokens: int
    audio_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Plan:
    """A checked job.

    Attributes:
        job: the job file with its overrides.
        degrees: sizes of the mesh axes.
        source: config and file of the transformer.
        modalities: streams that the transformer has.
        strategy: turns batches into inputs and predictions into a loss.
        dataset: the samples.
        batches: samples of each global batch.
        connectors_path: file of the text connectors; None if the data holds finished contexts.
        reference_scale: (spatial, temporal) factors of the video references; None without references.
    """

    job: JobConfig
    degrees: Degrees
    source: ModelSource
    modalities: Modalities
    strategy: FlexibleStrategy
    dataset: Dataset
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

    def export_path(self, step: int) -> Path:
        """File of the export of `step`."""
        return self.folder / "export" / export_name(self.job, step)

    def sample_flops(self, index: int) -> float:
        """Model FLOPs of a training step on one sample of the dataset."""
        return _sample_flops(self.job, self.source, self.dataset.shape_key(index), self.modalities)

    def sample_tokens(self, index: int) -> int:
        """Video and audio tokens of one sample, references included."""
        return sum(token_counts(self.dataset.shape_key(index)).values())


def plan_job(job: JobConfig, world_size: int) -> Plan:
    """Checks a job against the number of ranks, its checkpoint and its data.

    Raises:
        ValueError: something does not fit; the message names the file, key or tensor, and the remedy.
    """
    degrees = check_world(job, world_size)
    model = job.model
    source = read_source(model.checkpoint_path if model.init == "checkpoint" else None, model.shape, model.num_layers)
    if source.path is not None and model.mode == "full":
        # Rounding to 8 or 4 bits is not undone by training; only a frozen base may be quantized.
        refuse_quantized(read_metadata(source.path))
    modalities = trained_modalities(job)
    # Built on the meta device for its check of names and shapes; the trainer builds its own.
    architecture = build_transformer(source, modalities).config
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
    )
    factors = scale_factors(source.config)
    strategy = FlexibleStrategy.from_config(
        {"name": "flexible", "video": job.video, "audio": job.audio}, factors, architecture.keyframe_embedding
    )
    dataset = _open_dataset(job, strategy, architecture, factors)
    keys = [dataset.shape_key(index) for index in range(len(dataset))]
    for warning in check_conditions(strategy, keys, dataset.name):
        logger.warning("%s", warning)
    # Datasets have few distinct shapes, so FLOPs are computed once per shape, not per sample.
    flops = {key: _sample_flops(job, source, key, modalities) for key in set(keys)}
    return Plan(
        job=job,
        degrees=degrees,
        source=source,
        modalities=modalities,
        strategy=strategy,
        dataset=dataset,
        batches=BatchPlan(
            keys,
            [flops[key] for key in keys],
            job.training.seed,
            job.training.global_batch_size,
            dataset.fingerprint,
        ),
        connectors_path=_connectors_path(job, source, keys),
        reference_scale=reference_scale(strategy, keys, dataset.name),
    )


def is_finished(plan: Plan) -> bool:
    """Whether everything that the job asks for exists: the checkpoint of its last step, and its export; logs it.

    A job whose checkpoint is complete and whose export is missing is not finished: training it again takes no step and
    exports.

    Raises:
        ValueError: `checkpoint.resume = false` and the folder is not empty.
    """
    if not plan.job.checkpoint.resume:
        if plan.folder.is_dir() and any(entry.name != LOCK_FILE for entry in plan.folder.iterdir()):
            raise ValueError(
                f"checkpoint.resume = false starts a new run, but job.dump_folder = {str(plan.folder)!r} is not empty; "
                f"choose another folder, or remove its contents."
            )
        return False
    path = latest_complete(plan.folder / "checkpoint")
    if path is None or (step := read_trainer_state(path)["step"]) < plan.last_step:
        return False
    export = plan.export_path(step)
    if plan.exports and not export.is_file():
        logger.info("step %d of %d is saved, but %s is missing: exporting it", step, plan.job.training.steps, export)
        return False
    logger.info("nothing to do: %s is already at step %d of %d", path, plan.last_step, plan.job.training.steps)
    return True


def export_name(job: JobConfig, step: int) -> str:
    """File name of the exported model: adapters, or the whole transformer; DoRA is merged into it."""
    kind = "lora" if job.model.mode == "lora" and not job.lora.dora else "transformer"
    return f"{kind}-step-{step}.safetensors"


def build_transformer(source: ModelSource, modalities: Modalities, operators: Operators = TORCH) -> LTXTransformer:
    """Builds the transformer on the meta device; names and shapes are checked against its file."""
    with torch.device("meta"):
        model = LTXTransformer.from_config(source.config["transformer"], modalities, operators)
    if source.path is not None:
        check_fits(model, source.path, allow_unused=unused_by(modalities))
    return model


def build_connectors(source: ModelSource, path: Path) -> TextConnectors:
    """Builds the text connectors on the meta device; names and shapes are checked against `path`."""
    with torch.device("meta"):
        connectors = TextConnectors.from_config(source.config)
    check_fits(connectors, path, component=CONNECTORS)
    return connectors


def trained_modalities(job: JobConfig) -> Modalities:
    """Streams of the job's transformer: as set, or those of its `[video]` and `[audio]` tables."""
    if job.model.modalities != "auto":
        return job.model.modalities
    if job.video is not None and job.audio is not None:
        return "av"
    return "video" if job.video is not None else "audio"


def _open_dataset(
    job: JobConfig, strategy: FlexibleStrategy, architecture: TransformerConfig, factors: tuple[int, int, int]
) -> Dataset:
    if job.data.source == "precomputed":
        assert job.data.root is not None, "required by the section"
        return PrecomputedDataset(job.data.root, strategy.sources)
    if job.data.source == "media":
        # Imported here: it loads the encoders' libraries, which other jobs do not need.
        from ltx_titan.encode.media_dataset import MediaDataset

        assert job.model.checkpoint_path is not None, "required by the section"
        return MediaDataset(job.data.media, strategy.sources, job.model.checkpoint_path)
    return SyntheticDataset(
        strategy.sources,
        **job.data.synthetic.model_dump(),
        video_text_dim=architecture.video.caption_dim or architecture.video.context_dim,
        audio_text_dim=architecture.audio.caption_dim or architecture.audio.context_dim,
        seed=job.training.seed,
        scale_factors=factors,
    )


def _connectors_path(job: JobConfig, source: ModelSource, keys: list[ShapeKey]) -> Path | None:
    """File of the text connectors, checked; None if no sample needs them."""
    if not any(name == "prompt_attention_mask" for key in set(keys) for _, name, _ in key):
        if job.data.caption_dropout > 0:
            raise ValueError(
                f"data.caption_dropout = {job.data.caption_dropout}: expected text features, found finished contexts, "
                f"whose caption can no longer be dropped; set it to 0, or prepare the data without --contexts."
            )
        return None
    path = job.model.connectors_path or source.path
    if path is None:
        raise ValueError(
            'the data holds text features, which need text connectors, but model.init = "random" has no file. Set '
            "model.connectors_path, or use finished contexts (data.synthetic.contexts = true)."
        )
    build_connectors(source, Path(path))
    return Path(path)


def stream_tokens(key: ShapeKey, modalities: Modalities) -> TokenCounts:
    """Counts the tokens of a sample by stream."""
    counts = token_counts(key)
    audio = sum(count for name, count in counts.items() if "audio" in name)
    video = sum(counts.values()) - audio
    text = max(shape[0] for owner, name, shape in key if owner == "conditions" and name == "video_prompt_embeds")
    return TokenCounts(0 if modalities == "audio" else video, 0 if modalities == "video" else audio, text)


def _sample_flops(job: JobConfig, source: ModelSource, key: ShapeKey, modalities: Modalities) -> float:
    tokens = stream_tokens(key, modalities)
    return training_flops(source.config["transformer"], **vars(tokens), trained=job.model.mode)
