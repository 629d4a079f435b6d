from pathlib import Path

import pytest
import torch

from ltx_titan.common.hardware import GIB, GPUS
from ltx_titan.config import build_job, read_tables
from ltx_titan.estimate.placeholders import add_placeholders
from ltx_titan.estimate.small_gpu import describe_proposals, propose, recipe_for
from ltx_titan.plan import Plan, plan_job

CONFIGS = Path(__file__).parents[2] / "train_configs"


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, Plan]:
    """The usual LoRA job on clips of 6,160 and of 2,688 tokens."""
    torch.set_num_threads(1)
    found = {}
    for name, clip in (("long", (1280, 704, 49)), ("short", (768, 448, 57))):
        tables, origins = read_tables(CONFIGS / "ltx23_lora_t2v.toml", [])
        add_placeholders(tables, tmp_path_factory.mktemp("clips"), clip=clip)
        found[name] = plan_job(build_job(tables, "test", origins), 1)
    return found


@pytest.mark.parametrize(
    ("gpu", "clip", "formats", "recipe"),
    [
        ("5090", "long", ["bfloat16", "int8", "nvfp4"], "ltx23_lora_24gb"),
        ("4090", "long", ["bfloat16", "int8", "nvfp4"], "ltx23_lora_24gb"),
        ("3090", "long", ["bfloat16", "int8", "nvfp4"], "ltx23_lora_24gb"),
        ("4080", "long", ["bfloat16", "int8", "nvfp4"], "ltx23_lora_16gb"),
        ("3060", "short", ["bfloat16", "int8", "nvfp4"], "ltx23_lora_12gb"),
        ("3060", "long", [], "ltx23_lora_12gb"),
    ],
)
def test_a_small_gpu_gets_formats_that_fit_the_most_accurate_first_and_its_recipe(gpu, clip, formats, recipe, plans):
    found = propose(plans[clip], GPUS[gpu])
    assert [one.base for one in found] == formats
    assert all(one.found.memory.needed <= GPUS[gpu].memory for one in found)
    pinned = [one.pinned / GIB for one in found if one.found.setup.stream_blocks]
    assert pinned == sorted(pinned, reverse=True)
    assert recipe_for(GPUS[gpu]) == recipe
    assert (CONFIGS / f"{recipe}.toml").is_file()
    text = "\n".join(describe_proposals(plans[clip], GPUS[gpu]))
    assert recipe in text
    assert all(f"--lora.base_dtype={name}" in text for name in formats)
    assert ("use smaller ones" in text) == (not formats)
