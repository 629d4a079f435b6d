"""The training strategy: one batch and one set of draws become the model's inputs, and its predictions a loss.

Every training mode (text, image, video or audio to video and audio; extension, inpainting, outpainting, in-context) is
a combination of two blocks and their conditions. Nothing here is random or stateful: `prepare` is a pure function of
the batch and the draws, stays on the batch's device and never makes the host wait for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ltx_titan.conditioning.batch import Batch, read_clip, read_field, read_text, token_shape
from ltx_titan.conditioning.conditions import crop_cells, given_tokens
from ltx_titan.conditioning.loss import Loss, stream_loss, token_weights
from ltx_titan.conditioning.references import reference_factors, scale_reference
from ltx_titan.conditioning.stream import Stream, build_stream
from ltx_titan.conditioning.tokens import DEFAULT_SCALE_FACTORS, Coordinates
from ltx_titan.config.streams import AudioSection, Mask, Reference, SpatialCrop, StrategyConfig, VideoSection
from ltx_titan.diffusion.draws import StepDraws, StreamPlan
from ltx_titan.model import Modality, Perturbations


@dataclass(frozen=True)
class ModelInputs:
    """What the model is given and what its predictions are held against.

    Attributes:
        video: input of the video stream, references before the target; None where absent.
        audio: the same for audio.
        video_target: velocity [B, S, C], target tokens only; None where no video is generated.
        audio_target: the same for audio.
        video_loss_mask: True where a token counts [B, S], with S as in `video`: False for references and given tokens.
        audio_loss_mask: the same for audio.
        video_present: False for a sample whose video is a stand-in [B]: the two streams must not attend to each other
            there. None: every sample has its video.
        audio_present: the same for audio.
        reference_scale: (spatial, temporal) factors of the video references, None where no block has one. Known from
            shapes in every batch, also where the reference does not fire.
    """

    video: Modality | None
    audio: Modality | None
    video_target: Tensor | None
    audio_target: Tensor | None
    video_loss_mask: Tensor | None
    audio_loss_mask: Tensor | None
    video_present: Tensor | None = None
    audio_present: Tensor | None = None
    reference_scale: tuple[int, int] | None = None


def absent_streams(inputs: ModelInputs) -> Perturbations | None:
    """Keeps a sample's stand-in stream and its real one apart; None where every sample has both streams."""
    present = [flags for flags in (inputs.video_present, inputs.audio_present) if flags is not None]
    if not present or inputs.video is None or inputs.audio is None:
        return None
    return Perturbations(has_both=torch.stack(present).all(dim=0))


