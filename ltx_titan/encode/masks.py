"""Stages: the columns `video_mask` and `audio_mask` to `video_masks/` and `audio_masks/`, one number per latent cell.

A mask file goes with its sample's clip: it is read at the same rate, cut at the same place, and has the clip's latent
shape. 1 is given to the model, 0 is to be generated. No encoder is needed.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ltx_titan.commands.process.stage import Output, Plan, Stage
from ltx_titan.encode.clips import Clip, ClipRules
from ltx_titan.media import read_audio_mask, read_video_mask
from ltx_titan.media.tables import SampleRow


def video_mask_stage(rules: ClipRules, clip_of: Callable[[SampleRow], Clip]) -> Stage:
    """The stage that brings video masks to the shape of latents.

    Args:
        rules: how clips are brought to a shape.
        clip_of: shape of a sample's clip.
    """

    def read(sample: SampleRow) -> Tensor:
        bucket, path = clip_of(sample).bucket, sample.extras["video_mask"]
        size = (bucket.frames, bucket.width, bucket.height)
        return read_video_mask(path, *size, rules.scale_factors, rules.fps, rules.anchor(sample.key))

    def plan(sample: SampleRow) -> Plan:
        clip = clip_of(sample)
        _must_exist(sample, "video_mask")
        return Plan(str(clip.bucket), 4 * prod(clip.latent_size(rules.scale_factors)))

    return _mask_stage("video masks", "video_mask", "video_masks", plan, read)


def audio_mask_stage(steps_of: Callable[[SampleRow], int | None]) -> Stage:
    """The stage that brings audio masks to the steps of audio latents.

    Args:
        steps_of: latent steps of a sample's audio; None where that is not known before it is encoded.
    """

    def read(sample: SampleRow) -> Tensor:
        steps = steps_of(sample)
        if steps is None:
            raise ValueError("its sample has no audio in audio_latents/, which the mask would belong to")
        return read_audio_mask(sample.extras["audio_mask"], steps)

    def plan(sample: SampleRow) -> Plan:
        _must_exist(sample, "audio_mask")
        steps = steps_of(sample)
        return Plan("as its audio" if steps is None else f"{steps} steps", 4 * (steps or 0))

    return _mask_stage("audio masks", "audio_mask", "audio_masks", plan, read)


def _mask_stage(
    name: str, column: str, folder: str, plan: Callable[[SampleRow], Plan], read: Callable[[SampleRow], Tensor]
) -> Stage:
    def encode(sample: SampleRow, mask: Tensor) -> Output:
        return {folder: {"mask": mask.to(torch.float32)}}

    return Stage(name, (folder,), lambda sample: str(sample.extras[column]), plan, read, lambda: encode)


def _must_exist(sample: SampleRow, column: str) -> None:
    path = sample.extras[column]
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError("no such file" if not path.is_file() else "is empty (0 bytes)")
