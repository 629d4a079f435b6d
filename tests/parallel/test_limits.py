import logging
import shutil
from functools import cache

import pytest
import torch

from ltx_titan.config import Degrees, LoRASection, load_job
from ltx_titan.data import write_sample
from ltx_titan.lora import apply_lora
from ltx_titan.model import LTXTransformer, TransformerConfig
from ltx_titan.optim.sharding import cuts_blocks
from ltx_titan.parallel.limits import check_parallelism, check_sharding
from ltx_titan.plan import build_transformer, plan_job
from ltx_titan.weights import read_source
from tests.jobs import write_dataset, write_job

CONFIG = TransformerConfig.from_metadata({})


def named(value: object) -> str:
    """An id that is the same in every process: functions by name."""
    return str({key: getattr(v, "__name__", v) for key, v in value.items()} if isinstance(value, dict) else value)


@pytest.mark.parametrize("degrees", [Degrees(tp=8, cp=4), Degrees(dp_replicate=3, dp_shard=5), Degrees(cp=32)], ids=str)
def test_what_works_is_let_through(degrees):
    check_parallelism(degrees, CONFIG, "av", recompute="full", offload=True, float8="tensorwise")


@pytest.mark.parametrize(
    ("degrees", "modalities", "settings", "message"),
    [
        (Degrees(tp=3), "av", {}, r"tp x parallelism\.cp = 3 x 1 = 3.* 32; choose .*\[1, 2, 4, 8, 16, 32\]"),
        (Degrees(tp=8, cp=8), "av", {}, r"= 8 x 8 = 64"),
        (Degrees(cp=2), "audio", {}, r"parallelism\.cp = 2.*audio only"),
        (Degrees(), "av", {"recompute": "selective", "offload": True}, r"offload = true with mode = 'selective'"),
        (Degrees(), "av", {"recompute": "every_k", "k": 49}, r"activation_checkpoint\.k = 49.*48 blocks"),
        (Degrees(), "audio", {"float8": "rowwise"}, r"float8\.recipe = 'rowwise'.*audio only"),
        (Degrees(), "av", {"float8": "rowwise", "float8_all_gather": True}, r"float8\.all_gather = true.*'rowwise'"),
        (Degrees(), "av", {"stream_blocks": 48}, r"parallelism\.stream_blocks = 48.*48 blocks"),
        (Degrees(tp=2), "av", {"dora": True}, r"tp = 2 with lora\.dora"),
    ],
)
def test_what_cannot_work_is_refused_by_key(degrees, modalities, settings, message):
    with pytest.raises(ValueError, match=message):
        check_parallelism(degrees, CONFIG, modalities, **settings)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)product is in.*lora\.dora"):
        check_parallelism(Degrees(tp=5), CONFIG, "av", dora=True)


def test_narrow_widths_are_refused_for_float8():
    narrow = TransformerConfig.from_metadata(
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 8,
        }
    )
    with pytest.raises(ValueError, match=r"16 x tp = 64, found 32 and 32"):
        check_parallelism(Degrees(tp=4), narrow, "av", float8="tensorwise")


@cache
def one_block(base_dtype: str | None = None) -> LTXTransformer:
    """A released model's widths on the meta device; with a base dtype, with adapters on it."""
    model = build_transformer(read_source(None, "ltx-2.3-22b", 1), "av")
    if base_dtype is not None:
        apply_lora(model, LoRASection(base_dtype=base_dtype))
    return model


GATHERED = {"float8": "tensorwise", "float8_all_gather": True}