@dataclass(frozen=True)
class FlexibleStrategy:
    """Two blocks, video and audio, each absent, frozen or generated under conditions.

    Attributes:
        video: the video block, None where the transformer gets no video.
        audio: the audio block, None where the transformer gets no audio.
        scale_factors: compression factors of the video codec (time, height, width).
        keyframe_marker: whether the model has an embedding for tokens that stand for a single pixel frame (LTX-2.5).
            The target's first latent frame is then marked, as it is when sampling.
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
            keyframe_marker: whether the model marks tokens that stand for a single pixel frame.

        Raises:
            ValueError: if the blocks are not valid or contradict each other, or a region covers no latent cell.
        """
        blocks = StrategyConfig.model_validate(config)
        for condition in blocks.video.conditions if blocks.video else ():
            if isinstance(condition, SpatialCrop):
                top, left, bottom, right = crop_cells(condition, scale_factors)
                if top == bottom or left == right:
                    raise ValueError(
                        f"video.conditions: spatial_region {list(condition.spatial_region)} covers no latent cell of "
                        f"{scale_factors[1]}x{scale_factors[2]} pixels once its edges are rounded down; make it larger."
                    )
        strategy = cls(blocks.video, blocks.audio, tuple(scale_factors), keyframe_marker)
        _ = strategy.sources  # Folders that collide should fail here, not when the data is opened.
        return strategy

    @property
    def sources(self) -> dict[str, str]:
        """Folders to read under the data root, each with its key in a batch.

        Target latents go under `video_latents` and `audio_latents`, every other folder under its own name. A mask that
        a frozen stream ignores is not read.

        Raises:
            ValueError: if one folder serves two purposes, or two folders would share a key.
        """
        wanted = [("conditions", "conditions", "text features")]
        for name, block in self._blocks():
            wanted.append((block.latents_dir, f"{name}_latents", f"the {name} target"))
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
                        "give each purpose a folder of its own, and name none after a batch key of another."
                    )
            owners[folder] = key, purpose
        return {folder: key for folder, (key, _) in owners.items()}

    def draw_plan(self, batch: Batch) -> tuple[StreamPlan | None, StreamPlan | None]:
        """What `draw_step` must draw for this batch: plans of the video and of the audio stream."""
        plans: dict[str, StreamPlan] = {}
        for name, block in self._blocks():
            num_tokens, channels = token_shape(batch, f"{name}_latents", name)
            conditions = tuple((c.probability, isinstance(c, Reference)) for c in block.conditions)
            plans[name] = StreamPlan(num_tokens, channels, block.is_generated, conditions)
        return plans.get("video"), plans.get("audio")

    def prepare(self, batch: Batch, draws: StepDraws) -> ModelInputs:
        """Turns a batch into the model's inputs, targets and loss masks.

        Latents come out in float32, as do noise levels and positions.

        Args:
            batch: sources and their fields, on any device.
            draws: the random numbers of the batch.

        Raises:
            ValueError: if a source or field is missing, a mask does not fit its target, or a reference's size is not in
                a whole ratio to its target's.
        """
        streams: dict[str, Stream] = {}
        scales: dict[str, tuple[int, int]] = {}
        for name, _ in self._blocks():
            streams[name] = self._prepare_stream(name, batch, draws, scales)
        video, audio = streams.get("video"), streams.get("audio")
        return ModelInputs(
            video=None if video is None else video.modality,
            audio=None if audio is None else audio.modality,
            video_target=None if video is None else video.target,
            audio_target=None if audio is None else audio.target,
            video_loss_mask=None if video is None else video.loss_mask,
            audio_loss_mask=None if audio is None else audio.loss_mask,
            video_present=None if video is None else batch["video_latents"].get("present"),
            audio_present=None if audio is None else batch["audio_latents"].get("present"),
            reference_scale=_single_scale(scales),
        )

    def loss(self, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: ModelInputs) -> Loss:
        """Masked mean squared error of the velocities, per sample, summed over the generated streams.

        Args:
            video_pred: predicted velocity [B, S, C] of all video tokens, references included; ignored where frozen.
            audio_pred: the same for audio.
            inputs: what `prepare` returned.
        """
        video = _generated_loss("video", video_pred, inputs.video_target, inputs.video_loss_mask)
        audio = _generated_loss("audio", audio_pred, inputs.audio_target, inputs.audio_loss_mask)
        parts = [part for part in (video, audio) if part is not None]
        assert parts, "no stream is generated"
        per_sample = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return Loss(per_sample.mean(), per_sample, video, audio)

    def _blocks(self) -> list[tuple[str, VideoSection | AudioSection]]:
        return [(name, block) for name, block in (("video", self.video), ("audio", self.audio)) if block is not None]

    def _prepare_stream(self, name: str, batch: Batch, draws: StepDraws, scales: dict[str, tuple[int, int]]) -> Stream:
        """One stream; `scales` collects the factors of each video reference under its folder."""
        block: VideoSection | AudioSection = getattr(self, name)
        target = read_clip(batch, f"{name}_latents", name, self.scale_factors)
        device, shape = target.tokens.device, target.tokens.shape
        sigma, noise = _moved(getattr(draws, f"{name}_sigma"), device), _moved(getattr(draws, f"{name}_noise"), device)
        if block.is_generated:
            found = [None if draw is None else list(draw.shape) for draw in (sigma, noise)]
            assert found == [[shape[0]], list(shape)], f"{name} tokens {list(shape)} with sigma and noise {found}"
        else:
            sigma = noise = None
        given = torch.zeros(shape[:2], dtype=torch.bool, device=device) if block.conditions else None
        references: list[tuple[Tensor, Coordinates]] = []
        for condition, uses in zip(block.conditions, _uses(name, block, draws), strict=True):
            if isinstance(condition, Reference):
                clip = read_clip(batch, condition.latents_dir, name, self.scale_factors)
                if name == "video":
                    factors = scales[condition.latents_dir] = reference_factors(target.grid, clip.grid)
                    clip = clip._replace(coordinates=scale_reference(clip.coordinates, target.coordinates, *factors))
                # A reference's decision is on the host: it changes the length of the sequence.
                if bool(uses):
                    references.append((clip.tokens, clip.coordinates))
            elif uses is not None:
                assert given is not None
                file_mask = read_field(batch, condition.mask_dir, "mask") if isinstance(condition, Mask) else None
                tokens = given_tokens(condition, target.grid, self.scale_factors, file_mask, device)
                given = given | (tokens & uses.to(device, non_blocking=True)[:, None])
        context, context_mask = read_text(batch, name)
        return build_stream(
            target.tokens,
            target.coordinates,
            sigma=sigma,
            noise=noise,
            given=given,
            references=references,
            present=batch[f"{name}_latents"].get("present"),
            num_marked=target.grid.tokens_per_frame if name == "video" and self.keyframe_marker else 0,
            context=context,
            context_mask=context_mask,
        )


def _uses(name: str, block: VideoSection | AudioSection, draws: StepDraws) -> list[Tensor | None]:
    """Which conditions fire, parallel to the block's; None for one without effect."""
    uses = getattr(draws, f"{name}_uses") or [None] * len(block.conditions)
    assert len(uses) == len(block.conditions), f"{name} has {len(block.conditions)} conditions and {len(uses)} draws"
    applied = [use if is_applied else None for use, is_applied in zip(uses, block.applied, strict=True)]
    missing = [place for place, use in enumerate(applied) if use is None and block.applied[place]]
    assert not missing, f"{name} conditions {missing} have no draws"
    return applied


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float32, non_blocking=True)


def _single_scale(scales: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """An adapter stores one pair of factors, so several references must agree."""
    if len(set(scales.values())) > 1:
        found = ", ".join(f"{folder} {factors}" for folder, factors in scales.items())
        raise ValueError(
            f"video references have different (spatial, temporal) factors: {found}; an adapter stores one pair only. "
            "Encode the references with the same factors."
        )
    return next(iter(scales.values()), None)


def _generated_loss(
    name: str, prediction: Tensor | None, target: Tensor | None, loss_mask: Tensor | None
) -> Tensor | None:
    """Loss of one stream over its last tokens, those of the target; None for an absent or frozen stream."""
    if target is None:
        return None
    assert prediction is not None, f"{name} is generated but has no prediction"
    assert loss_mask is not None, f"{name} is generated but has no loss mask"
    length = target.shape[1]
    return stream_loss(prediction[:, -length:], target, token_weights(loss_mask[:, -length:]))
