"""Validation of a job during training: sampled clips, and the loss on held-out data at fixed noise."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import PurePath
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ltx_titan.common.progress import ProgressLog
from ltx_titan.common.tensors import COMPUTE_DTYPES, evenly_spaced
from ltx_titan.conditioning import Batch, to_contexts
from ltx_titan.config import ValidationSection
from ltx_titan.data import MixedDataset, PrecomputedDataset
from ltx_titan.model import TextConnectors, TransformerConfig
from ltx_titan.optim import EMA, Optimizers
from ltx_titan.parallel.float8 import precompute_float8_scales
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.parallelize import allow_graphs
from ltx_titan.plan import Dataset, Plan, build_transformer
from ltx_titan.validation.check import check_validation, with_schedule
from ltx_titan.validation.held_out import as_batch, held_out_losses
from ltx_titan.validation.quality import mean_scores
from ltx_titan.validation.sampling import SampleGroups, count_steps, guidance_of
from ltx_titan.weights import check_fusion

if TYPE_CHECKING:
    from wandb import Run

    from ltx_titan.validation.engine import DatasetSample

logger = logging.getLogger(__name__)

# Folder of encoded prompts below the dump folder.
_CACHE = "validation-cache"


class TrainingValidation:
    """Runs `[validation]`. Create it before the model is loaded: encoding prompts and media needs the memory.

    Args:
        plan: the job; `validation.interval` is set.
        mesh: mesh whose data-parallel groups share the samples.
        device: device of the model.
    """

    def __init__(self, plan: Plan, mesh: Mesh, device: torch.device) -> None:
        self.plan, self.device, self.section = plan, device, _section(plan)
        if self.section.schedule == "distilled" and plan.job.validation.schedule == "auto":
            logger.info(
                "validation: sampled as a distilled checkpoint, by the name of its file (%s, no guidance where unset); "
                'validation.schedule = "standard" changes that',
                self.section.stepper,
            )
        data = mesh.data
        self.groups = SampleGroups(
            mesh.dp_rank,
            mesh.degrees.dp,
            data.get_group("dp") if mesh.degrees.dp > 1 else None,
            # All ranks of a group have the same latents; one of them decodes.
            is_first=data.get_local_rank("cp") == 0 and data.get_local_rank("tp") == 0,
        )
        self.sampler = None
        root = self.section.held_out_root
        self.held_out = None if root is None else PrecomputedDataset(root, plan.strategy.sources)
        if self.section.samples or self.section.dataset_samples:
            # Imported here: it loads diffusers and transformers, which a job without samples does not need.
            from ltx_titan.validation.engine import prepare_validation

            assert plan.source.path is not None, "checked by check_validation_files"
            self.sampler = prepare_validation(
                self.section,
                checkpoint_path=plan.source.path,
                config=plan.source.config,
                modalities=plan.modalities,
                device=device,
                cache_folder=plan.folder / _CACHE,
                groups=self.groups,
                # Those that the job trains with.
                connectors_path=plan.job.model.connectors_path,
            )
        self.from_dataset = self._chosen_samples()
        if self.held_out is not None and plan.job.compile.enable:
            allow_graphs(len({self.held_out.shape_key(index) for index in range(len(self.held_out))}))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the samples, or the names of those from the dataset, in order."""
        return (*(sample.prompt for sample in self.section.samples), *self.from_dataset.values())

    def _chosen_samples(self) -> dict[int, str]:
        """Indices and titles of `dataset_samples`."""
        dataset = self._dataset
        # Of sources with all streams: what a placeholder stands for cannot be sampled.
        indices: Sequence[int] = range(len(dataset))
        if isinstance(dataset, MixedDataset):
            indices = [index for index in indices if not dataset.source_of(index).absent]
        chosen = [indices[i] for i in evenly_spaced(len(indices), self.section.dataset_samples)]
        return {index: f"{PurePath(dataset.name(index)).with_suffix('')}, with its own caption" for index in chosen}

    @property
    def _dataset(self) -> Dataset:
        return self.plan.dataset if self.held_out is None else self.held_out

    def _read_dataset_samples(self, connectors: TextConnectors | None) -> list["DatasetSample"]:
        """Reads `dataset_samples`; a collective call, since the connectors are sharded."""
        # Imported here, as above.
        from ltx_titan.validation.encode import encode_dataset_sample
        from ltx_titan.validation.engine import DatasetSample

        dtype = COMPUTE_DTYPES[self.plan.job.training.dtype]
        found = []
        for index, title in self.from_dataset.items():
            batch = dict(as_batch(self._dataset.load(index), "cpu"))
            on_device = {name: value.to(self.device) for name, value in batch["conditions"].items()}
            text = {name: value.cpu() for name, value in to_contexts(on_device, connectors, dtype).items()}
            strategy = self.plan.part_of(index).strategy if self.held_out is None else self.plan.strategy
            encoded, shape = encode_dataset_sample(strategy, {**batch, "conditions": text})
            contexts = text["video_prompt_embeds"], text.get("audio_prompt_embeds", text["video_prompt_embeds"])
            found.append(DatasetSample(title, encoded, shape, contexts))
        return found

    def run(
        self,
        step: int,
        model: nn.Module,
        connectors: TextConnectors | None,
        *,
        writer: SummaryWriter | None,
        wandb_run: "Run | None",
        ema: EMA | None,
        optimizers: Optimizers,
    ) -> dict[str, float]:
        """Samples clips, scores them and computes held-out losses; every rank calls it.

        Args:
            step: optimizer steps taken.
            model: the transformer; in training mode again afterwards.
            connectors: for held-out text features.
            writer: TensorBoard, on rank 0.
            wandb_run: Weights & Biases run that clips are uploaded to, on rank 0.
            ema: averaged weights, if the job keeps them.
            optimizers: whose averaged weights are used if they average; their state is moved to the host during
                sampling if the job offloads it.

        Returns:
            Held-out losses by TensorBoard tag, and on rank 0 the means of the clips' scores.
        """
        started = time.perf_counter()
        figures: dict[str, float] = {}
        folder = self.plan.folder / "samples" / f"step-{step}"
        averaged: AbstractContextManager[None] = nullcontext()
        if optimizers.averages:
            averaged = self._own_scales(model, optimizers.averaged(model))
        with averaged:
            if self.sampler is not None:
                if len(self.sampler.titles) < len(self.prompts):
                    # At the first validation, because the connectors are loaded after the model.
                    self.sampler = self.sampler.with_dataset_samples(self._read_dataset_samples(connectors))
                progress = ProgressLog("sampling", count_steps(self.section, self.sampler.samples), "steps")
                files = self.sampler.run(
                    model,
                    folder,
                    step,
                    writer=writer,
                    wandb_run=wandb_run,
                    averaged_weights=None if ema is None else lambda: self._own_scales(model, ema.swapped_in(model)),
                    optimizers=optimizers.parts,
                    on_step=lambda _: progress.advance(),
                )
                if dist.get_rank() == 0:  # other ranks have the scores of their own clips only
                    figures |= mean_scores([file.scores for file in files])
            if self.held_out is not None:
                figures |= self._held_out_losses(self.held_out, model, connectors)
        where = f", clips in {folder}" if self.sampler is not None else ""
        # Without the losses of single sigmas: those are in TensorBoard.
        shown = "".join(f", {name} {value:.4f}" for name, value in figures.items() if "sigma" not in name)
        logger.info("validation after step %d: %.1f s%s%s", step, time.perf_counter() - started, shown, where)
        return figures

    @contextmanager
    def _own_scales(self, model: nn.Module, other_weights: AbstractContextManager[None]) -> Iterator[None]:
        """The context `other_weights`, in which the model has the float8 scales of those weights."""
        gathers_float8 = self.plan.job.float8.all_gather
        with other_weights:
            if gathers_float8:  # the scales were computed for the trained weights
                precompute_float8_scales(model)
            yield
        # Again for the restored weights, or the next training step would use the scales of the others.
        if gathers_float8:
            precompute_float8_scales(model)

    def _held_out_losses(
        self, held_out: PrecomputedDataset, model: nn.Module, connectors: TextConnectors | None
    ) -> dict[str, float]:
        dtype = COMPUTE_DTYPES[self.plan.job.training.dtype]

        def load(index: int) -> Batch:
            batch = as_batch(held_out.load(index), self.device)
            # The function of the training step, so that both losses see the same contexts.
            return {**batch, "conditions": to_contexts(batch["conditions"], connectors, dtype)}

        return held_out_losses(
            model,
            self.plan.strategy,
            load,
            min(self.section.held_out_samples, len(held_out)),
            self.section.held_out_sigmas,
            self.section.seed,
            self.device,
            self.groups,
        )


