"""The miniature pack in LTX-2.5's layout: `make-nano --shape 2.5`.

Four files in the folders of the release: the transformer with its connectors, a Gemma 4 with tokenizer and text
projection packed into one file, the video VAE with its convolutional decoder, and the audio VAE with the vocoder. The
codecs are those of the LTX-2.3 pack, as in the release; the transformer has the keyframe embedding and no bias in the
feed-forward layers of the video.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.nano.pack import audio_vae_tensors, module_tensors, video_vae_tensors, vocoder_tensors
from ltx_titan.nano.pack_config import CONFIG
from ltx_titan.nano.text_encoder import SPECIAL_TOKENS
from ltx_titan.weights import released_config, save_safetensors
from ltx_titan.weights.names import TRANSFORMER_PREFIX

GEMMA_VERSION = "gemma4-12b-ltx-v1"
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "gemma4_unified_text",
    "vocab_size": len(SPECIAL_TOKENS) + 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA_CONFIG = {"model_type": "gemma4_unified", "gemma_version": GEMMA_VERSION, "text_config": TEXT_CONFIG}
# The transformer's file states the text encoder that it was trained with.
SOURCE = json.dumps({"ltx_version": "2.5.0", "gemma_version": GEMMA_VERSION})


class SplitPack(NamedTuple):
    """Files of the pack."""

    transformer: Path
    text_encoder: Path
    video_vae: Path
    audio_vae: Path


def make_split_nano(folder: str | Path, seed: int = 0, codecs: Mapping[str, Tensor] | None = None) -> SplitPack:
    """Writes the pack; the same bytes for the same seed.

    Args:
        folder: to write to; created if it does not exist.
        seed: of the weights.
        codecs: tensors of the VAEs and the vocoder, such as those of an LTX-2.3 pack; None makes new ones.
    """
    folder = Path(folder)
    files = SplitPack(
        folder / "diffusion_models" / "ltx-2.5-nano-transformer-bf16.safetensors",
        folder / "text_encoders" / "gemma4-nano-with-proj-ltx-2.5-bf16.safetensors",
        folder / "vae" / "ltx-2.5-nano-video-vae-conv-bf16.safetensors",
        folder / "vae" / "ltx-2.5-nano-audio-vae-bf16.safetensors",
    )
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    released = released_config("ltx-2.5-22b")["transformer"]
    new = {key: released[key] for key in ("ff_bias", "use_keyframes_abs_pos_embedding")}
    transformer = CONFIG["transformer"] | new
    parts = LTXTransformer.from_config(transformer), TextConnectors.from_config(CONFIG)
    tensors = {name: x for part in parts for name, x in module_tensors(TRANSFORMER_PREFIX, part, seed).items()}
    versions = {"model_version": "2.5.0", "gemma_source_checkpoint": SOURCE}
    _write(files.transformer, tensors, {"transformer": transformer}, **versions)
    if codecs is None:
        codecs = video_vae_tensors(seed + 1) | audio_vae_tensors(seed + 2) | vocoder_tensors(seed + 3)
    video = {name: x for name, x in codecs.items() if name.startswith("vae.")}
    audio = {name: x for name, x in codecs.items() if name.startswith(("audio_vae.", "vocoder."))}
    _write(files.video_vae, video, {"vae": CONFIG["vae"]})
    _write(files.audio_vae, audio, {name: CONFIG[name] for name in ("audio_vae", "vocoder")})
    save_safetensors(files.text_encoder, packed_tensors(seed=seed + 4), {"gemma_config": json.dumps(GEMMA_CONFIG)})
    return files


def packed_tensors(naming: str = "model.language_model.", seed: int = 0) -> dict[str, Tensor]:
    """All tensors of the text encoder's file by name.

    Args:
        naming: prefix of the language model, of the two in circulation.
        seed: of the weights.
    """
    extractor = FeatureExtractor.from_config(CONFIG, TEXT_CONFIG)
    init_random_(extractor, seed + 1)
    tensors = {f"{naming}{name}": tensor.clone() for name, tensor in language_model(seed).state_dict().items()}
    tensors |= {f"text_embedding_projection.{name}": tensor for name, tensor in extractor.state_dict().items()}
    settings = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # Another part of a multimodal file, which is not read.
    others = "model.embed_vision.patch_dense.weight" if naming != "model." else "vision_model.patch_dense.weight"
    return tensors | {
        "tokenizer_json": _as_bytes(tokenizer().to_str()),
        "hf_asset__tokenizer_config.json": _as_bytes(json.dumps(settings)),
        others: torch.zeros(2, 2),
    }


def language_model(seed: int = 0) -> torch.nn.Module:
    """The model in the packed file, with weights that give every layer an effect."""
    model = AutoModel.from_config(AutoConfig.for_model(**TEXT_CONFIG)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator)
            # Norm weights around 1, matrices that preserve the variance.
            tensor.copy_(noise * 0.3 + 1 if tensor.ndim < 2 else noise * tensor.shape[-1] ** -0.5)
    return model


def tokenizer() -> Tokenizer:
    """One token per byte; like Gemma 4's, it adds no BOS."""
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(vocabulary)}
    found = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return found


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], **versions: str) -> None:
    save_safetensors(path, tensors, {"config": json.dumps(config), **versions})


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
