"""Names and shapes in the released files, written down from the published tables and not from our modules.

Files of full size are made of a header and a hole: 46 GB of nothing, which take no room on the disk.
"""

import json
from pathlib import Path

D, A, GEMMA, STATES = 4096, 2048, 3840, 49
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


def _linear(name, out, inner, bias=True):
    return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def _attention(name, width, query, context, inner, gated):
    shapes = _linear(f"{name}.to_q", inner, query) | _linear(f"{name}.to_out.0", width, inner)
    shapes |= _linear(f"{name}.to_k", inner, context) | _linear(f"{name}.to_v", inner, context)
    shapes |= {f"{name}.q_norm.weight": (inner,), f"{name}.k_norm.weight": (inner,)}
    return shapes | (_linear(f"{name}.to_gate_logits", 32, query) if gated else {})


def _feed_forward(name, width, bias=True):
    return _linear(f"{name}.net.0.proj", 4 * width, width, bias) | _linear(f"{name}.net.2", width, 4 * width, bias)


def _adaln(name, width, rows):
    shapes = _linear(f"{name}.emb.timestep_embedder.linear_1", width, 256)
    return (
        shapes
        | _linear(f"{name}.emb.timestep_embedder.linear_2", width, width)
        | _linear(f"{name}.linear", rows * width, width)
    )


def _block(name, rows, gated, ff_bias):
    shapes = {f"{name}.scale_shift_table": (rows, D), f"{name}.audio_scale_shift_table": (rows, A)}
    shapes |= {f"{name}.scale_shift_table_a2v_ca_{s}": (5, w) for s, w in (("video", D), ("audio", A))}
    if gated:
        shapes |= {f"{name}.prompt_scale_shift_table": (2, D), f"{name}.audio_prompt_scale_shift_table": (2, A)}
    for attention, width, query, context, inner in (
        ("attn1", D, D, D, D),
        ("attn2", D, D, D, D),
        ("audio_attn1", A, A, A, A),
        ("audio_attn2", A, A, A, A),
        ("audio_to_video_attn", D, D, A, A),
        ("video_to_audio_attn", A, A, D, A),
    ):
        shapes |= _attention(f"{name}.{attention}", width, query, context, inner, gated)
    return shapes | _feed_forward(f"{name}.ff", D, ff_bias) | _feed_forward(f"{name}.audio_ff", A)


def transformer(release):
    """Shapes by official name."""
    is_new = release != "19B"
    rows = 9 if is_new else 6
    shapes = {"scale_shift_table": (2, D), "audio_scale_shift_table": (2, A)}
    for prefix, width in (("", D), ("audio_", A)):
        shapes |= _linear(f"{prefix}patchify_proj", width, 128) | _linear(f"{prefix}proj_out", 128, width)
        shapes |= _adaln(f"{prefix}adaln_single", width, rows)
        if is_new:
            shapes |= _adaln(f"{prefix}prompt_adaln_single", width, 2)
        else:
            shapes |= _linear(f"{prefix}caption_projection.linear_1", width, GEMMA)
            shapes |= _linear(f"{prefix}caption_projection.linear_2", width, width)
    for name, width, count in (
        ("video_scale_shift_adaln_single", D, 4),
        ("audio_scale_shift_adaln_single", A, 4),
        ("a2v_gate_adaln_single", D, 1),
        ("v2a_gate_adaln_single", A, 1),
    ):
        shapes |= _adaln(f"av_ca_{name}", width, count)
    if release == "2.5":
        shapes["keyframes_abs_pos_embedding"] = (1, D)
    for index in range(48):
        shapes |= _block(f"transformer_blocks.{index}", rows, is_new, release != "2.5")
    return shapes


def connectors(release):
    """Shapes of both text connectors by official name."""
    is_new = release != "19B"
    shapes = {}
    for stream, width in (("video", D if is_new else GEMMA), ("audio", A if is_new else GEMMA)):
        name = f"{stream}_embeddings_connector"
        shapes[f"{name}.learnable_registers"] = (128, width)
        for index in range(8 if is_new else 2):
            block = f"{name}.transformer_1d_blocks.{index}"
            shapes |= _attention(f"{block}.attn1", width, width, width, width, is_new) | _feed_forward(
                f"{block}.ff", width
            )
    return shapes


def projection(release):
    """Shapes of the text projection."""
    name, flat = "text_embedding_projection", GEMMA * STATES
    if release == "19B":
        return {f"{name}.aggregate_embed.weight": (GEMMA, flat)}
    return _linear(f"{name}.video_aggregate_embed", D, flat) | _linear(f"{name}.audio_aggregate_embed", A, flat)


def _conv(name, out, inner, kernel):
    return {f"{name}.weight": (out, inner, *kernel), f"{name}.bias": (out,)}