def check_validation_files(plan: Plan) -> None:
    """Checks `[validation]` on the host, before a process group is created.

    Raises:
        ValueError: samples without a checkpoint to decode with, a missing file or folder, or a section that does not
            fit the model.
    """
    section = _section(plan)
    if section.interval is None:
        return
    if (section.samples or section.dataset_samples) and plan.source.path is None:
        raise ValueError(
            'validation.samples: expected a checkpoint with codecs, found model.init = "random"; remove the samples '
            "(also dataset_samples)."
        )
    if _has_prompts(section) and section.text_encoder_path is None and not (plan.folder / _CACHE).is_dir():
        raise ValueError(
            "validation.text_encoder_path is missing: expected the folder of the checkpoint's text encoder, because "
            "there are prompts (of validation.samples, or the negative one of guidance) and none is cached; set it."
        )
    mixed = plan.dataset if isinstance(plan.dataset, MixedDataset) and section.held_out_root is None else None
    if section.dataset_samples and mixed is not None and all(source.absent for source in mixed.sources):
        raise ValueError(
            f"validation.dataset_samples = {section.dataset_samples}: expected a source with all streams of the job, "
            "found none; set validation.held_out_root to a dataset with them, or remove it."
        )
    if section.loras:
        transformer = build_transformer(plan.source, plan.modalities)
        for number, lora in enumerate(section.loras):
            try:
                check_fusion(transformer, lora.path)
            except ValueError as error:
                raise ValueError(f"validation.loras[{number}].path: {error}") from error
    if section.held_out_root is not None:
        # Opened and dropped: a missing folder should be an error before any GPU is touched.
        try:
            PrecomputedDataset(section.held_out_root, plan.strategy.sources, "validation.held_out_root")
        except ValueError as error:
            text = str(error)
            raise ValueError(text if "held_out_root" in text else f"validation.held_out_root: {text}") from error
    check_validation(
        section,
        has_video=plan.modalities != "audio",
        has_audio=plan.modalities != "video",
        num_blocks=TransformerConfig.from_metadata(plan.source.config["transformer"]).num_layers,
        scale_factors=plan.strategy.scale_factors,
    )


def _section(plan: Plan) -> ValidationSection:
    return with_schedule(plan.job.validation, plan.source.path, plan.source.metadata.get("model_version"))


def _has_prompts(section: ValidationSection) -> bool:
    """Whether a text encoder is needed: samples of a dataset have their captions encoded."""
    has_negative = any(guidance.needs_uncond for guidance in guidance_of(section))
    return bool(section.samples) or (section.dataset_samples > 0 and has_negative)
