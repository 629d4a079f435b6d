"""What a job comes to, worked out on the host: its checkpoint's header, its data, its strategy, its share of the mesh.

Everything that can be wrong with a job is found here, before a process group is made or a device touched.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

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
class Plan:
    """A checked job.

    Attributes:
        job: as read.
        degrees: the mesh it runs on.
        source: where the transformer comes from.
        modalities: the streams that are built.
        strategy: turns batches into inputs and predictions into a loss.
        dataset: the samples.
        batches: their order.
        connectors_path: file of the text connectors; None where the data holds finished contexts.
        reference_scale: (spatial, temporal) factors of the video references; None where there are none.
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
        """Where the job writes."""
        return Path(self.job.job.dump_folder)

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.job.training.stop_at or self.job.training.steps

    def sample_flops(self, index: int) -> float:
        """Useful FLOPs of a training step on one sample of the data set."""
        return _sample_flops(self.job, self.source, self.dataset.shape_key(index), self.modalities)

    def sample_tokens(self, index: int) -> int:
        """Video and audio tokens of one sample, references included."""
        return sum(token_counts(self.dataset.shape_key(index)).values())


def plan_job(job: JobConfig, world_size: int) -> Plan:
    """Checks a job against the number of ranks, its checkpoint and its data.

    Raises:
        ValueError: something does not fit; names the file, field or tensor, and the remedy.
    """
    degrees = check_world(job, world_size)
    model = job.model
    source = read_source(model.checkpoint_path if model.init == "checkpoint" else None, model.shape, model.num_layers)
    if source.path is not None and model.mode == "full":
        refuse_quantized(read_metadata(source.path))
    modalities = _modalities(job)
    architecture = build_transformer(source, modalities).config  # on the meta device: names and shapes fit the file
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


def build_transformer(source: ModelSource, modalities: Modalities, operators: Operators = TORCH) -> LTXTransformer:
    """The transformer on the meta device, checked against its file name by name and shape by shape."""
    with torch.device("meta"):
        model = LTXTransformer.from_config(source.config["transformer"], modalities, operators)
    if source.path is not None:
        check_fits(model, source.path, allow_unused=unused_by(modalities))
    return model


def build_connectors(source: ModelSource, path: Path) -> TextConnectors:
    """The text connectors on the meta device, checked against `path`."""
    with torch.device("meta"):
        connectors = TextConnectors.from_config(source.config)
    check_fits(connectors, path, component=CONNECTORS)
    return connectors


def _modalities(job: JobConfig) -> Modalities:
    if job.model.modalities != "auto":
        return job.model.modalities
    if job.video is not None and job.audio is not None:
        return "av"
    return "video" if job.video is not None else "audio"


def _open_dataset(
    job: JobConfig, strategy: FlexibleStrategy, architecture: TransformerConfig, factors: tuple[int, int, int]
) -> Dataset:
    if job.data.source == "precomputed":
        return PrecomputedDataset(job.data.root, strategy.sources)
    if job.data.source == "media":
        # Here, not above: it brings the encoders' libraries along, which other jobs do without.
        from ltx_titan.encode.media_dataset import MediaDataset

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
    """Where to load connectors from, checked; None if no sample needs them."""
    if not any(name == "prompt_attention_mask" for key in set(keys) for _, name, _ in key):
        if job.data.caption_dropout > 0:
            raise ValueError(
                f"data.caption_dropout = {job.data.caption_dropout}: expected text features, found finished contexts, "
                f"in which a caption cannot be dropped any more; set it to 0, or prepare the data without contexts."
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


def _sample_flops(job: JobConfig, source: ModelSource, key: ShapeKey, modalities: Modalities) -> float:
    tokens = token_counts(key)
    text = max(shape[0] for owner, name, shape in key if owner == "conditions" and name == "video_prompt_embeds")
    audio = sum(count for name, count in tokens.items() if "audio" in name)
    return training_flops(
        source.config["transformer"],
        video_tokens=0 if modalities == "audio" else sum(tokens.values()) - audio,
        audio_tokens=0 if modalities == "video" else audio,
        text_tokens=text,
        trained=job.model.mode,
    )