def video_vae(release):
    """Shapes of the convolutional video VAE, without `vae.`; `[blocks before, (strides, multiplier)]` per stage."""
    space, time, both = (1, 2, 2), (2, 1, 1), (2, 2, 2)
    if release == "19B":
        encoder = [(4, space, 2), (6, time, 2), (6, both, 2), (2, both, 2), (2, None, 1)]
        decoder = [(5, both, 2), (5, both, 2), (5, both, 2), (5, None, 1)]
    else:
        encoder = [(4, space, 2), (6, time, 2), (4, both, 2), (2, both, 1), (2, None, 1)]
        decoder = [(2, both, 2), (2, both, 1), (4, time, 2), (6, space, 2), (4, None, 1)]  # in the order they run
    cube = (3, 3, 3)
    shapes = _conv("encoder.conv_in.conv", 128, 48, cube)
    width, index = 128, 0
    for layers, strides, multiplier in encoder:
        shapes |= _res_blocks(f"encoder.down_blocks.{index}", layers, width)
        if strides is not None:
            out = width * multiplier
            inner = out // (strides[0] * strides[1] * strides[2])
            shapes |= _conv(f"encoder.down_blocks.{index + 1}.conv.conv", inner, width, cube)
            width = out
        index += 2
    shapes |= _conv("encoder.conv_out.conv", 129, width, cube)
    width, index = 1024, 0
    shapes |= _conv("decoder.conv_in.conv", width, 128, cube)
    for layers, strides, multiplier in decoder:
        shapes |= _res_blocks(f"decoder.up_blocks.{index}", layers, width)
        if strides is not None:
            out = width * strides[0] * strides[1] * strides[2] // multiplier
            shapes |= _conv(f"decoder.up_blocks.{index + 1}.conv.conv", out, width, cube)
            width //= multiplier
        index += 2
    shapes |= _conv("decoder.conv_out.conv", 48, width, cube)
    return shapes | {f"per_channel_statistics.{key}-of-means": (128,) for key in ("mean", "std")}


def _res_blocks(name, layers, width):
    shapes = {}
    for layer in range(layers):
        for conv in ("conv1", "conv2"):
            shapes |= _conv(f"{name}.res_blocks.{layer}.{conv}.conv", width, width, (3, 3, 3))
    return shapes


def audio_vae():
    """Shapes of the audio VAE, without `audio_vae.`."""
    square, widths = (3, 3), (128, 256, 512)

    def block(name, inner, out):
        shapes = _conv(f"{name}.conv1.conv", out, inner, square) | _conv(f"{name}.conv2.conv", out, out, square)
        return shapes | (_conv(f"{name}.nin_shortcut.conv", out, inner, (1, 1)) if inner != out else {})

    shapes = _conv("encoder.conv_in.conv", 128, 2, square)
    inner = 128
    for level, out in enumerate(widths):
        for index in range(2):
            shapes |= block(f"encoder.down.{level}.block.{index}", inner, out)
            inner = out
        if level < 2:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", out, out, square)
    shapes |= _conv("encoder.conv_out.conv", 16, 512, square) | _conv("decoder.conv_in.conv", 512, 8, square)
    for half in ("encoder", "decoder"):
        for index in (1, 2):
            shapes |= block(f"{half}.mid.block_{index}", 512, 512)
    for level in (2, 1, 0):
        for index in range(3):
            shapes |= block(f"decoder.up.{level}.block.{index}", inner, widths[level])
            inner = widths[level]
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv.conv", inner, inner, square)
    shapes |= _conv("decoder.conv_out.conv", 2, 128, square)
    return shapes | {f"per_channel_statistics.{key}-of-means": (128,) for key in ("mean", "std")}


def _generator(width, kernels, antialiased):
    shapes = _conv("conv_pre", width, 128, (7,))
    for stage, kernel in enumerate(kernels):
        shapes[f"ups.{stage}.weight"], shapes[f"ups.{stage}.bias"] = (width, width // 2, kernel), (width // 2,)
        width //= 2
        for place, size in enumerate((3, 7, 11)):
            name = f"resblocks.{3 * stage + place}"
            for half in (1, 2):
                for dilation in range(3):
                    shapes |= _conv(f"{name}.convs{half}.{dilation}", width, width, (size,))
                    if antialiased:
                        shapes |= _activation(f"{name}.acts{half}.{dilation}", width)
    if antialiased:
        return shapes | _activation("act_post", width) | {"conv_post.weight": (2, width, 7)}
    return shapes | _conv("conv_post", 2, width, (7,))


def _activation(name, width):
    filters = {f"{name}.upsample.filter": (1, 1, 12), f"{name}.downsample.lowpass.filter": (1, 1, 12)}
    return filters | {f"{name}.act.alpha": (width,), f"{name}.act.beta": (width,)}


def vocoder(release):
    """Shapes of the vocoder, without the first `vocoder.`."""
    if release == "19B":
        return _generator(1024, (16, 15, 8, 4, 4), antialiased=False)
    parts = {
        "vocoder": _generator(1536, (11, 4, 4, 4, 4, 4), True),
        "bwe_generator": _generator(512, (12, 11, 4, 4, 4), True),
    }
    shapes = {f"{part}.{name}": shape for part, names in parts.items() for name, shape in names.items()}
    shapes |= {f"mel_stft.stft_fn.{kind}_basis": (514, 1, 512) for kind in ("forward", "inverse")}
    return shapes | {"mel_stft.mel_basis": (64, 257)}


def prefixed(prefix, shapes):
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def one_file(release):
    """Every tensor of a one-file checkpoint."""
    return {
        **prefixed("model.diffusion_model.", transformer(release) | connectors(release)),
        **projection(release),
        **prefixed("vae.", video_vae(release)),
        **prefixed("audio_vae.", audio_vae()),
        **prefixed("vocoder.", vocoder(release)),
    }


def write_hole(path: Path, shapes, config, dtypes=None, **metadata: str) -> Path:
    """A file with this header, whose data is a hole; `dtypes` are those that are not bfloat16."""
    header, offset = {"__metadata__": {"config": json.dumps(config), **metadata}}, 0
    for name, shape in shapes.items():
        dtype, count = (dtypes or {}).get(name, "BF16"), 1
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count * BYTES[dtype]]}
        offset += count * BYTES[dtype]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path
