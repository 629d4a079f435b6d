import pytest

from ltx_titan.weights import CONNECTORS, TEXT_PROJECTION, TRANSFORMER, stream_of, unused_by
from tests.golden_cases import load_case

COMPONENTS = (TRANSFORMER, CONNECTORS, TEXT_PROJECTION)


@pytest.mark.parametrize(
    ("key", "component", "name"),
    [
        ("model.diffusion_model.proj_out.bias", TRANSFORMER, "proj_out.bias"),
        (
            "model.diffusion_model.audio_embeddings_connector.learnable_registers",
            CONNECTORS,
            "audio_embeddings_connector.learnable_registers",
        ),
        (
            "model.diffusion_model.embeddings_connector.learnable_registers",
            CONNECTORS,
            "video_embeddings_connector.learnable_registers",
        ),
        ("text_embedding_projection.aggregate_embed.weight", TEXT_PROJECTION, "aggregate_embed.weight"),
        ("vae.encoder.conv_in.conv.weight", None, None),
    ],
)
def test_each_key_belongs_to_one_component(key, component, name):
    assert [c.module_name(key) for c in COMPONENTS if c.module_name(key)] == ([name] if name else [])
    assert all((c.module_name(key) is not None) == (c is component) for c in COMPONENTS)


@pytest.mark.parametrize("component", COMPONENTS)
def test_file_keys_map_back(component):
    name = "video_embeddings_connector.learnable_registers" if component is CONNECTORS else "x.weight"
    assert component.module_name(component.file_key(name)) == name


@pytest.mark.parametrize(("modalities", "case"), [("video", "video_only"), ("audio", "audio_only")])
def test_a_model_of_one_stream_has_exactly_the_weights_that_are_not_unused(modalities, case):
    weights = load_case(case).weights
    # The two cases are of different generations, each with an audio-video twin.
    both = load_case({"video": "av_19b", "audio": "av_22b"}[modalities]).weights
    is_unused = unused_by(modalities)
    assert {name for name in both if not is_unused(name)} == set(weights)


def test_nothing_is_unused_by_a_model_of_both_streams():
    assert not any(map(unused_by("av"), load_case("av_22b").weights))


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("transformer_blocks.3.audio_ff.net.2.weight", "audio"),
        ("transformer_blocks.3.audio_to_video_attn.to_q.weight", "cross"),
        ("transformer_blocks.3.scale_shift_table_a2v_ca_audio", "cross"),
        ("av_ca_a2v_gate_adaln_single.linear.bias", "cross"),
        ("keyframes_abs_pos_embedding", "video"),
    ],
)
def test_stream_of_a_parameter(name, stream):
    assert stream_of(name) == stream
