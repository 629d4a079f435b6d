import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.diffusion import StepDraws
from tests.golden_cases import case_names, load_case

NAMES = case_names("training_strategy")


def read(name):
    """Strategy, batch and draws of a case; draws are listed video first, intrinsic conditions before references."""
    case = load_case(name)
    config, inputs = case.entry["strategy_config"], case.under("input.")
    batch = {}
    for key, tensor in case.under("input.batch.").items():
        source, field = key.split(".")
        batch.setdefault(source, {})[field] = tensor
    uses, place = {}, 0
    for stream in ("video", "audio"):
        block = config.get(stream)
        conditions = block["conditions"] if block else []
        uses[stream] = [None] * len(conditions)
        for is_reference in (False, True):
            for i, condition in enumerate(conditions):
                if (condition["type"] == "reference") == is_reference and (is_reference or block["is_generated"]):
                    uses[stream][i] = inputs[f"condition_draws.{place}"] < condition["probability"]
                    place += 1
    assert f"condition_draws.{place}" not in inputs
    draws = StepDraws(
        video_sigma=inputs.get("sigma.video"),
        audio_sigma=inputs.get("sigma.audio"),
        video_noise=inputs.get("noise.video"),
        audio_noise=inputs.get("noise.audio"),
        video_uses=uses["video"],
        audio_uses=uses["audio"],
    )
    return case, FlexibleStrategy.from_config(config), batch, draws


@pytest.mark.parametrize("name", NAMES)
def test_inputs_equal_the_reference(name):
    case, strategy, batch, draws = read(name)
    inputs = strategy.prepare(batch, draws)
    tolerance, output = case.entry["tolerance"]["all"], case.under("output.")
    for stream in ("video", "audio"):
        modality = getattr(inputs, stream)
        assert (modality is None) == (f"{stream}.latent" not in output)
        for field in ("latent", "sigma", "timesteps", "positions") if modality else ():
            found = getattr(modality, field)
            assert found.dtype == torch.float32, f"{stream} {field}"
            torch.testing.assert_close(found, output[f"{stream}.{field}"], **tolerance)
        target, mask = getattr(inputs, f"{stream}_target"), getattr(inputs, f"{stream}_loss_mask")
        assert (target is None) == (mask is None) == (f"{stream}_targets" not in output)
        if target is not None:
            torch.testing.assert_close(target, output[f"{stream}_targets"], **tolerance)
            assert torch.equal(mask, output[f"{stream}_loss_mask"].bool())


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_its_gradient_equal_the_reference(name):
    case, strategy, batch, draws = read(name)
    tolerance = case.entry["tolerance"]["all"]
    inputs = strategy.prepare(batch, draws)
    predictions = {stream: tensor.requires_grad_() for stream, tensor in case.under("input.pred.").items()}
    loss = strategy.loss(predictions.get("video"), predictions.get("audio"), inputs)
    torch.testing.assert_close(loss.per_sample, case.tensors["output.loss"], **tolerance)
    torch.testing.assert_close(loss.total, case.tensors["output.loss"].mean(), **tolerance)
    loss.total.backward()
    for stream, expected in case.under("grad.pred.").items():
        torch.testing.assert_close(predictions[stream].grad, expected, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_small_forms_say_the_same_as_the_full_ones(name):
    _, strategy, batch, draws = read(name)
    inputs = strategy.prepare(batch, draws)
    for stream in ("video", "audio"):
        modality, block = getattr(inputs, stream), getattr(strategy, stream)
        if modality is None:
            continue
        assert torch.equal(modality.timestep_values.gather(1, modality.timestep_index), modality.timesteps)
        assert modality.timestep_values.shape[1] == (2 if block.is_generated and block.conditions else 1)
        midpoints = modality.positions.mean(dim=-1)
        for axis, values in enumerate(modality.coordinate_values):
            assert torch.equal(values[modality.coordinate_index[:, axis]], midpoints[:, axis])


@pytest.mark.parametrize("name", [n for n in NAMES if "reference_video" in n])
def test_reference_factors_equal_the_reference(name):
    case, strategy, batch, draws = read(name)
    expected = case.tensors.get("output.checkpoint_metadata", torch.tensor([1, 1]))
    assert list(strategy.prepare(batch, draws).reference_scale) == expected.tolist()
