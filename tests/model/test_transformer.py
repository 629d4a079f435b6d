import dataclasses

import pytest
import torch

from ltx_titan.model import LTXTransformer, Modality
from ltx_titan.model.adaln import distinct_timesteps
from tests.golden_cases import assert_close_to_max, case_names, load_case
from tests.model.golden_transformer import build_inputs, build_transformer, weighted_sum

VARIANTS = [
    (name, variant) for name in case_names("transformer_forward") for variant in load_case(name).entry["variants"]
]
WITH_GRADIENTS = [(n, v) for n, v in VARIANTS if "loss" in load_case(n).entry["variants"][v]]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_outputs_equal_the_reference(name, variant):
    case = load_case(name)
    model = build_transformer(case)
    video, audio, perturbations = build_inputs(case, variant)
    with torch.no_grad():
        outputs = model(video, audio, perturbations)
    tolerance = case.entry["tolerance"]["output"]
    for stream, output in zip(("video", "audio"), outputs, strict=True):
        expected = case.tensors.get(f"output.{variant}.{stream}")
        assert (output is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(output, expected, **tolerance)


@pytest.mark.parametrize(("name", "variant"), WITH_GRADIENTS)
def test_gradients_equal_the_reference(name, variant):
    case = load_case(name)
    model = build_transformer(case)
    video, audio, perturbations = build_inputs(case, variant)
    streams = {"video": video, "audio": audio}
    wanted = [key.removeprefix("grad.") for key in case.tensors if key.startswith("grad.input.")]
    leaves = {key: case.tensors[key].clone().requires_grad_() for key in wanted}
    for key, leaf in leaves.items():
        _, stream, field = key.split(".")
        streams[stream] = dataclasses.replace(streams[stream], **{field: leaf})

    loss = weighted_sum(case, variant, *model(streams["video"], streams["audio"], perturbations))
    loss.backward()

    torch.testing.assert_close(loss.detach().reshape(1), case.tensors[f"output.{variant}.loss"], rtol=1e-4, atol=1e-4)
    bound = case.entry["tolerance"]["grad"]["rtol_to_max"]
    parameters = dict(model.named_parameters())
    for key, expected in case.under("grad.").items():
        if key == "weight_norms":
            continue
        actual = leaves[key].grad if key.startswith("input.") else parameters[key.removeprefix("weight.")].grad
        assert_close_to_max(actual, expected, bound, key)
    norms = torch.stack([parameters[n].grad.norm() for n in case.entry["grad_weight_norm_names"]])
    assert_close_to_max(norms, case.tensors["grad.weight_norms"], bound, "gradient norms of all weights")
    assert set(case.entry["grad_weight_norm_names"]) == set(parameters)


def test_stated_timesteps_and_coordinates_give_the_same_output_as_found_ones():
    case = load_case("av_22b")
    model = build_transformer(case)
    video, audio, _ = build_inputs(case, "base")
    timesteps = torch.where(video.timesteps > 0, video.sigma[:, None], 0)
    per_sample = torch.stack([torch.zeros_like(video.sigma), video.sigma], dim=1)
    found = dataclasses.replace(video, timesteps=timesteps)
    stated = dataclasses.replace(found, timestep_values=per_sample, timestep_index=(timesteps > 0).long())
    assert distinct_timesteps(timesteps)[0].shape[1] > 2
    with torch.no_grad():
        for expected, actual in zip(model(found, audio), model(stated, audio), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_a_missing_stream_is_named():
    case = load_case("video_only")
    model = build_transformer(case)
    video, _, _ = build_inputs(case, "base")
    with pytest.raises(ValueError, match="modalities='video', but audio was given"):
        model(video, video)


def test_a_config_of_another_family_is_refused_by_key():
    with pytest.raises(ValueError, match=r"config\.transformer\.qk_norm: expected 'rms_norm', found 'layer_norm'"):
        LTXTransformer.from_config({"qk_norm": "layer_norm"})


def test_contradicting_caption_keys_are_refused():
    with pytest.raises(ValueError, match="caption projection keys"):
        LTXTransformer.from_config({"caption_proj_before_connector": True})


def test_bfloat16_stays_close_to_float32():
    # Two blocks of bf16 (epsilon 2 ** -8) with normalized activations: a few epsilons of the largest value.
    case = load_case("av_22b")
    model = build_transformer(case)
    video, audio, _ = build_inputs(case, "base")
    with torch.no_grad():
        exact = model(video, audio)
        rough = model.bfloat16()(video, audio)
    for expected, actual in zip(exact, rough, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_close_to_max(actual, expected, 6 * 2**-8, "bf16 output")


def test_modality_is_immutable():
    video, _, _ = build_inputs(load_case("video_only"), "base")
    assert isinstance(video, Modality)
    with pytest.raises(dataclasses.FrozenInstanceError):
        video.enabled = False
