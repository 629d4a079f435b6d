"""One prepared sample on disk: a `.pt` file per source, at the same relative path in every source folder.

The formats are those of the public LTX-2 trainer, older ones included, so data prepared by it can be used as it is.
This module converts all of them to one:

- latents of a video or image: `latents` [128, F', H', W'], `num_frames`, `height`, `width` (latent sizes), `fps`
- latents of audio: `latents` [8, T, 16], `num_time_steps`, `frequency_bins`, `duration` (seconds)
- text features, inputs of the text connectors: `video_prompt_embeds` [N, D_v], optionally `audio_prompt_embeds`
  [N, D_a], `prompt_attention_mask` [N] int64
- text contexts, outputs of the text connectors: on disk `video_context`, `audio_context`, so that no other trainer
  reads them as features; in memory `video_prompt_embeds`, `audio_prompt_embeds` without a `prompt_attention_mask`
- masks: `mask`, any tensor with one element per token, 1 = keep

Latents may have `present = False`: the sample lacks this stream and the latents are a placeholder of the right size.
"""

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ltx_titan.common.files import atomic_write

Value = Tensor | int | float | bool
Fields = dict[str, Value]
Kind = Literal["video", "audio", "latents", "text", "mask"]

# Latents of the released VAEs. Audio: mel frames of 160 samples at 16 kHz, four of them per latent step.
VIDEO_CHANNELS = 128
AUDIO_CHANNELS = 8
AUDIO_BINS = 16
AUDIO_STEPS_PER_SECOND = 25
DEFAULT_FPS = 24.0
"""Frame rate of older files, which do not store one, as in the reference trainer."""
# Beyond these, positions in time lose their meaning; as for the frame rates of a job.
_LOWEST_FPS, _HIGHEST_FPS = 0.01, 10_000.0


class UnreadableError(ValueError):
    """A file cannot be read because of its disk or its permissions; nothing is known about its content."""


def write_sample(path: str | Path, fields: Mapping[str, Value]) -> None:
    """Writes one sample file atomically; fields beyond the known ones are kept in the file.

    Raises:
        ValueError: `read_sample` would refuse the fields.
    """
    path = Path(path)
    clean = {key: _compact(value) if isinstance(value, Tensor) else value for key, value in fields.items()}
    # Checked like a sample that is read, so that a faulty one is found where it is made and not in training.
    _check_values(path, _normalize(path, clean, None))
    # Through a file object: given a path, torch.save stores its name, and the bytes would depend on the process.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(clean, file)


def read_sample(path: str | Path, kind: Kind | None = None) -> Fields:
    """Reads one sample file and checks all of it.

    Args:
        path: the file.
        kind: kind that it must be; None accepts any.

    Raises:
        ValueError: the file is missing, truncated or of another kind, or a field is missing, has a wrong type or
            shape, contradicts another or is not finite; with file, field, expected and found values, and the remedy.
    """
    return check_fields(Path(path), load_fields(path), kind)


def latents_of(fields: Fields) -> Tensor:
    """The latents of a checked sample of video or audio."""
    latents = fields["latents"]
    assert isinstance(latents, Tensor)
    return latents


def load_fields(path: str | Path) -> dict[str, Value]:
    """Reads the fields of a sample file as they were written, in any of the formats.

    Raises:
        ValueError: the file is missing, truncated or not a sample.
    """
    return _load(Path(path), mmap=False)


def check_fields(path: Path, data: dict, kind: Kind | None = None) -> Fields:
    """Converts the fields of a stored sample to the current format and checks all of them.

    Args:
        path: name of the sample in messages.
        data: as stored.
        kind: kind that it must be; None accepts any.

    Raises:
        ValueError: as `read_sample`.
    """
    fields = _normalize(path, data, kind)
    _check_values(path, fields)
    return fields


def read_shapes(path: str | Path, kind: Kind | None = None) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each field of a sample file, () for numbers, without reading the tensors' values.

    Raises:
        ValueError: as `read_sample`, for everything but the values.
    """
    path = Path(path)
    return field_shapes(path, _load(path, mmap=True), kind)


def field_shapes(path: Path, data: dict, kind: Kind | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each field of a stored sample, () for numbers; its tensors may be on the meta device.

    Raises:
        ValueError: as `read_sample`, for everything but the values.
    """
    fields = _normalize(path, data, kind)
    return {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in fields.items()}


