"""Token masks of the intrinsic conditions: which of the target's own tokens stay clean (True)."""

import torch
from torch import Tensor

from ltx_titan.conditioning.tokens import Grid
from ltx_titan.config.streams import FirstFrame, IntrinsicCondition, Mask, Prefix, SpatialCrop, Suffix


def given_tokens(
    condition: IntrinsicCondition,
    grid: Grid,
    scale_factors: tuple[int, int, int],
    file_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which tokens an intrinsic condition gives.

    Boundaries and regions that reach beyond the clip are clamped to it.

    Args:
        condition: any condition but a reference.
        grid: latent sizes of the target.
        scale_factors: compression factors (time, height, width).
        file_mask: what the folder of a `mask` condition holds, [B, ...] with as many elements per sample as tokens.
        device: device of the result.

    Returns:
        Booleans [1, S] or, of a `mask` condition, [B, S].

    Raises:
        ValueError: if a mask does not have one element per token.
    """
    if isinstance(condition, Mask):
        assert file_mask is not None
        return _threshold(file_mask.to(device), grid, condition.mask_dir)
    given = torch.zeros(tuple(grid), dtype=torch.bool, device=device)
    match condition:
        case FirstFrame():
            given[:1] = True
        case Prefix(temporal_boundary=count):
            given[:count] = True
        case Suffix(temporal_boundary=count):
            given[max(grid.frames - count, 0) :] = True
        case SpatialCrop():
            top, left, bottom, right = crop_cells(condition, scale_factors)
            given[:, top:bottom, left:right] = True
    return given.flatten()[None]


def crop_cells(condition: SpatialCrop, scale_factors: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The region in latent cells: pixels divided by the compression factor and rounded down."""
    _, down, right = scale_factors
    y1, x1, y2, x2 = condition.spatial_region
    return y1 // down, x1 // right, y2 // down, x2 // right


def _threshold(mask: Tensor, grid: Grid, folder: str) -> Tensor:
    """A token is given where its mask is above 0.5."""
    flat = mask.flatten(1)
    if flat.shape[1] != grid.num_tokens:
        raise ValueError(
            f"{folder}: a mask has shape {list(mask.shape[1:])}, {flat.shape[1]} elements, but its target has "
            f"{grid.num_tokens} latent cells ({grid.frames} x {grid.height} x {grid.width} frames, rows, columns). "
            "Make the masks from the same clips, sizes and frame counts as the latents."
        )
    return flat > 0.5
