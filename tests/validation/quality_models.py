"""Tiny CLIP, X-CLIP and CLAP models with random weights, in the layout of transformers."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    XCLIPConfig,
    XCLIPModel,
)

# Ids of bos, pad, eos as in RoBERTa, whose positions depend on that of padding.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
VOCABULARY = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**LAYERS, "vocab_size": len(VOCABULARY), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def tokenizer():
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    found = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, **names)


def _save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_clip(folder):
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 16}
    vision = {**LAYERS, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    path = _save(CLIPModel(config), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return path


def write_x_clip(folder):
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 16}
    mit = {"mit_hidden_size": 16, "mit_intermediate_size": 16, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
    vision = {**LAYERS, **mit, "image_size": 32, "patch_size": 16, "num_frames": 4}
    config = XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, prompt_layers=1, prompt_num_attention_heads=2
    )
    return _save(XCLIPModel(config), folder)


def write_clap(folder):
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 66}
    audio = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "window_size": 4,
    }
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    extractor = ClapFeatureExtractor(
        truncation="rand_trunc",  # of a model without fusion
        feature_size=16,
        sampling_rate=8000,
        hop_length=80,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4000,
    )
    extractor.save_pretrained(folder)
    return _save(model, folder)
