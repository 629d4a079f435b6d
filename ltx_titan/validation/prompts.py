"""Encodes prompts to contexts once before training, so that no text encoder is in memory during training.

Rank 0 encodes and broadcasts the contexts. They are cached in a folder, so that a resumed job needs no text encoder.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_titan.codecs import encode_by_layers, load_feature_extractor, load_text_encoder
from ltx_titan.common.files import atomic_write
from ltx_titan.common.hardware import GIB
from ltx_titan.common.ranks import is_distributed, is_main_rank
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.conditioning import to_contexts
from ltx_titan.data.fingerprints import model_digest
from ltx_titan.validation.room import memory_left
from ltx_titan.weights import load_text_connectors

logger = logging.getLogger(__name__)

# Memory that the states of all layers and their projection need: 3 GB and 2.3 GB of the released models.
_BESIDE_ENCODER = 6 * GIB

PromptContext = tuple[Tensor, Tensor]
"""Context of the video stream and of the audio stream [1, T, D], on the host."""


def prompt_contexts(
    prompts: Sequence[str],
    *,
    checkpoint_path: str | Path,
    text_encoder_path: str | Path | None,
    cache_folder: str | Path,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, PromptContext]:
    """Contexts of prompts on every rank; a collective call if a process group exists.

    Cached contexts of another text encoder are made again, as far as both are known.

    Args:
        prompts: any texts; duplicates are encoded once.
        checkpoint_path: file with the text projection and the connectors.
        text_encoder_path: folder of the text encoder; may be None, or gone, if all prompts are cached.
        cache_folder: folder of cached contexts.
        device: device on which rank 0 encodes.
        dtype: dtype of the encoder, the connectors and the contexts.

    Raises:
        ValueError: a prompt is not cached and `text_encoder_path` is None.
    """
    # One entry, because `broadcast_object_list` fills a list in place.
    contexts: list[dict[str, PromptContext] | None] = [None]
    if is_main_rank():
        contexts = [_load_or_encode(prompts, checkpoint_path, text_encoder_path, Path(cache_folder), device, dtype)]
    if is_distributed():
        dist.broadcast_object_list(contexts, src=0)
    assert contexts[0] is not None
    return contexts[0]


def default_negative_prompt() -> str:
    """Negative prompt of the released pipelines: a list of defects."""
    # Not copied: the list is long, and diffusers ships that of the released pipelines.
    from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

    return DEFAULT_NEGATIVE_PROMPT


def _load_or_encode(
    prompts: Sequence[str],
    checkpoint_path: str | Path,
    text_encoder_path: str | Path | None,
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, PromptContext]:
    encoder = None
    if text_encoder_path is not None and Path(text_encoder_path).exists():
        encoder = model_digest(Path(text_encoder_path))
    files = {prompt: folder / f"{_digest(prompt, checkpoint_path)}.pt" for prompt in dict.fromkeys(prompts)}
    contexts = {prompt: _read(path, encoder) for prompt, path in files.items()}
    missing = [prompt for prompt, context in contexts.items() if context is None]
    if missing:
        if text_encoder_path is None:
            raise ValueError(
                f"validation.text_encoder_path is unset, but prompt {missing[0]!r} is not cached; set it to the folder "
                "of the checkpoint's text encoder."
            )
        logger.info("encoding %d prompts", len(missing))
        for prompt, context in _encode(missing, checkpoint_path, text_encoder_path, device, dtype).items():
            _write(files[prompt], context, encoder)
            # From the file, also right after encoding: a resumed job then sees the same bits.
            contexts[prompt] = _read(files[prompt], encoder)
    return {prompt: context for prompt, context in contexts.items() if context is not None}


@torch.no_grad()
def _encode(
    prompts: Sequence[str],
    checkpoint_path: str | Path,
    text_encoder_path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, PromptContext]:
    """Runs the encoder, frees it, then runs the connectors: 24 GB and 4 GB of the released models.

    On a GPU that cannot hold the encoder, each of its layers is copied there while it runs.
    """
    text_encoder = load_text_encoder(text_encoder_path, "cpu", dtype)
    size = sum(parameter.nbytes for parameter in text_encoder.model.parameters())
    if size + _BESIDE_ENCODER > memory_left(device):
        logger.info("text encoder: %.1f GiB do not fit, copied layer by layer", size / GIB)
        text_encoder = encode_by_layers(text_encoder, device)
    else:
        text_encoder.model.to(device)
    extractor = load_feature_extractor(checkpoint_path, text_encoder, device, dtype)
    features = {}
    for prompt in prompts:
        # One at a time: the hidden states of all layers take 400 MB per prompt.
        hidden_states, mask = text_encoder.encode([prompt])
        video, audio = extractor(hidden_states, mask)
        features[prompt] = {
            "video_prompt_embeds": video,
            "audio_prompt_embeds": audio,
            "prompt_attention_mask": mask,
        }
    del text_encoder, extractor
    free_device_memory()
    connectors = load_text_connectors(checkpoint_path, device, dtype)
    # Contexts are stored without a mask, so padding would be attended to.
    if not connectors.fills_padding:
        raise ValueError(f"{checkpoint_path}: its connectors keep padding tokens, which sampling does not support.")
    contexts = {}
    for prompt, fields in features.items():
        context = to_contexts(fields, connectors, dtype)
        contexts[prompt] = (context["video_prompt_embeds"].cpu(), context["audio_prompt_embeds"].cpu())
    del connectors
    free_device_memory()
    return contexts


def _digest(prompt: str, checkpoint_path: str | Path) -> str:
    """Cache key of a prompt and a checkpoint, which its size and modification time identify: hashing 40 GB is slow.

    The text encoder is not part of it: a resumed job may no longer have one. The entry names it instead.
    """
    status = Path(checkpoint_path).stat()
    key = f"{prompt}\0{Path(checkpoint_path).resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _read(path: Path, encoder: str | None) -> PromptContext | None:
    """A cached context; None if there is none, its file is damaged, or another text encoder made it."""
    try:
        # Entries of earlier versions do not name their encoder.
        video, audio, *made_by = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes can raise nearly anything, also in the zip and pickle modules
        logger.warning("%s: cannot be read (%s); its prompt is encoded again", path, str(error).partition("\n")[0])
        return None
    if encoder is not None and made_by and made_by[0] != encoder:
        return None
    return video, audio


def _write(path: Path, context: PromptContext, encoder: str | None) -> None:
    # Through a file object: given a path, torch.save stores its name, and the bytes would depend on the process.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save([*context, encoder or ""], file)
