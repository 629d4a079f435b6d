"""One optimizer step: forward and backward of every micro-batch, then clipping and the update."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ltx_titan.common.tensors import COMPUTE_DTYPES, without_wrappers
from ltx_titan.conditioning import Loss, absent_streams, to_contexts, weighted_loss
from ltx_titan.conditioning.loss import flow_matching_loss
from ltx_titan.data import Batch, MicroBatch, StepBatches, map_tensors
from ltx_titan.diffusion import Objective, StepDraws, draw_caption_drops, draw_step, sigma_sampler
from ltx_titan.lora import DropoutStep
from ltx_titan.metrics import Sums
from ltx_titan.model import TextConnectors
from ltx_titan.optim import EMA, group_of, lr_factor
from ltx_titan.optim.build import Optimizers
from ltx_titan.parallel.float8 import precompute_float8_scales
from ltx_titan.parallel.grad_norm import GradNorms, clip_factor, grad_norms, scale_grads_
from ltx_titan.parallel.graphs import GraphedMicroStep, make_recorder
from ltx_titan.parallel.stream import weight_stream
from ltx_titan.plan import Plan
from ltx_titan.train.preservation import Preservation, TrainedPass, without_captions
from ltx_titan.train.skipped import SkippedSteps
from ltx_titan.weights import stream_of

# More micro-batches than any step has, so that (step, micro-batch) maps to a unique number.
_MICRO_STEPS = 1 << 20


class PassLosses(NamedTuple):
    """Losses of one forward and backward pass, without autograd history.

    Attributes:
        total: what was differentiated, of each sample [B].
        streams: its parts by stream; None for a pass without captions, which has no loss of its own.
        preservation: difference from the base, of each sample [B], without its weight; None if it was not computed.
    """

    total: Tensor
    streams: Loss | None
    preservation: Tensor | None


class TrainStep:
    """The step of a run on this rank.

    Args:
        plan: of the job.
        model: sharded.
        connectors: frozen; None if the data holds finished contexts.
        optimizers: of the model.
        ema: average of the weights; None without `optimizer.ema_decay`.
        skipped: decides which updates are skipped; None skips none.
        dp_rank: data-parallel rank.
        device: of this rank.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        connectors: TextConnectors | None,
        optimizers: Optimizers,
        ema: EMA | None,
        skipped: SkippedSteps | None,
        *,
        dp_rank: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._job = job = plan.job
        self._model = model
        self._connectors = connectors
        self._optimizers = optimizers
        self._ema = ema
        self._skipped = skipped
        self._device = device
        self._dtype = COMPUTE_DTYPES[job.training.dtype]
        self._stream = weight_stream(model)
        self._video_sampler, self._audio_sampler = sigma_sampler(job.sigma, "video"), sigma_sampler(job.sigma, "audio")
        self._objective = Objective.from_config(job.loss)
        self._preservation = Preservation(model, job.preservation) if job.preservation.parts else None
        self._weights: dict[tuple[float, ...], Tensor] = {}
        groups = {name: group_of(name, job.optimizer.groups) for name, _ in model.named_parameters()}
        self._group_names = {name: group.name for name, group in groups.items() if group is not None}
        # Audio is replicated across cp and tp, so all ranks of such a group need the same dropout mask.
        self._dropout = DropoutStep(model, job.training.seed, dp_rank)
        self.micro_step = GraphedMicroStep(
            self._micro_step, model.parameters(), make_recorder(job, plan.degrees, device)
        )

    def run(self, batches: StepBatches, sums: Sums) -> GradNorms | None:
        """Forward and backward of every micro-batch, then one update.

        Returns:
            The gradient norms before clipping; None if the step was skipped, and with `optimizer.in_backward`, which
            frees each gradient at once.
        """
        mark = sums.begin_step()
        # Before the backward pass, in which `optimizer.in_backward` already updates.
        self._optimizers.set_lr(self.learning_rate(batches.step))
        for number, micro_batch in enumerate(batches.micro_batches):
            # Dropout masks depend on the micro-batch alone, so a resumed run draws the same ones.
            self._dropout.set(batches.step * _MICRO_STEPS + number)
            self._forward_backward(micro_batch, sums)
        norms, factor = (None, None) if self._job.optimizer.in_backward else self._clip()
        if self._skipped is None or norms is None:
            self._update(batches.step, factor)
            return norms
        figures = self._skipped.figures(sums, mark, norms[0])
        if self._optimizers.can_skip and self._ema is None:
            # The update reads the decision on the device, which then has work while the host reads it as well.
            self._update(batches.step, factor, self._skipped.guard.is_broken(figures))
            return None if self._skipped.skips(batches, sums, mark, figures) else norms
        # Other updates and the moving average are skipped by the host.
        if self._skipped.skips(batches, sums, mark, figures):
            self._optimizers.zero_grad()
            return None
        self._update(batches.step, factor)
        return norms

    @record_function("ltx_titan::clip")
    def _clip(self) -> tuple[GradNorms, Tensor | None]:
        """Gradient norms before clipping, and the factor that the update has to apply; None if it is applied or 1."""
        named = list(self._model.named_parameters())
        norms = grad_norms(named, lambda name: stream_of(without_wrappers(name)), self._group_names.get)
        max_norm = self._job.training.max_grad_norm
        if max_norm == 0:
            return norms, None
        factor = clip_factor(norms[0], max_norm)
        if self._optimizers.can_scale:
            return norms, factor
        scale_grads_((parameter for _, parameter in named), factor)
        return norms, None

    def _update(self, step: int, factor: Tensor | None, skip: Tensor | None = None) -> None:
        """Updates the weights and frees the gradients; `factor` and `skip` as in `Optimizers.step`."""
        self._optimizers.step(factor, skip)
        self._optimizers.zero_grad()
        if self._job.float8.all_gather:
            # The updated weights' scales in one all-reduce, instead of one per layer in the next forward pass.
            precompute_float8_scales(self._model)
        if self._ema is not None:
            self._ema.update(step)

    def _forward_backward(self, micro_batch: MicroBatch, sums: Sums) -> None:
        """Adds this micro-batch's share of the global mean gradient to the parameters."""
        # From pinned memory, so the host does not wait for the copy.
        batch = map_tensors(micro_batch.batch, lambda tensor: tensor.to(self._device, non_blocking=True))
        features = batch["conditions"]
        batch["conditions"] = to_contexts(features, self._connectors, self._dtype)
        # Samples of a micro-batch have the same conditions.
        strategy = self._plan.part_of(micro_batch.samples[0]).strategy
        inputs = strategy.prepare(batch, micro_batch.draws)
        losses = self._train_on(TrainedPass(inputs, weights=self._sample_weights(micro_batch.samples)))
        assert losses.streams is not None
        sums.add(losses.total, losses.streams, inputs, self._sample_share)
        if sums.sources:
            names = [self._plan.part_of(index).name for index in micro_batch.samples]
            sums.add_sources(names, self._weigh(losses.streams), inputs)
        if losses.preservation is not None:
            # Its weighted value is in the total.
            sums.add_part("prior", losses.preservation, None, self._sample_share)
        if self._preservation is not None and self._preservation.has_blank_pass:
            # The same draws: only the captions differ.
            batch["conditions"] = to_contexts(without_captions(features), self._connectors, self._dtype)
            blank = self._train_on(TrainedPass(strategy.prepare(batch, micro_batch.draws), is_blank=True))
            assert blank.preservation is not None
            sums.add_part("blank_prompt", blank.preservation, blank.total, self._sample_share)
        # From the shapes in the plan: counting tokens on the device would make the host wait for it.
        sums.flops += sum(self._plan.sample_flops(index) for index in micro_batch.samples)
        sums.tokens += sum(self._plan.sample_tokens(index) for index in micro_batch.samples)

    def _train_on(self, work: TrainedPass) -> PassLosses:
        if self._stream is not None:
            self._stream.settle()
        return self.micro_step(work)

    def _micro_step(self, work: TrainedPass) -> PassLosses:
        """Forward, loss and backward. All of it may be one CUDA graph: see `GraphedMicroStep` for what that forbids."""
        inputs, preservation = work.inputs, self._preservation
        weight = 0.0 if preservation is None else preservation.weight(work.is_blank)
        # Before the pass with adapters, whose activations would be in memory meanwhile.
        towards_base = preservation.base_targets(inputs) if preservation is not None and weight > 0 else None
        video, audio = self._model(inputs.video, inputs.audio, absent_streams(inputs))
        streams = difference = total = None
        if not work.is_blank:
            streams = flow_matching_loss(video, audio, inputs, self._objective)
            total = self._weigh(streams)
            if work.weights is not None:
                total = total * work.weights
        if towards_base is not None:
            difference = self._weigh(flow_matching_loss(video, audio, towards_base))
            total = weight * difference if total is None else total + weight * difference
        assert total is not None, "a pass without captions needs a weight"
        (total.sum() * self._sample_share).backward()
        return PassLosses(
            total.detach(),
            None if streams is None else streams.detach(),
            None if difference is None else difference.detach(),
        )

    def _sample_weights(self, samples: tuple[int, ...]) -> Tensor | None:
        """`loss_weight` of each sample's source [B]; None in a job where all are 1."""
        if all(part.loss_weight == 1.0 for part in self._plan.parts):
            return None
        weights = tuple(self._plan.part_of(index).loss_weight for index in samples)
        # Kept, because the host would wait for the device at each copy; a job has few combinations.
        if weights not in self._weights:
            self._weights[weights] = torch.tensor(weights, device=self._device)
        return self._weights[weights]

    def _weigh(self, loss: Loss) -> Tensor:
        return weighted_loss(loss, self._job.loss.video_weight, self._job.loss.audio_weight)

    @property
    def _sample_share(self) -> float:
        """Weight of a sample in the global mean: gradients are summed over ranks and micro-batches of any size."""
        return 1 / self._job.training.global_batch_size

    def draw(self, batch: Batch, step: int, positions: tuple[int, ...], samples: tuple[int, ...]) -> StepDraws:
        """Draws all random numbers of a micro-batch; called in the loader's threads.

        Args:
            batch: collated samples; dropped captions are masked in place.
            step: optimizer step.
            positions: index of each sample in the global batch. With the seed and step they key each sample's
                generator, so the draws are the same on every mesh.
            samples: index of each sample in the dataset; they have the same conditions.
        """
        seed, parts = self._job.training.seed, [self._plan.part_of(index) for index in samples]
        dropout = [part.caption_dropout for part in parts]
        if any(dropout):
            drops = draw_caption_drops(dropout, seed=seed, step=step, indices=positions)
            batch["conditions"]["prompt_attention_mask"][drops] = 0  # the connectors replace masked tokens by registers
        video, audio = parts[0].strategy.draw_plan(batch)
        return draw_step(
            video,
            audio,
            sampler=self._video_sampler,
            audio_sampler=self._audio_sampler,
            seed=seed,
            step=step,
            indices=positions,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step."""
        job = self._job
        return job.optimizer.lr * lr_factor(step - 1, total_steps=job.training.steps, scheduler=job.scheduler)