def _compact(tensor: Tensor) -> Tensor:
    """Copies a tensor out of its storage: `torch.save` would write the whole storage of a view."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _load(path: Path, mmap: bool) -> dict:
    again = "delete the file and run the preprocessing again"
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a sample file, found 0 bytes; {again}.")
        # Read in one go, a file that is replaced in the meantime stays consistent, and a broken disk (OSError here) is
        # distinct from a broken file (an error of torch.load below).
        # torch maps a file by its name, which it requires to be UTF-8.
        is_mapped = mmap and str(path).isprintable() and _is_zip(path)
        content = str(path) if is_mapped else io.BytesIO(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a sample file, found none; run the preprocessing again.") from error
    except OSError as error:
        raise UnreadableError(
            f"{path}: cannot be read ({error.strerror}); check the disk and its permissions."
        ) from error
    try:
        if isinstance(content, io.BytesIO):
            _check_archive(content)
        # weights_only: a pickle can execute code, and datasets are downloaded. mmap reads only pages that are used.
        data = torch.load(content, map_location="cpu", weights_only=True, mmap=isinstance(content, str))
    except Exception as error:  # damaged bytes can raise nearly anything, also in the zip and pickle modules
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected a complete PyTorch file of tensors, found {reason!r}; {again}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a table of fields, found {type(data).__name__}; {again}.")
    return data


def _check_archive(content: io.BytesIO) -> None:
    """Compares a zip file's members with their checksums, which torch stores and does not check.

    A rotten bit in a latent is another number otherwise. Costs half a millisecond per MiB.

    Raises:
        ValueError, zipfile.BadZipFile: the file has changed since it was written.
    """
    if content.getbuffer()[:2] != b"PK":
        return  # older than torch 1.6, without checksums
    with zipfile.ZipFile(content) as archive:
        # torch never compresses; a member that expands to terabytes is made by hand.
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed members, which torch.save does not write")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"damaged bytes: the checksum of {name} differs")
    content.seek(0)


def _is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, as since torch 1.6; older files cannot be mapped into memory."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _normalize(path: Path, data: dict, kind: Kind | None) -> Fields:
    """Converts the known fields of a file to the current format; checks all but the tensors' values."""
    parsers: dict[str, Callable[[Path, dict], Fields]] = {
        "latents": _latents,
        "video_context": _text_contexts,  # Before features: a file with both is meant to be read without connectors.
        "video_prompt_embeds": _text_features,
        "prompt_embeds": _text_features,
        "mask": _mask,
    }
    parse = next((parse for key, parse in parsers.items() if key in data), None)
    if parse is None:
        raise _error(path, "latents, video_prompt_embeds, video_context or mask", "a sample's main field", sorted(data))
    fields = parse(path, data)
    found = _kind_of(fields)
    if kind is not None and found != kind and not (kind == "latents" and found in ("video", "audio")):
        raise ValueError(
            f"{path}: expected {kind}, found {found} ({sorted(data)}); check the folder's name in the job."
        )
    return fields


def _kind_of(fields: Fields) -> Kind:
    if "mask" in fields:
        return "mask"
    if "latents" in fields:
        return "video" if "num_frames" in fields else "audio"
    return "text"


def _latents(path: Path, data: dict) -> Fields:
    latents = _tensor(path, data, "latents", floating=True)
    if latents.ndim == 2:
        latents = _unpatchify(path, data, latents)
    if latents.ndim == 4:
        fields = _video(path, data, latents)
    elif latents.ndim == 3:
        fields = _audio(path, data, latents)
    else:
        raise _error(path, "latents", "[128, F', H', W'] for video or [8, T, 16] for audio", list(latents.shape))
    if "present" in data:
        if not isinstance(data["present"], bool):
            raise _error(path, "present", "true or false", data["present"])
        fields["present"] = data["present"]
    return fields


def _unpatchify(path: Path, data: dict, tokens: Tensor) -> Tensor:
    """Converts tokens of older files to a grid: [F' * H' * W', 128] of a video, or [T, 8 * 16] of audio.

    Feature `16 * c + m` of an audio token is channel `c` of frequency bin `m`.
    """
    if "num_frames" not in data and "num_time_steps" in data:
        shape = [data["num_time_steps"], AUDIO_CHANNELS * AUDIO_BINS]
        if list(tokens.shape) != shape:
            raise _error(path, "latents", f"tokens {shape} by num_time_steps", list(tokens.shape))
        # [T, 8 * 16] -> [T, 8, 16] -> [8, T, 16]
        return tokens.unflatten(1, (AUDIO_CHANNELS, AUDIO_BINS)).movedim(0, 1)
    sizes = [_number(path, data, key, int) for key in ("num_frames", "height", "width")]
    if list(tokens.shape) != [math.prod(sizes), VIDEO_CHANNELS]:
        expected = f"tokens {[math.prod(sizes), VIDEO_CHANNELS]} by num_frames x height x width = {sizes}"
        raise _error(path, "latents", expected, list(tokens.shape))
    # [F' * H' * W', 128] -> [128, F', H', W']; tokens are ordered by frame, row, column.
    return tokens.movedim(1, 0).unflatten(1, sizes)


