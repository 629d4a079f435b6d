"""Tiny multimodal models of transformers' own classes, random weights, saved with processors and chat templates."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<boi>{% elif part['type'] == 'audio' %}<boa><audio><eoa>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def write_vision_model(folder: Path) -> Path:
    """A Gemma 3 for images of 32x32."""
    tokenizer = _tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, _TEMPLATE, image_seq_length=4
    )
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 512}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=text | _special_ids(tokenizer),
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _write(folder, Gemma3ForConditionalGeneration(config), processor)


def write_audio_model(folder: Path) -> Path:
    """A Qwen2-Audio, which accepts audio and no images."""
    tokenizer = _tokenizer(audio_token="<audio>")
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=16000)
    processor = Qwen2AudioProcessor(
        extractor, tokenizer, _TEMPLATE, audio_token="<audio>", audio_bos_token="<boa>", audio_eos_token="<eoa>"
    )
    audio = {"num_mel_bins": 16, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1}
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2AudioConfig(
        audio_config=audio | {"encoder_ffn_dim": 16},
        text_config=text | _special_ids(tokenizer),
        audio_token_index=tokenizer.convert_tokens_to_ids("<audio>"),
    )
    return _write(folder, Qwen2AudioForConditionalGeneration(config), processor)


def write_depth_model(folder: Path) -> Path:
    """A Depth Anything for images of 28x28."""
    backbone = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone |= {"image_size": 28, "patch_size": 14, "out_features": ["stage1", "stage2"]}
    config = DepthAnythingConfig(
        backbone_config=backbone | {"apply_layernorm": True, "reshape_hidden_states": False},
        reassemble_hidden_size=16,
        patch_size=14,
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[2, 1],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    processor = DPTImageProcessorPil(size={"height": 28, "width": 28}, ensure_multiple_of=14)
    return _write(folder, DepthAnythingForDepthEstimation(config), processor)


def _tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<boi>", "<eoi>", "<image>", "<boa>", "<audio>", "<eoa>"]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + bytes_)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _write(folder: Path, model: torch.nn.Module, processor: object) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            # With the initial weights all answers are equal, whatever the input.
            parameter *= 10 if parameter.ndim > 1 else 1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
