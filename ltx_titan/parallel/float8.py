"""float8 matmuls of linear layers where they are faster, by torchao or by `model/float8_trained.py`.

Converted: attention and feed-forward layers of the blocks that read video or text tokens, 14 per block. Not converted:
layers that read audio (a clip has about a hundred audio tokens; quantization costs more than the matmul), gate logits
(one column per head), modulation, embedding and output layers. The native recipe multiplies fewer than 1,280 tokens, as
most texts have, in bfloat16.

A float8 matmul requires multiples of 16 in every dim. torchao also sums over tokens in float8, in the gradient of a
weight: `shard_tokens` pads sequences to `token_multiple`. Weights keep their dtype (float32 or bfloat16) and are
quantized on use. Only with the tensorwise recipe's float8 all-gather are they wrapped in a tensor subclass, which has
to be unwrapped before a weight is saved or exported.
"""

import dataclasses
import re
from typing import Literal

from torch import nn

from ltx_titan.model import LTXTransformer
from ltx_titan.model.float8_linear import FLOAT8_MULTIPLE
from ltx_titan.model.float8_trained import FEWEST_TRAINED_TOKENS, Float8TrainedLinear

Recipe = Literal["native", "tensorwise", "rowwise"]

# Names below a block. An adapter keeps the adapted layer as `base`; its own narrow layers are not converted.
_CONVERTED = re.compile(
    r"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)"
    r"|audio_to_video_attn\.(?:to_q|to_out\.0)|video_to_audio_attn\.to_[kv])(?:\.base)?"
)


def apply_float8(
    model: LTXTransformer,
    recipe: Recipe,
    *,
    emulate: bool,
    tp: int = 1,
    fsdp_all_gather: bool = False,
    skip_blocks: int = 0,
) -> list[str]:
    """Converts layers of `model` in place; before tensor parallelism and FSDP2. Names stay.

    Args:
        model: parameters may be on the meta device.
        recipe: torchao's, with one scale per tensor (fastest) or per row of each factor (more accurate), or "native".
        emulate: round to float8 and multiply in float32, for a CPU, which has no float8 matmuls.
        tp: degree of tensor parallelism, which divides a layer's width.
        fsdp_all_gather: FSDP2 gathers quantized weights, half the bytes of bfloat16 (tensorwise only).
        skip_blocks: first and last blocks that are not converted.

    Returns:
        Names of the converted layers.

    Raises:
        ValueError: no layer can be converted, or the recipe has no float8 all-gather.
    """
    if fsdp_all_gather and recipe != "tensorwise":
        raise ValueError(
            f"float8.all_gather: recipe {recipe!r} scales rows, which FSDP2 shards; set float8.all_gather to false, or "
            "float8.recipe to 'tensorwise'."
        )
    converted = convertible_layers(model, tp, skip_blocks)
    if not converted:
        raise ValueError(
            f"float8: no layer of this transformer (modalities={model.modalities!r}, width "
            f"{model.config.video.width}, tp={tp}) can be converted; it needs a video stream and widths that divide "
            f"by {FLOAT8_MULTIPLE} x tp, and blocks that float8.skip_blocks = {skip_blocks} leaves. Set float8.recipe "
            "to 'none'."
        )
    if recipe == "native":
        for name in converted:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            # Emulation shows what rounding does, also with few tokens.
            fewest = 0 if emulate else FEWEST_TRAINED_TOKENS
            model.set_submodule(name, Float8TrainedLinear.from_linear(layer, fewest))
        return converted
    # Imported here: torchao takes seconds to import, and most jobs do not use it.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        enable_fsdp_float8_all_gather=fsdp_all_gather,
        # Tokens are padded to multiples of 16 and text usually is one; text of another length costs a padded copy.
        pad_inner_dim=True,
    )
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in converted, config=config)
    return converted


def token_multiple(recipe: Recipe | Literal["none"]) -> int:
    """Number whose multiples a recipe needs as numbers of tokens."""
    return 1 if recipe in ("none", "native") else FLOAT8_MULTIPLE


def convertible_layers(model: LTXTransformer, tp: int, skip_blocks: int = 0) -> list[str]:
    """Names of the layers that float8 converts: linear ones that read video or text tokens, with fitting widths."""
    converted = range(skip_blocks, len(model.transformer_blocks) - skip_blocks)
    return [
        name
        for name, layer in model.named_modules()
        if (block := re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", name)) is not None
        and int(block[1]) in converted
        and _CONVERTED.fullmatch(block[2]) is not None
        and isinstance(layer, nn.Linear)
        # Both widths count: inputs are the inner dim of the forward matmul, outputs that of the input's gradient.
        and layer.in_features % (FLOAT8_MULTIPLE * tp) == 0
        and layer.out_features % (FLOAT8_MULTIPLE * tp) == 0
    ]


def precompute_float8_scales(model: nn.Module) -> None:
    """Computes the scales of all weights with one all-reduce, after an update; for the float8 all-gather only."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)
