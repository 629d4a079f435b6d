"""Training strategy: turns a batch and its random draws into the model's inputs, and predictions into a loss.

Every training mode (text, image, video or audio to video and audio; extension, inpainting, outpainting, in-context) is
a combination of two blocks and their conditions. Nothing here is random or stateful: `prepare` is a pure function of
the batch and the draws, stays on the batch's device and never makes the host wait for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ltx_titan.conditioning.batch import Batch, read_field, read_stream, token_shape
from ltx_titan.conditioning.conditioned import StreamTokens, condition_stream, conditioned_tokens, crop_cells
from ltx_titan.conditioning.loss import Loss, ModelInputs, flow_matching_loss
from ltx_titan.conditioning.tokens import DEFAULT_SCALE_FACTORS
from ltx_titan.config.streams import (
    AudioSection,
    Mask,
    Reference,
    SpatialCrop,
    StrategyConfig,
    VideoSection,
    random_spans,
)
from ltx_titan.diffusion.draws import ConditionPlan, StepDraws, StreamDraws, StreamPlan
from ltx_titan.diffusion.flow import add_noise, velocity_target
from ltx_titan.model import Modality


class _Stream(NamedTuple):
    """One prepared stream; `target` and `loss_mask` are None if it is frozen, `scales` has one key per reference."""

    modality: Modality
    target: Tensor | None
    loss_mask: Tensor | None
    loss_weights: Tensor | None
    present: Tensor | None
    scales: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class FlexibleStrategy:
    """Two blocks, video and audio, each absent, frozen or generated under conditions.

    Attributes:
        video: the video block, None if the transformer gets no video.
        audio: the audio block, None if the transformer gets no audio.
        scale_factors: compression factors of the video codec (time, height, width).
        keyframe_marker: whether the model has an embedding for tokens of a single pixel frame (LTX-2.5). The target's
            first latent frame is then marked, as it is when sampling.
    """

    video: VideoSection | None
    audio: AudioSection | None
    scale_factors: tuple[int, int, int] = DEFAULT_SCALE_FACTORS
    keyframe_marker: bool = False

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | StrategyConfig,
        scale_factors: tuple[int, int, int] = DEFAULT_SCALE_FACTORS,
        keyframe_marker: bool = False,
    ) -> Self:
        """Builds the strategy.

        Args:
            config: `{"name": "flexible", "video": block or None, "audio": block or None}`, blocks as dicts or models.
            scale_factors: compression factors of the video codec (time, height, width).
            keyframe_marker: whether the model marks tokens of a single pixel frame.

        Raises:
            ValueError: blocks are invalid or contradict each other, or a region covers no latent cell.
        """
        blocks = StrategyConfig.model_validate(config)
        # Here and not in the config section, which does not know the codec's factors: they are in the checkpoint's
        # metadata.
        for condition in blocks.video.conditions if blocks.video else ():
            if isinstance(condition, SpatialCrop):
                top, left, bottom, right = crop_cells(condition, scale_factors)
                if top == bottom or left == right:
                    raise ValueError(
                        f"video.conditions: spatial_region {list(condition.spatial_region)} covers no latent cell of "
                        f"{scale_factors[1]}x{scale_factors[2]} pixels once its edges are rounded down; make it larger."
                    )
        time, height, width = scale_factors  # a list in JSON
        strategy = cls(blocks.video, blocks.audio, (time, height, width), keyframe_marker)
        _ = strategy.sources  # Folders that collide should fail here, not when the data is opened.
        return strategy

    @property
    def blocks(self) -> dict[str, VideoSection | AudioSection]:
        """The present blocks by stream name, video first."""
        blocks = {"video": self.video, "audio": self.audio}
        return {name: block for name, block in blocks.items() if block is not None}

    @property
    def sources(self) -> dict[str, str]:
        """Folders to read under the data root, each with its key in a batch.

        Target latents get the keys `video_latents` and `audio_latents`, every other folder its own name. A mask that a
        frozen stream ignores is not read.

        Raises:
            ValueError: one folder serves two purposes, or two folders would share a key.
        """
        wanted = [("conditions", "conditions", "text features")]
        for name, block in self.blocks.items():
            wanted.append((block.latents_dir, f"{name}_latents", f"the {name} target"))
            if block.loss_mask_dir is not None and block.is_generated:
                wanted.append((block.loss_mask_dir, block.loss_mask_dir, f"a {name} mask"))
            for condition, is_applied in zip(block.conditions, block.applied, strict=True):
                if isinstance(condition, Mask) and is_applied:
                    wanted.append((condition.mask_dir, condition.mask_dir, f"a {name} mask"))
                elif isinstance(condition, Reference):
                    wanted.append((condition.latents_dir, condition.latents_dir, f"a {name} reference"))
        owners: dict[str, tuple[str, str]] = {}
        for folder, key, purpose in wanted:
            for other, (other_key, other_purpose) in owners.items():
                if (folder == other or key == other_key) and purpose != other_purpose:
                    raise ValueError(
                        f"folder {folder!r} ({purpose}) collides with folder {other!r} ({other_purpose}); "
                        "use a separate folder for each purpose, and name none after a batch key of another."
                    )
            owners[folder] = key, purpose
        return {folder: key for folder, (key, _) in owners.items()}

    def draw_plan(self, batch: Batch) -> tuple[StreamPlan | None, StreamPlan | None]:
        """Lists what `draw_step` must draw for this batch, for the video and for the audio stream."""
        plans: dict[str, StreamPlan] = {}
        for name, block in self.blocks.items():
            num_tokens, channels = token_shape(batch, f"{name}_latents", name)
            conditions = tuple(
                ConditionPlan(c.probability, isinstance(c, Reference), random_spans(c)) for c in block.conditions
            )
            plans[name] = StreamPlan(num_tokens, channels, block.is_generated, conditions)
        return plans.get("video"), plans.get("audio")

    def prepare(self, batch: Batch, draws: StepDraws) -> ModelInputs:
        """Turns a batch into the model's inputs, targets and loss masks.

        Latents, sigmas, timesteps and positions are float32.

        Args:
            batch: sources and their fields, on any device.
            draws: the random numbers of the batch.

        Raises:
            ValueError: a source or field is missing, a mask does not fit its target, or a reference's size is not in a
                whole ratio to its target's.
        """
        video = audio = None
        if self.video is not None:
            video = self._prepare_stream("video", self.video, batch, draws.video)
        if self.audio is not None:
            audio = self._prepare_stream("audio", self.audio, batch, draws.audio)
        return ModelInputs(
            video=None if video is None else video.modality,
            audio=None if audio is None else audio.modality,
            video_target=None if video is None else video.target,
            audio_target=None if audio is None else audio.target,
            video_loss_mask=None if video is None else video.loss_mask,
            audio_loss_mask=None if audio is None else audio.loss_mask,
            video_present=None if video is None else video.present,
            audio_present=None if audio is None else audio.present,
            video_loss_weights=None if video is None else video.loss_weights,
            audio_loss_weights=None if audio is None else audio.loss_weights,
            reference_scale=None if video is None else _single_scale(video.scales),
        )

    def clean_streams(self, batch: Batch) -> dict[str, StreamTokens]:
        """Conditions one sample without noise, as if every condition fired: the start of sampling.

        Keyframes at random times are spread evenly instead, so that every validation shows the same.

        Args:
            batch: a batch of one, with text contexts.

        Returns:
            Tokens of each stream by its name.

        Raises:
            ValueError: as `prepare`.
        """
        found = {}
        for name, block in self.blocks.items():
            fires = torch.ones(1, dtype=torch.bool)
            uses = [fires if is_applied else None for is_applied in block.applied]
            counts = [random_spans(condition) for condition in block.conditions]
            starts = [torch.arange(1, n + 1).double()[None] / (n + 1) if n else None for n in counts]
            read = read_stream(batch, name, block, self.scale_factors)
            marks_first_frame = name == "video" and self.keyframe_marker
            found[name], _ = condition_stream(read, block, uses, starts, self.scale_factors, marks_first_frame)
        return found

    def loss(self, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: ModelInputs) -> Loss:
        """Masked mean squared error of the velocities; see `flow_matching_loss`."""
        return flow_matching_loss(video_pred, audio_pred, inputs)

    def _prepare_stream(
        self, name: str, block: VideoSection | AudioSection, batch: Batch, draws: StreamDraws
    ) -> _Stream:
        """Reads, conditions and noises one stream."""
        read = read_stream(batch, name, block, self.scale_factors)
        uses, starts = _uses(name, block, draws), draws.starts or [None] * len(block.conditions)
        marks_first_frame = name == "video" and self.keyframe_marker
        tokens, scales = condition_stream(read, block, uses, starts, self.scale_factors, marks_first_frame)

        target, present = read.target, read.present
        device, shape = target.tokens.device, target.tokens.shape
        clean_mask, velocity, loss_mask, loss_weights = tokens.clean_mask, None, None, None
        if tokens.is_frozen:
            # No draws and no loss, but a stream like any other to the model: it attends and is attended to, as in the
            # reference trainer.
            sigma, latent = target.tokens.new_zeros(shape[0]), target.tokens
        else:
            # Draws come from the loader's threads; a mismatch here would broadcast silently.
            found = [None if draw is None else list(draw.shape) for draw in (draws.sigma, draws.noise)]
            assert found == [[shape[0]], list(shape)], f"{name} tokens {list(shape)} with sigma and noise {found}"
            assert draws.sigma is not None and draws.noise is not None
            sigma = draws.sigma.to(device, torch.float32, non_blocking=True)
            noise = draws.noise.to(device, torch.float32, non_blocking=True)
            latent, velocity = add_noise(target.tokens, noise, sigma), velocity_target(target.tokens, noise)
            if tokens.conditioned is not None:
                # `where` rather than arithmetic with the mask: clean tokens stay bit for bit.
                latent = torch.where(tokens.conditioned[:, :, None], target.tokens, latent)
            # Without a condition there are no references either, so the mask has the target's length.
            loss_mask = torch.ones(shape[:2], dtype=torch.bool, device=device) if clean_mask is None else ~clean_mask
            if present is not None:
                loss_mask = loss_mask & present[:, None]
            if block.loss_mask_dir is not None:
                stored = read_field(batch, block.loss_mask_dir, "mask")
                # Read as the mask of a condition is: one element per token, True above 0.5.
                subject = Mask(type="mask", mask_dir=block.loss_mask_dir)
                is_subject = conditioned_tokens(subject, target.grid, self.scale_factors, stored, device)
                loss_weights = torch.where(is_subject, 1.0, block.unmasked_weight)
        coordinates = tokens.coordinates
        modality = Modality.from_sigma(
            tokens.with_references(latent),
            sigma,
            clean_mask,
            positions=coordinates.positions,
            coordinate_values=coordinates.midpoints,
            coordinate_index=coordinates.index,
            context=read.context,
            context_mask=read.context_mask,
            keyframes_mask=tokens.keyframes_mask,
        )
        return _Stream(modality, velocity, loss_mask, loss_weights, present, scales)


def _uses(name: str, block: VideoSection | AudioSection, draws: StreamDraws) -> list[Tensor | None]:
    """Lists which conditions fire, parallel to the block's; None for one without effect."""
    uses = draws.uses or [None] * len(block.conditions)
    assert len(uses) == len(block.conditions), f"{name} has {len(block.conditions)} conditions and {len(uses)} draws"
    applied = [use if is_applied else None for use, is_applied in zip(uses, block.applied, strict=True)]
    missing = [i for i, use in enumerate(applied) if use is None and block.applied[i]]
    assert not missing, f"{name} conditions {missing} have no draws"
    return applied


def _single_scale(scales: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Merges the factors of all video references: an adapter stores one pair."""
    if len(set(scales.values())) > 1:
        found = ", ".join(f"{folder} {factors}" for folder, factors in scales.items())
        raise ValueError(
            f"video references have different (spatial, temporal) factors: {found}; an adapter stores one pair only. "
            "Encode the references with the same factors."
        )
    return next(iter(scales.values()), None)
