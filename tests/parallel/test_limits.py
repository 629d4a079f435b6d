import pytest

from ltx_titan.config import Degrees
from ltx_titan.model import TransformerConfig
from ltx_titan.parallel.limits import check_parallelism

CONFIG = TransformerConfig.from_metadata({})


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