def _video(path: Path, data: dict, latents: Tensor) -> Fields:
    if latents.shape[0] != VIDEO_CHANNELS or 0 in latents.shape:
        raise _error(path, "latents", f"[{VIDEO_CHANNELS}, F', H', W']", list(latents.shape))
    sizes = dict(zip(("num_frames", "height", "width"), latents.shape[1:], strict=True))
    # Sizes are redundant, and a file that contradicts itself was written by a faulty script.
    for key, size in sizes.items():
        if key in data and _number(path, data, key, int) != size:
            raise _error(path, key, f"the latents' own size {size} (shape {list(latents.shape)})", data[key])
    fps = float(_number(path, data, "fps", (int, float))) if data.get("fps") is not None else DEFAULT_FPS
    if not _LOWEST_FPS <= fps <= _HIGHEST_FPS:
        raise _error(path, "fps", f"a positive number, {_LOWEST_FPS} to {_HIGHEST_FPS:g}", fps)
    return {"latents": latents, **sizes, "fps": fps}


def _audio(path: Path, data: dict, latents: Tensor) -> Fields:
    channels, steps, bins = latents.shape
    if (channels, bins) != (AUDIO_CHANNELS, AUDIO_BINS) or steps == 0:
        raise _error(path, "latents", f"[{AUDIO_CHANNELS}, T, {AUDIO_BINS}]", list(latents.shape))
    for key, size in (("num_time_steps", steps), ("frequency_bins", bins)):
        if key in data and _number(path, data, key, int) != size:
            raise _error(path, key, f"the latents' own size {size} (shape {list(latents.shape)})", data[key])
    seconds = steps / AUDIO_STEPS_PER_SECOND
    duration = float(_number(path, data, "duration", (int, float))) if data.get("duration") is not None else seconds
    if not (math.isfinite(duration) and duration > 0):
        raise _error(path, "duration", "a positive number of seconds", duration)
    return {"latents": latents, "num_time_steps": steps, "frequency_bins": bins, "duration": duration}


def _text_features(path: Path, data: dict) -> Fields:
    # The older format has one tensor for both streams; without audio features the video's are used for both.
    video = _tensor(path, data, "video_prompt_embeds" if "video_prompt_embeds" in data else "prompt_embeds", True)
    fields = _text(path, data, video, "audio_prompt_embeds")
    mask = _tensor(path, data, "prompt_attention_mask", floating=False)
    if mask.shape != video.shape[:1]:
        raise _error(path, "prompt_attention_mask", f"one element per token, {list(video.shape[:1])}", list(mask.shape))
    return fields | {"prompt_attention_mask": mask.to(torch.int64)}


def _text_contexts(path: Path, data: dict) -> Fields:
    return _text(path, data, _tensor(path, data, "video_context", floating=True), "audio_context")


def _text(path: Path, data: dict, video: Tensor, audio_key: str) -> Fields:
    tensors = {"video_prompt_embeds": video}
    if data.get(audio_key) is not None:
        tensors["audio_prompt_embeds"] = _tensor(path, data, audio_key, floating=True)
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.shape[0] != video.shape[0]:
            raise _error(path, key, "[tokens, width], as many tokens for both streams", list(tensor.shape))
    return {**tensors}


def _mask(path: Path, data: dict) -> Fields:
    mask = _tensor(path, data, "mask", floating=None)
    if mask.numel() == 0:
        raise _error(path, "mask", "one element per token", list(mask.shape))
    return {"mask": mask.to(torch.float32)}


def _check_values(path: Path, fields: Fields) -> None:
    for key, value in fields.items():
        # One NaN would make the loss and gradients of its whole global batch NaN.
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise _error(path, key, "finite values", f"{count} of {value.numel()} NaN or infinite")
    mask = fields.get("prompt_attention_mask")
    if isinstance(mask, Tensor) and not ((mask == 0) | (mask == 1)).all():
        raise _error(path, "prompt_attention_mask", "0 or 1", f"values from {int(mask.min())} to {int(mask.max())}")


def _tensor(path: Path, data: dict, key: str, floating: bool | None) -> Tensor:
    """Returns `data[key]`, a tensor: floating-point if `floating`, integer if False, either if None."""
    value = data.get(key)
    if not isinstance(value, Tensor):
        found = f"only {sorted(data)}" if key not in data else type(value).__name__
        raise _error(path, key, "a tensor", found)
    if floating is not None and (value.is_complex() or value.is_floating_point() != floating):
        raise _error(path, key, "floating-point values" if floating else "whole numbers", value.dtype)
    return value.detach()


def _number(path: Path, data: dict, key: str, types: type[int] | tuple[type[int], type[float]]) -> int | float:
    value = data.get(key)
    # Older files store numbers as tensors.
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    # A bool is an int to Python.
    if isinstance(value, bool) or not isinstance(value, types):
        raise _error(path, key, "an integer" if types is int else "a number", value)
    return value


def _error(path: Path, key: str, expected: str, found: object) -> ValueError:
    return ValueError(
        f"{path}: {key}: expected {expected}, found {found}; delete the file and run the preprocessing again."
    )
