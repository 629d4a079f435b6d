"""Configuration of the trained miniature pack: as `pack_config`, with other widths and depths.

Sizes follow what the parts must learn, within 20 MB of compressed bfloat16. The audio VAE is 128 wide, as in the
released files, because the released loader sizes its statistics by that width.
"""

from typing import Any

from ltx_titan.nano.pack_config import CONFIG

# Wider than the 128 channels of a token: a velocity contains all of its noise, which narrower layers cannot carry.
_VIDEO_WIDTH, _AUDIO_WIDTH, _HEADS = 192, 160, 4

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
}
# Words of the captions are tokens of their own, any other text is spelled in bytes.
VOCABULARY = 384
# Of contexts of 1024 tokens, most of a small model's time goes into padding: a step on a CPU takes 4.5 times as long.
# Scores are the same (docs/benchmarks/log.md). As many as there are registers.
MAX_TOKENS = 128

_TRANSFORMER: dict[str, Any] = {
    **CONFIG["transformer"],
    "num_layers": 4,
    "num_attention_heads": _HEADS,
    "attention_head_dim": _VIDEO_WIDTH // _HEADS,
    "audio_num_attention_heads": _HEADS,
    "audio_attention_head_dim": _AUDIO_WIDTH // _HEADS,
    "cross_attention_dim": _VIDEO_WIDTH,
    "audio_cross_attention_dim": _AUDIO_WIDTH,
    "caption_channels": TEXT_ENCODER["hidden_size"],
    "connector_num_attention_heads": _HEADS,
    "connector_attention_head_dim": _VIDEO_WIDTH // _HEADS,
    "audio_connector_num_attention_heads": _HEADS,
    "audio_connector_attention_head_dim": _AUDIO_WIDTH // _HEADS,
    "connector_num_layers": 1,
    "audio_connector_num_layers": 1,
}

_VIDEO_VAE: dict[str, Any] = {
    **CONFIG["vae"],
    # Residual blocks between the steps: an encoder whose first nonlinearity is at the lowest resolution is a linear
    # projection of 8x32x32 pixels to 128 numbers, which loses edges.
    "encoder_blocks": [
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
    ],
    # In reverse: 80 channels at the latents' resolution, 40 above it.
    "decoder_base_channels": 40,
    "decoder_blocks": [
        ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
    ],
}

_AUDIO_PARAMETERS = CONFIG["audio_vae"]["model"]["params"]
_AUDIO_VAE: dict[str, Any] = {
    **CONFIG["audio_vae"],
    "model": {
        "params": {
            **_AUDIO_PARAMETERS,
            "ddconfig": {**_AUDIO_PARAMETERS["ddconfig"], "ch": 128, "ch_mult": [1, 1, 1], "num_res_blocks": 0},
        }
    },
}

_GENERATOR: dict[str, Any] = {
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "stereo": True,
}
# Two generators side by side, one per channel, with zeros between them: neither hears the other's spectrogram.
MONO_WIDTH = 96
_VOCODER: dict[str, Any] = {
    "vocoder": {**CONFIG["vocoder"]["vocoder"], **_GENERATOR, "upsample_initial_channel": 2 * MONO_WIDTH},
    # Silent by design: the clips have nothing above 8 kHz to add.
    # A short window: the file holds its DFT as matrices.
    "bwe": {**CONFIG["vocoder"]["bwe"], **_GENERATOR, "upsample_initial_channel": 16, "n_fft": 160, "win_size": 160},
}

TRAINED_CONFIG: dict[str, Any] = {
    **CONFIG,
    "transformer": _TRANSFORMER,
    "vae": _VIDEO_VAE,
    "audio_vae": _AUDIO_VAE,
    "vocoder": _VOCODER,
}
