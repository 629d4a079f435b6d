"""Filters that turn a clip into a reference video: edges, grayscale, blur and depth.

A filter maps frames to as many frames of the same size, so that reference and clip stay aligned in every pixel and
frame. It streams frame by frame, except for depth, which is normalized over the whole clip: normalized per frame, it
would flicker.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Frames = Iterable[np.ndarray]
Filter = Callable[[Frames], Iterator[np.ndarray]]
"""Maps frames uint8 [H, W, 3] to as many frames of the same size."""

# Nothing is downloaded, and no code of the folder is run.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def edges(low: float = 100, high: float = 200) -> Filter:
    """Canny edges, white on black.

    Args:
        low: gradients below are never an edge.
        high: gradients above are always an edge; those in between only if they touch one.
    """
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            yield _rgb(cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), low, high))

    return apply


def gray() -> Filter:
    """Luminance, to train colorization."""
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            yield _rgb(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))

    return apply


def blur(strength: float = 0.01) -> Filter:
    """Gaussian blur, to train deblurring.

    Args:
        strength: standard deviation as a fraction of the frame's shorter side, so that clips of all sizes lose as much.
    """
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            # (0, 0): OpenCV derives the kernel from the deviation, which must be above 0.
            yield cv2.GaussianBlur(frame, (0, 0), max(0.3, strength * min(frame.shape[:2])))

    return apply


def depth(model_path: str | Path, device: str = "cpu", batch_size: int = 8) -> Filter:
    """Output of a depth estimation model, normalized over the clip; near is white.

    Args:
        model_path: local folder of a depth estimation model (Depth Anything, DPT, ZoeDepth, Depth Pro, ...).
        device: device of the model.
        batch_size: frames per forward pass.

    Raises:
        ValueError: the folder contains no such model.
    """
    model, processor = _depth_model(Path(model_path), device)
    # Metric models output distances, which grow with depth; relative ones output inverse depth.
    config = model.config.to_dict()
    is_distance = config.get("depth_estimation_type") == "metric" or model.config.model_type in (
        "zoedepth",
        "depth_pro",
    )

    @torch.no_grad()
    def estimate(batch: list[np.ndarray]) -> Tensor:
        inputs = processor(images=batch, return_tensors="pt").to(device, model.dtype)
        found = model(**inputs).predicted_depth.float()
        # Some models return [B, 1, H, W].
        found = found[:, 0] if found.ndim == 4 else found
        # Inverse depth for both kinds: near is large, and a far background does not use up the range.
        return 1 / found.clamp(min=1e-3) if is_distance else found

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        remaining, size, found = iter(frames), None, []
        while batch := list(islice(remaining, batch_size)):
            size = batch[0].shape[:2]
            # At the model's own size and in half precision: a clip of 121 frames takes about 60 MB.
            found.append(estimate(batch).half().cpu())
        if size is None:
            return
        low = min(float(part.min()) for part in found)
        high = max(float(part.max()) for part in found)
        for part in found:
            scaled = (part.float() - low) / max(high - low, 1e-6)
            for frame in F.interpolate(scaled[:, None], size, mode="bicubic", align_corners=False)[:, 0]:
                yield _rgb((frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy())

    return apply


def _depth_model(path: Path, device: str) -> tuple[Any, Any]:
    # Here, because transformers takes seconds to import and the other filters do without it.
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    if not (path / "config.json").is_file():
        raise ValueError(f"--depth-model: {path} has no config.json; expected a local folder of a depth model")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForDepthEstimation.from_pretrained(path, dtype=dtype, **_LOCAL)
        processor = AutoImageProcessor.from_pretrained(path, **_LOCAL)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"--depth-model: transformers cannot load {path} as a depth estimation model: {error}"
        ) from error
    return model.to(device).eval(), processor


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ValueError('OpenCV is not installed: pip install "ltx-titan[tools]"') from error
    # Videos are distributed over processes, so the threads of each would compete for the same cores.
    cv2.setNumThreads(1)
    return cv2


def _rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)
