"""The miniature packs' Gemma 3, laid out as the released encoder: text and vision model, tokenizer, image processor."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Gemma3Config, Gemma3Model, PreTrainedTokenizerFast

from ltx_titan.weights import save_safetensors

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
IMAGE_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
# As small as the layout allows: nothing here reads images.
VISION_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
# Gemma3Model's names, and those of the released files, in which the language model is `language_model.model`.
_PREFIXES = {
    "language_model.": "language_model.model.",
    "vision_tower.": "vision_tower.",
    "multi_modal_projector.": "multi_modal_projector.",
}


def fast_tokenizer(tokenizer: Tokenizer, max_tokens: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in the form of transformers, with its special tokens and the longest text, if that has a limit."""
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, **names)


def write_gemma3(
    folder: Path,
    tokenizer: Tokenizer,
    sizes: dict[str, Any],
    seed: int,
    adjust: Callable[[str, Tensor], None] = lambda name, parameter: None,
    max_tokens: int | None = None,
) -> None:
    """Writes a tiny Gemma 3 with seeded random weights, and its tokenizer.

    Args:
        folder: to write to; an existing one is replaced.
        tokenizer: whose vocabulary holds `SPECIAL_TOKENS` and `IMAGE_TOKENS`.
        sizes: of the language model.
        seed: of the weights.
        adjust: changes a parameter in place after it was drawn.
        max_tokens: longest text, as the tokenizer states it.
    """
    ids = tokenizer.get_vocab()
    config = Gemma3Config(
        text_config={
            **sizes,
            "vocab_size": len(ids),
            "pad_token_id": ids["<pad>"],
            "eos_token_id": ids["<eos>"],
            "bos_token_id": ids["<bos>"],
        },
        vision_config=VISION_TOWER,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        dtype="bfloat16",
        architectures=["Gemma3ForConditionalGeneration"],
    )
    model = Gemma3Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Gemma scales embeddings by the square root of the width, and norms by one plus their weight.
            std = 0.02 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            adjust(name, parameter)
    tensors = {}
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        tensors[_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor.contiguous()
    side = VISION_TOWER["image_size"]
    image = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": side, "width": side},
        "image_seq_length": 4,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    # In the same file system, so that the finished folder can be renamed into place.
    with TemporaryDirectory(dir=folder.parent) as parent:
        temporary = Path(parent) / folder.name
        config.save_pretrained(temporary)
        save_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"})
        fast_tokenizer(tokenizer, max_tokens).save_pretrained(temporary)
        for name, content in (("preprocessor_config", image), ("processor_config", processor)):
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
