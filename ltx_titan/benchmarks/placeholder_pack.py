"""Files of a released pack with its sizes, names and metadata, and zeros in place of weights.

They are sparse: 45 and 24 GB that take no space on a disk and no time to write. Jobs load and run them like the
official files, which is enough to measure memory; times differ, since a GPU multiplies zeros with less power.
"""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from torch import nn
from transformers import Gemma3TextConfig, Gemma3TextModel

from ltx_titan.codecs.audio_vae import audio_vae_arguments
from ltx_titan.codecs.video_vae import video_vae_layout
from ltx_titan.codecs.vocoder import build_vocoder, stored_vocoder_name
from ltx_titan.model import FeatureExtractor
from ltx_titan.nano.pack import byte_tokenizer
from ltx_titan.nano.pack_config import CONFIG
from ltx_titan.nano.random_checkpoint import VERSIONS, official_shapes
from ltx_titan.weights import TEXT_PROJECTION, released_config

Shapes = Iterable[tuple[str, tuple[int, ...]]]

SHAPE = "ltx-2.3-22b"
_GEMMA = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 1024,
    "vocab_size": 262208,
}


def _blocks(*blocks: tuple[str, int]) -> list[Any]:
    return [[name, {"num_layers" if name == "res_x" else "multiplier": value}] for name, value in blocks]


# Of the LTX-2.3 file, as far as sizes depend on them.
CODECS: dict[str, Any] = {
    "vae": {
        "_class_name": "CausalVideoAutoencoder",
        "latent_channels": 128,
        "patch_size": 4,
        "spatial_padding_mode": "zeros",
        "causal_decoder": False,
        "timestep_conditioning": False,
        "decoder_base_channels": 128,
        "encoder_blocks": _blocks(
            *(("res_x", 4), ("compress_space_res", 2), ("res_x", 6), ("compress_time_res", 2), ("res_x", 4)),
            *(("compress_all_res", 2), ("res_x", 2), ("compress_all_res", 1), ("res_x", 2)),
        ),
        "decoder_blocks": _blocks(
            *(("res_x", 4), ("compress_space", 2), ("res_x", 6), ("compress_time", 2), ("res_x", 4)),
            *(("compress_all", 1), ("res_x", 2), ("compress_all", 2), ("res_x", 2)),
        ),
    },
    "audio_vae": {
        "model": {
            "params": {
                "ddconfig": {
                    **CONFIG["audio_vae"]["model"]["params"]["ddconfig"],
                    "ch_mult": [1, 2, 4],
                    "num_res_blocks": 2,
                },
                "sampling_rate": 16000,
            }
        },
    },
    "vocoder": {
        "vocoder": {
            "upsample_initial_channel": 1536,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        },
        "bwe": {
            "upsample_initial_channel": 512,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "hop_length": 80,
            "n_fft": 512,
            "win_size": 512,
            "num_mels": 64,
        },
    },
}


def write_pack(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    gemma: dict[str, Any] | None = None,
    num_layers: int | None = None,
) -> tuple[Path, Path]:
    """Writes checkpoint and text encoder.

    Args:
        folder: folder to write to.
        config: of the checkpoint's metadata; None for LTX-2.3.
        gemma: sizes of the text encoder; None for Gemma 3 12B.
        num_layers: blocks of the transformer; None keeps all.

    Returns:
        Path of the checkpoint, and folder of the text encoder.
    """
    config = config or released_config(SHAPE) | CODECS
    if num_layers is not None:
        config["transformer"] = config["transformer"] | {"num_layers": num_layers}
    gemma = _GEMMA if gemma is None else gemma
    checkpoint = folder / f"{SHAPE}-placeholder.safetensors"
    metadata = {"config": json.dumps(config), "model_version": VERSIONS[SHAPE]}
    _write_sparse(checkpoint, [*official_shapes(config, connectors=True), *_other_shapes(config, gemma)], metadata)
    return checkpoint, _write_text_encoder(folder / "text_encoder", gemma)


def _other_shapes(config: dict[str, Any], gemma: dict[str, Any]) -> Shapes:
    layout = video_vae_layout(config["vae"])
    with torch.device("meta"):
        projection = FeatureExtractor.from_config(config, gemma)
        video = AutoencoderKLLTX2Video(**layout.arguments)
        audio = AutoencoderKLLTX2Audio(**audio_vae_arguments(config["audio_vae"]))
    vocoder = build_vocoder(config["vocoder"])
    yield from ((TEXT_PROJECTION.file_key(name), shape) for name, shape in _shapes(projection))
    yield from ((f"vae.{layout.stored_name(name)}", shape) for name, shape in _shapes(video))
    yield from ((f"audio_vae.{name}", shape) for name, shape in _shapes(audio))
    yield from (("vocoder." + stored_vocoder_name(name, True), shape) for name, shape in _shapes(vocoder))
    for prefix in ("vae.", "audio_vae."):
        yield from ((f"{prefix}per_channel_statistics.{kind}-of-means", (128,)) for kind in ("mean", "std"))


def _shapes(module: nn.Module) -> Shapes:
    # Statistics have names of their own in files.
    state = module.state_dict().items()
    return [(name, tuple(tensor.shape)) for name, tensor in state if not name.startswith("latents_")]


def _write_sparse(path: Path, shapes: Shapes, metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes:
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _write_text_encoder(folder: Path, sizes: dict[str, Any]) -> Path:
    folder.mkdir()
    tokenizer = byte_tokenizer()
    config = Gemma3TextConfig(
        dtype="bfloat16",
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")},
        **sizes,
    )
    config.architectures = [Gemma3TextModel.__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = Gemma3TextModel(config)
    _write_sparse(folder / "model.safetensors", _shapes(model), {"format": "pt"})
    return folder
