"""Configs of the released models, for work without their 46 GB files: random-weight runs, estimates, benchmarks, tests.

A config here has the form of a checkpoint's metadata: a `transformer` section, and enough of `vae` to derive the scale
factors. Training on a real checkpoint reads the file's own metadata instead.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from ltx_titan.weights.schema import check_config

# Common to all releases, as published in the header of the LTX-2.3 file.
_TRANSFORMER = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_type": "default",
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_in_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "caption_channels": 3840,
    "causal_temporal_positioning": True,
    "connector_attention_head_dim": 128,
    "connector_learnable_registers_std": 1.0,
    "connector_norm_output": True,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_dim": 4096,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "frequencies_precision": "float64",
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "num_attention_heads": 32,
    "num_embeds_ada_norm": 1000,
    "num_layers": 48,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 128,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
# LTX-2. Its connectors have the width of the text encoder (30 heads of 128 = 3840): captions are projected later,
# inside the transformer.
_19B = {
    "apply_gated_attention": False,
    "audio_connector_attention_head_dim": 128,
    "audio_connector_num_attention_heads": 30,
    "audio_connector_num_layers": 2,
    "connector_apply_gated_attention": False,
    "connector_num_attention_heads": 30,
    "connector_num_layers": 2,
    "cross_attention_adaln": False,
}
# LTX-2.3 and later: gated attention, nine-row AdaLN, and connectors as wide as their stream.
_22B = {
    "apply_gated_attention": True,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_num_layers": 8,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "cross_attention_adaln": True,
    "text_encoder_norm_type": "per_token_rms",
}
_25 = _22B | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}


def _vae(*blocks: tuple[str, int]) -> dict[str, Any]:
    def settings(name: str, value: int) -> dict[str, int]:
        return {"num_layers": value} if name == "res_x" else {"multiplier": value}

    return {
        "_class_name": "CausalVideoAutoencoder",
        "latent_channels": 128,
        "patch_size": 4,
        "encoder_blocks": [[name, settings(name, value)] for name, value in blocks],
    }


# Compression 8 x 32 x 32 follows from these lists (`scale_factors`): patches of 4, then three halvings of space and
# three of time.
_VAE_19B = _vae(
    *(("res_x", 4), ("compress_space_res", 2), ("res_x", 6), ("compress_time_res", 2), ("res_x", 6)),
    *(("compress_all_res", 2), ("res_x", 2), ("compress_all_res", 2), ("res_x", 2)),
)
_VAE_22B = _vae(
    *(("res_x", 4), ("compress_space_res", 2), ("res_x", 6), ("compress_time_res", 2), ("res_x", 4)),
    *(("compress_all_res", 2), ("res_x", 2), ("compress_all_res", 1), ("res_x", 2)),
)

RELEASED = {
    "ltx-2-19b": {"transformer": _TRANSFORMER | _19B, "vae": _VAE_19B},
    "ltx-2.3-22b": {"transformer": _TRANSFORMER | _22B, "vae": _VAE_22B},
    "ltx-2.5-22b": {"transformer": _TRANSFORMER | _25, "vae": _VAE_22B},
}


def released_config(name: str | Path) -> dict[str, Any]:
    """Config object of a released model, or of a JSON file that holds one.

    Args:
        name: "ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-22b", or the path of a `.json` file with a config object
            copied from a checkpoint's metadata (with the key `transformer`).

    Returns:
        A config the caller may change.

    Raises:
        ValueError: unknown name, or a file without a `transformer` section.
    """
    if str(name) in RELEASED:
        return deepcopy(RELEASED[str(name)])
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(
            f"'{name}' is neither a released model ({', '.join(RELEASED)}) nor an existing .json config file."
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("transformer"), dict):
        raise ValueError(f"{path}: expected an object with the key 'transformer', as in a checkpoint's metadata.")
    check_config(path, config)
    return {section: {} if value is None else value for section, value in config.items()}
