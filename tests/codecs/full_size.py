"""Sections of the metadata of the published checkpoints, as far as sizes depend on them."""

from ltx_titan.benchmarks.placeholder_pack import CODECS

VIDEO_VAE_23, AUDIO_VAE, VOCODER_23 = (CODECS[name] for name in ("vae", "audio_vae", "vocoder"))


def _res(layers):
    return ["res_x", {"num_layers": layers}]


def _step(kind, multiplier, **options):
    return [kind, {"multiplier": multiplier, **options}]


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

VOCODER_19B = {
    "upsample_initial_channel": 1024,
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
}
