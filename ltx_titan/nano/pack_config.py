"""Configuration of the miniature pack: every component of LTX-2.3, as small as its layout allows.

Everything that data and positions depend on is as published: 8 x 32 x 32 pixels per latent, 128 video channels, 8 x 16
audio channels, 25 audio steps per second, 16 kHz to 48 kHz, 1024 text tokens, 128 registers. Widths and depths are
reduced. Both streams have 8 heads, which tensor parallelism over 2, 4 and 8 ranks can divide.
"""

from typing import Any

MODEL_VERSION = "2.3.0"

_VIDEO_WIDTH, _AUDIO_WIDTH = 128, 64

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
}

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "num_layers": 2,
    "num_attention_heads": 8,
    "attention_head_dim": _VIDEO_WIDTH // 8,
    "audio_num_attention_heads": 8,
    "audio_attention_head_dim": _AUDIO_WIDTH // 8,
    "in_channels": 128,
    "out_channels": 128,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "cross_attention_dim": _VIDEO_WIDTH,
    "audio_cross_attention_dim": _AUDIO_WIDTH,
    "caption_channels": TEXT_ENCODER["hidden_size"],
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "causal_temporal_positioning": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "rope_type": "split",
    "frequencies_precision": "float64",
    "use_middle_indices_grid": True,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "share_ff": False,
    "upcast_attention": False,
    "use_linear_projection": False,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "text_encoder_norm_type": "per_token_rms",
    "use_embeddings_connector": True,
    "connector_num_attention_heads": 8,
    "connector_attention_head_dim": _VIDEO_WIDTH // 8,
    "audio_connector_num_attention_heads": 8,
    "audio_connector_attention_head_dim": _AUDIO_WIDTH // 8,
    "connector_num_layers": 1,
    "audio_connector_num_layers": 1,
    "connector_num_learnable_registers": 128,
    "connector_learnable_registers_std": 1,
    "connector_positional_embedding_max_pos": [4096],
    "connector_apply_gated_attention": True,
    "connector_norm_output": True,
}

# Residual blocks are where the resolution is lowest: on the outer levels one would cost more than all the rest.
_VIDEO_VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "patch_size": 4,
    "latent_log_var": "uniform",
    "norm_layer": "pixel_norm",
    "spatial_padding_mode": "zeros",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "scaling_factor": 1.0,
    "use_quant_conv": False,
    "normalize_latent_channels": False,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "decoder_base_channels": 8,
    "decoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_space", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_time", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
    ],
}

_AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                # As released, whose loader sizes the statistics by it; hence few layers.
                "ch": 128,
                "ch_mult": [1, 1, 1],
                "num_res_blocks": 0,
                "in_channels": 2,
                "out_ch": 2,
                "z_channels": 8,
                "double_z": True,
                "mel_bins": 64,
                "resolution": 256,
                "attn_resolutions": [],
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
                "dropout": 0.0,
                "downsample_time": False,
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        "audio": {"sampling_rate": 16000, "max_wav_value": 32768, "duration": 5.12, "stereo": True},
    },
}

_GENERATOR: dict[str, Any] = {
    "resblock": "AMP1",
    # Three dilations each, which released loaders expect; of the released kernel sizes 3, 7 and 11 one.
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "stereo": True,
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}

_VOCODER: dict[str, Any] = {
    "vocoder": {
        **_GENERATOR,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 4, 4, 2],
        "upsample_kernel_sizes": [11, 8, 8, 4],
    },
    "bwe": {
        **_GENERATOR,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 4, 2],
        "upsample_kernel_sizes": [12, 11, 8, 4],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "win_size": 512,
        "num_mels": 64,
    },
}

CONFIG: dict[str, Any] = {
    "transformer": _TRANSFORMER,
    "vae": _VIDEO_VAE,
    "audio_vae": _AUDIO_VAE,
    "vocoder": _VOCODER,
    "scheduler": {
        "_class_name": "RectifiedFlowScheduler",
        "num_train_timesteps": 1000,
        "shifting": None,
        "base_resolution": None,
        "sampler": "LinearQuadratic",
    },
}
