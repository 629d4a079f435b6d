"""Attention skipped for some samples in some blocks: the weaker predictions that guidance compares against.

A skipped self-attention returns its values unmixed; a skipped cross-modal attention adds nothing. Text attention and
feed-forward are never skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_KINDS = ("skip_video_self_attn", "skip_audio_self_attn", "skip_a2v_cross_attn", "skip_v2a_cross_attn")


class KeepMasks(NamedTuple):
    """Masks of one block: 1 if a sample keeps an attention, 0 if it is skipped [B, 1, 1]; None keeps all."""

    video_self: Tensor | None = None
    audio_self: Tensor | None = None
    audio_to_video: Tensor | None = None
    video_to_audio: Tensor | None = None


@dataclass(frozen=True)
class Perturbations:
    """Attention to skip, per sample and block.

    Attributes:
        samples: per sample, pairs of a kind and its blocks (None: every block).
        has_both: [B], False for a sample with one stream only, whose other stream is a placeholder: the two must not
            attend to each other in any block. None: all samples have both.
    """

    samples: tuple[tuple[tuple[str, frozenset[int] | None], ...], ...] = ()
    has_both: Tensor | None = None

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[dict]]) -> "Perturbations":
        """Builds from one list per sample of `{"type": ..., "blocks": [...] | None}`.

        Types are `skip_video_self_attn`, `skip_audio_self_attn`, `skip_a2v_cross_attn` and `skip_v2a_cross_attn`.

        Raises:
            ValueError: unknown type.
        """
        samples = []
        for sample in lists:
            for entry in sample:
                if entry["type"] not in _KINDS:
                    raise ValueError(f"perturbation type {entry['type']!r} is unknown; expected one of {_KINDS}.")
            samples.append(tuple((e["type"], None if e["blocks"] is None else frozenset(e["blocks"])) for e in sample))
        return cls(tuple(samples))

    def keep_masks(self, block: int, device: torch.device, dtype: torch.dtype) -> KeepMasks:
        """Builds the masks of one block."""
        masks = KeepMasks(*(self._keep(kind, block, device, dtype) for kind in _KINDS))
        if self.has_both is None:
            return masks
        # A factor of 0 on the gate makes a placeholder stream equal to an absent one, gradients included.
        both = self.has_both.to(device, dtype)[:, None, None]
        return masks._replace(
            audio_to_video=both if masks.audio_to_video is None else masks.audio_to_video * both,
            video_to_audio=both if masks.video_to_audio is None else masks.video_to_audio * both,
        )

    def _keep(self, kind: str, block: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        skipped = [
            any(name == kind and (blocks is None or block in blocks) for name, blocks in sample)
            for sample in self.samples
        ]
        # No mask instead of one of ones: unperturbed blocks keep the graph they were compiled for.
        if not any(skipped):
            return None
        # A mask instead of dropping samples from the batch: perturbed and plain passes share one forward.
        return torch.tensor([0.0 if skip else 1.0 for skip in skipped], device=device, dtype=dtype)[:, None, None]
