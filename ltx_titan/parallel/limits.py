"""Refuses combinations of mesh and options that a transformer does not support, before any process group exists.

The checks need the transformer's sizes, or its parameters on the meta device, and the degrees of the mesh; the remedies
are keys of a job file.
"""

from collections.abc import Callable, Sequence
from math import gcd

from ltx_titan.config import ActivationCheckpointMode, Degrees
from ltx_titan.model import LTXTransformer, TransformerConfig
from ltx_titan.model.float8_linear import FLOAT8_MULTIPLE
from ltx_titan.model.transformer import Modalities
from ltx_titan.parallel.float8 import convertible_layers
from ltx_titan.parallel.tp import shard_shape


def check_parallelism(
    degrees: Degrees,
    config: TransformerConfig,
    modalities: Modalities,
    *,
    recompute: ActivationCheckpointMode = "none",
    k: int = 1,
    offload: bool = False,
    float8: str = "none",
    float8_all_gather: bool = False,
    dora: bool = False,
    stream_blocks: int = 0,
) -> None:
    """Checks the mesh and the options against the transformer.

    Args:
        degrees: sizes of the mesh axes.
        config: of the transformer.
        modalities: streams that the transformer has.
        recompute, k, offload: as in `[activation_checkpoint]`.
        float8: recipe, or "none".
        float8_all_gather: FSDP2 gathers float8 weights.
        dora: adapters learn each output's magnitude separately.
        stream_blocks: blocks whose frozen weights are on the device at a time; 0 for all.

    Raises:
        ValueError: one line for each unsupported combination: keys, values, reason and remedy.
    """
    problems = []
    # cp exchanges the heads that tp left on a rank, so the product has to divide. Both streams have equally many heads.
    heads, shares = config.video.heads, degrees.tp * degrees.cp
    if heads % shares != 0:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        problems.append(
            f"parallelism.tp x parallelism.cp = {degrees.tp} x {degrees.cp} = {shares}: attention heads are sharded, "
            f"and {shares} does not divide this transformer's {heads}; choose degrees whose product is in {fitting}."
        )
    if degrees.cp > 1 and modalities == "audio":
        problems.append(
            f"parallelism.cp = {degrees.cp}: context parallelism shards video tokens, and this job has audio only; "
            "set it to 1."
        )
    if offload and recompute not in ("full", "every_k"):
        problems.append(
            f"activation_checkpoint.offload = true with mode = {recompute!r}: offloading moves the inputs of "
            "recomputed blocks to host memory; set activation_checkpoint.mode to 'full' or 'every_k', or "
            "offload to false."
        )
    if recompute == "every_k" and k > config.num_layers:
        problems.append(
            f"activation_checkpoint.k = {k}: the transformer has {config.num_layers} blocks; set it to at most that."
        )
    if stream_blocks >= config.num_layers:
        problems.append(
            f"parallelism.stream_blocks = {stream_blocks}: the transformer has {config.num_layers} blocks, and at "
            "least one must be in host memory; lower it, or set it to 0 to keep all blocks on the GPU."
        )
    problems += _float8_problems(degrees, config, modalities, float8, float8_all_gather)
    if dora and degrees.tp > 1:
        problems.append(
            f"parallelism.tp = {degrees.tp} with lora.dora = true: the norm of a weight's row spans all ranks that "
            "hold a part of it; set parallelism.tp to 1, or lora.dora to false."
        )
    if problems:
        raise ValueError("\n".join(problems))


