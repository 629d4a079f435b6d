"""Refuses combinations of mesh and options that a transformer does not support, before any process group exists.

The checks need only the transformer's sizes and the degrees of the mesh; the remedies are keys of a job file.
"""

from ltx_titan.config import ActivationCheckpointMode, Degrees
from ltx_titan.model import TransformerConfig
from ltx_titan.model.transformer import Modalities
from ltx_titan.parallel.tokens import FLOAT8_MULTIPLE


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
    problems += _float8_problems(degrees, config, modalities, float8, float8_all_gather)
    if dora and degrees.tp > 1:
        problems.append(
            f"parallelism.tp = {degrees.tp} with lora.dora = true: the norm of a weight's row spans all ranks that "
            "hold a part of it; set parallelism.tp to 1, or lora.dora to false."
        )
    if problems:
        raise ValueError("\n".join(problems))


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