@pytest.mark.parametrize(
    ("degrees", "base_dtype", "settings", "message"),
    [
        # 2,048 and 4,096 rows; FSDP2 shards over dp_shard x cp.
        (Degrees(dp_shard=3), None, GATHERED, r"float8\.all_gather.* = 3 ranks.*4096 rows.*divides 2048 "),
        (Degrees(dp_shard=3, cp=2), None, GATHERED, r"dp_shard x cp = 3 x 2 = 6 ranks"),
        (Degrees(dp_shard=3), "bfloat16", GATHERED, r"attn1\.to_q\.base \(4096 rows\)"),
        # With tp = 2 a rank has 1,024 rows of the audio's projections.
        (Degrees(dp_shard=2048, tp=2), None, GATHERED, r"divides 1024 "),
        (Degrees(), "int8", {"float8": "rowwise"}, r"float8\.recipe: no layer.*lora\.base_dtype"),
        (Degrees(tp=32), "int4", {}, r"tp = 32 does not divide.*audio_attn1\.to_out\.0\.base\.scale \[2048, 16\]"),
        (Degrees(tp=3), None, {}, r"tp = 3 does not divide \d+ parameters"),
        (Degrees(tp=32), None, {"cuts_moments": cuts_blocks}, r"tp = 32 cuts.*audio_attn1\.to_out\.0\.weight"),
        (Degrees(tp=32), "bfloat16", {"cuts_moments": cuts_blocks}, r"lora_A\.weight \[32, 2048\]"),
    ],
    ids=named,
)
def test_parameters_that_do_not_divide_are_named(degrees, base_dtype, settings, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(one_block(base_dtype), degrees, **settings)


@pytest.mark.parametrize(
    ("degrees", "base_dtype", "settings"),
    [
        (Degrees(dp_shard=3), None, {"float8": "tensorwise"}),
        (Degrees(dp_replicate=3, dp_shard=4, cp=2), None, GATHERED),
        (Degrees(dp_shard=512, tp=4), None, GATHERED),
        (Degrees(tp=32), "nvfp4", {}),
        (Degrees(tp=16), "int4", {"cuts_moments": cuts_blocks}),
        (Degrees(dp_shard=7, tp=16), None, {"cuts_moments": cuts_blocks}),
    ],
    ids=named,
)
def test_parameters_that_divide_are_let_through(degrees, base_dtype, settings):
    check_sharding(one_block(base_dtype), degrees, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile__graphs": "on", "parallelism__cpu_offload": True}, r"compile\.graphs = 'on': parallelism\.cpu_off"),
        (
            {"compile__graphs": "on", "optimizer__in_backward": True, "training__max_grad_norm": 0.0},
            r"compile\.graphs = 'on': optimizer\.in_backward",
        ),
        ({"model__mode": "lora", "lora__targets": ["attn1.to_x"]}, r"attn1\.to_x"),
        ({"model__mode": "lora", "lora__base_dtype": "int8", "float8__recipe": "tensorwise"}, r"no layer can be conv"),
        ({"loss__video_weight": 0.0, "loss__audio_weight": 0.0}, r"loss\.video_weight.*above 0"),
    ],
    ids=str,
)
def test_a_job_is_refused_before_a_process_group_exists(tmp_path, nano_path, data_root, settings, message):
    settings = {"training__global_batch_size": 1, **settings}
    with pytest.raises(ValueError, match=message):
        plan_job(load_job(write_job(tmp_path, nano_path, data_root, **settings)), 1)


def test_the_plan_counts_the_shapes_that_are_compiled(tmp_path, nano_path, caplog):
    root = write_dataset(tmp_path / "data", nano_path, clips=2)
    for steps in range(5, 40):
        audio = {"latents": torch.zeros(8, steps, 16), "num_time_steps": steps, "duration": steps / 25}
        for source in ("latents", "conditions"):
            shutil.copy(root / source / "clip_0.pt", root / source / f"with_{steps}.pt")
        write_sample(root / f"audio_latents/with_{steps}.pt", {**audio, "frequency_bins": 16})
    job = write_job(tmp_path, nano_path, root, training__local_batch_size=2, compile__enable=True)
    # 35 lengths of audio, among them the one of the first two clips, each in batches of one and of two.
    with caplog.at_level(logging.WARNING):
        assert plan_job(load_job(job), 1).num_shapes == 70
    assert "up to 70 combinations of shapes" in caplog.text
