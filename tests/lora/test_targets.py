import pytest
from pydantic import ValidationError

from ltx_titan.config import LoRASection
from ltx_titan.lora import PRESETS, adapters, apply_lora, check_ranks, find_targets
from tests.lora.adapted import settings, transformer

MODEL = transformer("meta")
BLOCKS = 2


def chosen(*targets):
    return find_targets(MODEL, targets)


def test_a_pattern_is_an_ending_of_whole_name_parts():
    assert chosen("attn1.to_k") == [f"transformer_blocks.{i}.attn1.to_k" for i in range(BLOCKS)]
    assert len(chosen("to_k")) == 6 * BLOCKS
    assert chosen("transformer_blocks.1.ff.net.2") == ["transformer_blocks.1.ff.net.2"]
    assert chosen("patchify_proj") == ["patchify_proj"]


@pytest.mark.parametrize(
    ("preset", "per_block", "heads"),
    [
        ("all_attention", 24, None),
        ("video", 8, {"attn1", "attn2"}),
        ("v2v", 10, {"attn1", "attn2", "ff"}),
        ("t2a", 10, {"audio_attn1", "audio_attn2", "audio_ff"}),
        ("v2a", 14, {"audio_attn1", "audio_attn2", "audio_ff", "video_to_audio_attn"}),
    ],
)
def test_presets_touch_their_streams_and_no_other(preset, per_block, heads):
    names = chosen(preset)
    assert len(names) == per_block * BLOCKS
    if heads:
        assert {name.split(".")[2] for name in names} == heads


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_an_audio_video_model(preset):
    assert chosen(preset)


def test_patterns_and_presets_add_up_in_the_order_of_the_model():
    names = chosen("audio_ffn", "attn1.to_q", "audio_ffn")
    assert len(names) == 3 * BLOCKS
    assert names[0] == "transformer_blocks.0.attn1.to_q"


def test_a_pattern_without_a_match_is_named_with_what_comes_close():
    with pytest.raises(ValueError, match=r"'attn1.to_query' matches no linear layer.*attn1\.to_q"):
        chosen("video", "attn1.to_query")
    with pytest.raises(ValueError, match=r"'vide' matches no linear layer.*Did you mean video"):
        chosen("vide")
    with pytest.raises(ValueError, match=r"Expected a preset \(all_attention, video"):
        chosen("zzzzzz")
    with pytest.raises(ValueError, match="'q_norm' matches no linear layer"):
        chosen("q_norm")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": "to_q"}, r'write \["to_q"\]'),
        ({"targets": []}, "targets"),
        ({"base_dtype": "int2"}, "base_dtype"),
        ({"ranks": 4}, "ranks"),
    ],
)
def test_wrong_settings_are_named(fields, names):
    with pytest.raises(ValidationError, match=names):
        LoRASection(**fields)


def test_settings_survive_being_written():
    settings = LoRASection(targets=["video", "to_gate_logits"], rslora=True, alpha=16)
    assert LoRASection.model_validate(settings.model_dump(mode="json")) == settings
    assert settings.scaling == 16 / 32**0.5


def test_layers_have_ranks_of_their_own_at_the_same_scale_or_with_their_own_alpha():
    model = transformer("meta")
    ranks = [{"match": ["audio"], "rank": 2}, {"match": ["feed_forward"], "blocks": [1, 1], "rank": 16, "alpha": 8}]
    chosen = settings(rank=4, alpha=8, targets=["video", "v2v", "t2a"], ranks=ranks)
    check_ranks(apply_lora(model, chosen), chosen)
    layers = adapters(model)
    for name, rank, scaling in (
        ("transformer_blocks.0.audio_ff.net.2", 2, 2.0),
        ("transformer_blocks.0.ff.net.2", 4, 2.0),
        ("transformer_blocks.1.ff.net.2", 16, 0.5),
    ):
        assert layers[name].lora_A.weight.shape[0] == layers[name].lora_B.weight.shape[1] == rank
        assert layers[name].scaling == scaling


def test_a_rank_for_layers_without_adapters_is_refused():
    chosen = settings(targets=["video"], ranks=[{"match": ["attn1"], "rank": 2}, {"match": ["audio"], "rank": 2}])
    with pytest.raises(ValueError, match=r"lora\.ranks\[1\].*leaves no adapted layer"):
        check_ranks(apply_lora(transformer("meta"), chosen), chosen)
