"""Where the tokens of a reference clip lie, relative to those of the target.

A reference may be smaller than its target or have fewer frames per second; its coordinates are then stretched so that
what shows the same thing lies at the same place. The factors follow from the shapes, and one adapter knows one pair of
them (it is stored in its metadata), so they are integers and every batch is checked.
"""

from ltx_titan.conditioning.tokens import Coordinates, Grid


def reference_factors(target: Grid, reference: Grid) -> tuple[int, int]:
    """How much smaller a reference is than its target, in space and in time.

    Spatial: target size / reference size, the same for height and width. Temporal: (F' - 1) of the target / (F' - 1) of
    the reference, 1 where either has a single latent frame.

    Raises:
        ValueError: if a factor is not an integer, or height and width differ in theirs.
    """
    target, reference = Grid(*target), Grid(*reference)
    sizes = f"target latents are {_size(target)}, the reference's {_size(reference)} (frames, rows, columns)"
    if target.height % reference.height or target.width % reference.width:
        raise ValueError(
            f"{sizes}: the target's size must be a multiple of the reference's. Encode the reference again."
        )
    spatial = target.height // reference.height
    if spatial != target.width // reference.width:
        raise ValueError(f"{sizes}: height and width must shrink by the same factor. Encode the reference again.")
    target_groups, reference_groups = target.frames - 1, reference.frames - 1
    if target_groups == 0 or reference_groups == 0:
        return spatial, 1
    if target_groups % reference_groups:
        raise ValueError(
            f"{sizes}: frames after the first, {target_groups} and {reference_groups}, must be in a whole ratio. "
            "Encode the reference with a temporal factor that divides the target's."
        )
    return spatial, target_groups // reference_groups


def scale_reference(reference: Coordinates, target: Coordinates, spatial: int, temporal: int) -> Coordinates:
    """A reference's coordinates in the target's frame.

    Rows and columns are multiplied by `spatial`. Seconds, which come from the reference's own (lower) frame rate, move
    back by (temporal - 1) times the duration of the target's first token, and stop at 0.

    Args:
        reference: coordinates of a video reference.
        target: coordinates of its target.
        spatial: spatial factor.
        temporal: temporal factor.
    """
    seconds, down, right = reference.intervals
    if temporal != 1:
        batch = reference.index.shape[0]
        first_token_end = target.intervals[0].view(batch, -1, 2)[:, :1, 1:]
        moved = seconds.view(batch, -1, 2) - (temporal - 1) * first_token_end
        seconds = moved.clamp(min=0).view(-1, 2)
    return Coordinates((seconds, down * spatial, right * spatial), reference.index)


def _size(grid: Grid) -> str:
    return " x ".join(map(str, grid))
