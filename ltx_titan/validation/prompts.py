"""Encodes prompts to contexts once before training, so that no text encoder is in memory during training.

Rank 0 encodes and broadcasts the contexts. They are cached in a folder, so that a resumed job needs no text encoder.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
    connectors_path: str | Path | None = None,
) -> dict[str, PromptContext]:
    """Contexts of prompts on every rank; a collective call if a process group exists.

    Args:
        prompts: any texts; duplicates are encoded once.
        checkpoint_path: file with the text projection, and with the connectors unless they have a file of their own.
        text_encoder_path: folder of the text encoder; may be None, or gone, if all prompts are cached, by any encoder.
        cache_folder: folder of cached contexts.
        device: device on which rank 0 encodes.
        dtype: dtype of the encoder, the connectors and the contexts.
        connectors_path: file of the connectors; None: the checkpoint.

    Raises:
        ValueError: a prompt is not cached and `text_encoder_path` is None.
    """
    # One entry, because `broadcast_object_list` fills a list in place.
    contexts: list[dict[str, PromptContext] | None] = [None]
    if is_main_rank():
        text_encoder = None if text_encoder_path is None else Path(text_encoder_path)
        files = _Files(Path(checkpoint_path), Path(connectors_path or checkpoint_path), text_encoder)
        contexts = [_load_or_encode(prompts, files, Path(cache_folder), device, dtype)]
    if is_distributed():
        dist.broadcast_object_list(contexts, src=0)
    assert contexts[0] is not None
    return contexts[0]


def default_negative_prompt() -> str:
    """Negative prompt of the released pipelines: a list of defects."""
    # Not copied: the list is long, and diffusers ships that of the released pipelines.
    from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

    return DEFAULT_NEGATIVE_PROMPT


@dataclass(frozen=True)
class _Files:
    """Files that contexts are made with."""

    checkpoint: Path
    connectors: Path
    text_encoder: Path | None

    def cached(self, prompt: str, folder: Path) -> Path:
        """The file of a prompt's context: named after the prompt and all that it is made with.

        Without a text encoder, or if it is gone, the newest that any of them has made: a resumed job may have none.
        """
        models = [_version(path) for path in dict.fromkeys((self.checkpoint, self.connectors))]
        name = _digest("\0".join([prompt, *models]))
        if self.text_encoder is not None and self.text_encoder.exists():
            return folder / f"{name}-{_digest(_version(self.text_encoder))}.pt"
        made = sorted(folder.glob(f"{name}-*.pt"), key=lambda path: path.stat().st_mtime_ns)
        return made[-1] if made else folder / f"{name}.pt"


def _load_or_encode(
    prompts: Sequence[str], models: _Files, folder: Path, device: str | torch.device, dtype: torch.dtype
) -> dict[str, PromptContext]:
    files = {prompt: models.cached(prompt, folder) for prompt in dict.fromkeys(prompts)}
    found = {prompt: _read(path) for prompt, path in files.items()}
    missing = [prompt for prompt, context in found.items() if context is None]
    if missing:
        if models.text_encoder is None:
            raise ValueError(
                f"validation.text_encoder_path is unset, but prompt {missing[0]!r} is not in {folder}; set it to "
                "the folder of the checkpoint's text encoder."
            )
        logger.info("encoding %d prompts", len(missing))
        for prompt, context in _encode(missing, models, models.text_encoder, device, dtype).items():
            _write(files[prompt], context)
            # From the file, also right after encoding: a resumed job then sees the same bits.
            found[prompt] = _read(files[prompt])
    return {prompt: context for prompt, context in found.items() if context is not None}


def _read(path: Path) -> PromptContext | None:
    """Reads a cached context; None if it is missing or damaged, and then it is made again."""
    if not path.is_file():
        return None
    try:
        video, audio = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything, also in the zip and pickle modules
        logger.warning("%s: damaged, its prompt is encoded again (%s)", path, str(error).split("\n")[0])
        return None
    return video, audio


@torch.no_grad()
def _encode(
    prompts: Sequence[str],
    models: _Files,
    text_encoder_path: Path,
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
    extractor = load_feature_extractor(models.checkpoint, text_encoder, device, dtype)
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
    connectors = load_text_connectors(models.connectors, device, dtype, models.checkpoint)
    # Contexts are stored without a mask, so padding would be attended to.
    if not connectors.fills_padding:
        raise ValueError(f"{models.connectors}: its connectors keep padding tokens, which sampling does not support.")
    contexts = {}
    for prompt, fields in features.items():
        context = to_contexts(fields, connectors, dtype)
        contexts[prompt] = (context["video_prompt_embeds"].cpu(), context["audio_prompt_embeds"].cpu())
    del connectors
    free_device_memory()
    return contexts


def _version(path: Path) -> str:
    """Identifies a model by path, sizes and modification times of its files: hashing 40 GB is slow."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return "\0".join([str(path.resolve()), *stamps])


def _digest(text: str) -> str:
    # Prompts of files in other encodings may hold half of a surrogate pair.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _write(path: Path, context: PromptContext) -> None:
    # Through a file object: given a path, torch.save stores its name, and the bytes would depend on the process.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(list(context), file)
