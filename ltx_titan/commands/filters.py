"""What a reference video shows of its clip: edges, grey values, a blur, or depth.

A filter takes the clip frame by frame and gives as many frames, of the same size, so that reference and clip stay
aligned in every pixel and every frame. Depth is the exception to frame by frame: it is scaled over the whole clip,
because nearest and farthest points of single frames would make it flicker.
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
"""Frames uint8 [H, W, 3] in, as many of the same size out."""


def edges(low: float = 100, high: float = 200) -> Filter:
    """Canny edges, white on black.

    Args:
        low: gradients below are no edge.
        high: gradients above are one; those between are if they touch one.
    """
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            yield _three(cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), low, high))

    return apply


def grey() -> Filter:
    """Luminance, for colouring."""
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            yield _three(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))

    return apply


def blur(strength: float = 0.01) -> Filter:
    """Gaussian blur, for sharpening.

    Args:
        strength: standard deviation, as a part of the frame's shorter side, so that clips of all sizes lose the same.
    """
    cv2 = _opencv()

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        for frame in frames:
            yield cv2.GaussianBlur(frame, (0, 0), max(0.3, strength * min(frame.shape[:2])))

    return apply


def depth(model_path: str | Path, device: str = "cpu", batch_size: int = 8) -> Filter:
    """Depth by a model of transformers, near is white.

    Args:
        model_path: local folder of a depth estimation model (Depth Anything, DPT, ZoeDepth, Depth Pro, ...).
        device: where it runs.
        batch_size: frames at a time.

    Raises:
        ValueError: the folder holds no such model.
    """
    model, processor = _depth_model(Path(model_path), device)
    # Models of distances in metres give far points large values; relative ones give them small values.
    config = model.config.to_dict()
    is_distance = config.get("depth_estimation_type") == "metric" or model.config.model_type in (
        "zoedepth",
        "depth_pro",
    )

    @torch.no_grad()
    def estimate(batch: list[np.ndarray]) -> Tensor:
        inputs = processor(images=batch, return_tensors="pt").to(device, model.dtype)
        found = model(**inputs).predicted_depth.float()
        found = found[:, 0] if found.ndim == 4 else found
        return 1 / found.clamp(min=1e-3) if is_distance else found

    def apply(frames: Frames) -> Iterator[np.ndarray]:
        remaining, size, found = iter(frames), None, []
        while batch := list(islice(remaining, batch_size)):
            size = batch[0].shape[:2]
            # At the model's own size and in half precision: a clip of 121 frames is some 60 MB.
            found.append(estimate(batch).half().cpu())
        if size is None:
            return
        low = min(float(part.min()) for part in found)
        high = max(float(part.max()) for part in found)
        for part in found:
            scaled = (part.float() - low) / max(high - low, 1e-6)
            for frame in F.interpolate(scaled[:, None], size, mode="bicubic", align_corners=False)[:, 0]:
                yield _three((frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy())

    return apply


def _depth_model(path: Path, device: str) -> tuple[Any, Any]:
    # Here, because transformers takes seconds to import and the other filters need none of it.
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    if not (path / "config.json").is_file():
        raise ValueError(f"--depth-model: {path} has no config.json; expected a local folder of a depth model")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForDepthEstimation.from_pretrained(path, dtype=dtype, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"--depth-model: {path} is no depth estimation model that transformers reads: {error}"
        ) from error
    return model.to(device).eval(), processor


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ValueError('needs OpenCV: pip install "ltx-titan[tools]"') from error
    # Videos are spread over processes; threads of each on all cores would get in each other's way.
    cv2.setNumThreads(1)
    return cv2


def _three(grey_values: np.ndarray) -> np.ndarray:
    return np.repeat(grey_values[:, :, None], 3, axis=2)
