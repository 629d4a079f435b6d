import pytest
import torch

from ltx_titan.model import FeatureExtractor, TextConnector, TextConnectors
from tests.golden_cases import case_names, load_case

PIPELINES = [(n, v) for n in case_names("embeddings_connectors") for v in load_case(n).entry["variants"]]
MODULE = load_case("connector_module")
PREFIX = "text_embedding_projection."


def extractor_of(case):
    """The projection of a golden case, with its weights."""
    extractor = FeatureExtractor.from_config(case.entry["config"], case.entry["text_encoder"])
    extractor.load_state_dict({k.removeprefix(PREFIX): v for k, v in case.weights.items() if k.startswith(PREFIX)})
    return extractor


@pytest.mark.parametrize(("name", "variant"), PIPELINES)
def test_features_and_contexts_equal_the_reference(name, variant):
    case = load_case(name)
    config, tolerance = case.entry["config"], case.entry["tolerance"]["output"]
    extractor = extractor_of(case)
    connectors = TextConnectors.from_config(config)
    connectors.load_state_dict({k: v for k, v in case.weights.items() if not k.startswith(PREFIX)})
    expected = case.under(f"output.{variant}.")
    mask = case.tensors[f"input.{variant}.attention_mask"]
    with torch.no_grad():
        video, audio = extractor(case.tensors[f"input.{variant}.hidden_states"], mask)
        video_context, audio_context, mask_out = connectors(video, audio, mask)
    torch.testing.assert_close(video, expected["features.video"], **tolerance)
    torch.testing.assert_close(audio, expected.get("features.audio", expected["features.video"]), **tolerance)
    torch.testing.assert_close(video_context, expected["video_encoding"], **tolerance)
    torch.testing.assert_close(audio_context, expected["audio_encoding"], **tolerance)
    assert torch.equal(mask_out, expected["attention_mask"])


@pytest.mark.parametrize(("name", "variant"), PIPELINES)
def test_features_in_bfloat16_stay_near_the_reference(name, variant):
    case = load_case(name)
    states, mask = (case.tensors[f"input.{variant}.{key}"] for key in ("hidden_states", "attention_mask"))
    with torch.no_grad():
        video, _ = extractor_of(case).bfloat16()(states.bfloat16(), mask)
    expected = case.tensors[f"output.{variant}.features.video"]
    assert video.dtype == torch.bfloat16
    assert (video.float() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("variant", MODULE.entry["variants"], ids=lambda v: v["name"])
def test_one_connector_equals_the_reference(variant):
    name = variant["name"]
    connector = TextConnector(**variant["constructor"])
    connector.load_state_dict(MODULE.under(f"weight.{name}."))
    with torch.no_grad():
        out, mask = connector(
            MODULE.tensors[f"input.{name}.hidden_states"], MODULE.tensors[f"input.{name}.attention_mask"]
        )
    torch.testing.assert_close(
        out, MODULE.tensors[f"output.{name}.hidden_states"], **MODULE.entry["tolerance"]["output"]
    )
    assert torch.equal(mask, MODULE.tensors[f"output.{name}.mask_is_zero"])


def test_text_of_a_wrong_length_is_refused():
    connector = TextConnector(8, 2, 1, num_learnable_registers=4)
    with pytest.raises(ValueError, match="text length 6 is not a multiple"):
        connector(torch.zeros(1, 6, 16), torch.ones(1, 6, dtype=torch.int64))
