"""Sections of the metadata of the published checkpoints, as far as sizes depend on them."""


def _res(layers):
    return ["res_x", {"num_layers": layers}]


def _step(kind, multiplier, **options):
    return [kind, {"multiplier": multiplier, **options}]


VIDEO_VAE_23 = {
    "_class_name": "CausalVideoAutoencoder",
    "latent_channels": 128,
    "patch_size": 4,
    "spatial_padding_mode": "zeros",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "decoder_base_channels": 128,
    "encoder_blocks": [
        _res(4), _step("compress_space_res", 2), _res(6), _step("compress_time_res", 2), _res(4),
        _step("compress_all_res", 2), _res(2), _step("compress_all_res", 1), _res(2),
    ],
    "decoder_blocks": [
        _res(4), _step("compress_space", 2), _res(6), _step("compress_time", 2), _res(4),
        _step("compress_all", 1), _res(2), _step("compress_all", 2), _res(2),
    ],
}  # fmt: skip

VIDEO_VAE_19B = {
    "encoder_blocks": [
        _res(4), _step("compress_space_res", 2), _res(6), _step("compress_time_res", 2), _res(6),
        _step("compress_all_res", 2), _res(2), _step("compress_all_res", 2), _res(2),
    ],
    "decoder_blocks": [
        _res(5), _step("compress_all", 2, residual=True), _res(5), _step("compress_all", 2, residual=True), _res(5),
        _step("compress_all", 2, residual=True), _res(5),
    ],
}  # fmt: skip

AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 2,
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
            },
            "sampling_rate": 16000,
        }
    },
}

VOCODER_23 = {
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
}

VOCODER_19B = {
    "upsample_initial_channel": 1024,
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
}