def check_sharding(
    model: LTXTransformer,
    degrees: Degrees,
    *,
    float8: str = "none",
    float8_all_gather: bool = False,
    float8_skip_blocks: int = 0,
    cuts_moments: Callable[[Sequence[int], Sequence[int]], bool] | None = None,
) -> None:
    """Checks that every parameter of a transformer divides over the mesh.

    FSDP2 shards rows unevenly where it has to; tensor parallelism and what computes with whole blocks or rows cannot.

    Args:
        model: with its adapters and its base in the job's form, on the meta device, not parallelized yet.
        degrees: sizes of the mesh axes.
        float8: recipe, or "none".
        float8_all_gather: FSDP2 gathers float8 weights.
        float8_skip_blocks: first and last blocks that stay in bfloat16.
        cuts_moments: whether a shard (second) of a trained parameter of a shape (first) cuts a block of its moments;
            None if the optimizer has no blocks.

    Raises:
        ValueError: one line for each kind of parameter that does not divide: keys, values, reason and remedy.
    """
    uneven, blocks = [], []
    for name, parameter in model.named_parameters():
        shape = shard_shape(name, parameter.shape, degrees.tp)
        if shape is None:
            uneven.append(f"{name} {list(parameter.shape)}")
        elif cuts_moments is not None and parameter.requires_grad and cuts_moments(parameter.shape, shape):
            blocks.append(f"{name} {list(parameter.shape)}")
    problems = []
    if uneven:
        problems.append(
            f"parallelism.tp = {degrees.tp} does not divide {len(uneven)} parameters, for example {uneven[0]}; lower "
            "it, or, if the parameter is the scale or data of a quantized weight, choose another lora.base_dtype."
        )
    if blocks:
        problems.append(
            f"parallelism.tp = {degrees.tp} cuts through blocks of columns that share a scale of the optimizer's "
            f"moments in {len(blocks)} weights, for example {blocks[0]}; lower it, or set optimizer.name to 'adamw'."
        )
    if float8 != "none":
        problems += _float8_row_problems(model, degrees, float8_all_gather, float8_skip_blocks)
    if problems:
        raise ValueError("\n".join(problems))


def _float8_row_problems(model: LTXTransformer, degrees: Degrees, all_gather: bool, skip_blocks: int) -> list[str]:
    layers = convertible_layers(model, degrees.tp, skip_blocks)
    if not layers:
        return [
            "float8.recipe: no layer can be converted: its base is quantized (lora.base_dtype), its widths do not "
            f"divide by {FLOAT8_MULTIPLE} x tp, or float8.skip_blocks = {skip_blocks} leaves none of "
            f"{len(model.transformer_blocks)} blocks; set float8.recipe to 'none'."
        ]
    if not all_gather:
        return []
    # The sum of this rank's rows is gathered as bytes of one size, without FSDP2's padding.
    ranks = degrees.dp_shard * degrees.cp
    weights = {name: model.get_parameter(f"{name}.weight") for name in layers}
    rows = {name: shard_shape(f"{name}.weight", weight.shape, degrees.tp) for name, weight in weights.items()}
    uneven = [f"{name} ({shape[0]} rows)" for name, shape in rows.items() if shape is not None and shape[0] % ranks]
    if not uneven:
        return []
    fitting = gcd(*(shape[0] for shape in rows.values() if shape is not None))
    return [
        f"float8.all_gather = true on dp_shard x cp = {degrees.dp_shard} x {degrees.cp} = {ranks} ranks: they gather "
        f"equally many rows, and {ranks} does not divide those of {len(uneven)} layers, for example {uneven[0]}; "
        f"choose a number of sharding ranks that divides {fitting} (parallelism.dp_replicate takes the rest), or set "
        "float8.all_gather to false."
    ]


def _float8_problems(
    degrees: Degrees, config: TransformerConfig, modalities: Modalities, recipe: str, all_gather: bool
) -> list[str]:
    if recipe == "none":
        return []
    problems = []
    if modalities == "audio":
        problems.append(
            f"float8.recipe = {recipe!r}: float8 is for layers that read video tokens, and this job has audio only; "
            "set it to 'none'."
        )
    # tp divides one of the two widths of every converted layer, and the quotient is a dim of a float8 matmul.
    unit = FLOAT8_MULTIPLE * degrees.tp
    if modalities != "audio" and (config.video.width % unit or config.audio.width % unit):
        problems.append(
            f"float8.recipe = {recipe!r} with parallelism.tp = {degrees.tp}: float8 matmuls need widths that divide "
            f"by {FLOAT8_MULTIPLE} x tp = {unit}, found {config.video.width} and {config.audio.width}; set "
            "float8.recipe to 'none'."
        )
    if all_gather and recipe != "tensorwise":
        problems.append(
            f"float8.all_gather = true with float8.recipe = {recipe!r}: FSDP2 shards the rows that are scaled; set "
            "float8.recipe to 'tensorwise', or float8.all_gather to false."
        )
    return problems
