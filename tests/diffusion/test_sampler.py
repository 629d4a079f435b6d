import pytest
import torch

from ltx_titan.diffusion import Guidance, SampledStream, count_forwards, distilled_schedule, sample
from tests.diffusion.sampling_case import sampled_stream
from tests.golden_cases import load_case
from tests.model.golden_transformer import build_transformer

CASE = load_case("sampling_loop")
TOLERANCE = CASE.entry["tolerance"]["output"]
PASS_NAMES = {"cond": "cond", "uncond": "uncond", "perturbed": "ptb", "isolated": "mod"}
ALL = Guidance(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(0,), modality_scale=2.0)


class Recorder:
    """Replaces the transformer: records its inputs and predicts a velocity that depends on the text."""

    def __init__(self):
        self.calls = []

    def __call__(self, video, audio, perturbations):
        self.calls.append((video, audio, perturbations))
        return tuple(
            None if stream is None else stream.latent * 0.5 + stream.context.mean(dim=(1, 2))[:, None, None]
            for stream in (video, audio)
        )


def stream(tokens=6, num_clean=2, guidance=None, **changes):
    generator = torch.Generator().manual_seed(tokens)
    clean, noise = torch.randn(2, 1, tokens, 4, generator=generator)
    mask = torch.ones(1, tokens, 1)
    mask[:, :num_clean] = 0
    fields = {
        "latent": torch.where(mask == 0, clean, noise),
        "clean": clean,
        "denoise_mask": mask,
        "positions": torch.zeros(1, 1, tokens, 2),
        "context": torch.full((1, 3, 4), 1.0),
        "negative_context": torch.full((1, 3, 4), -1.0),
        "guidance": guidance or Guidance(),
    }
    return SampledStream(**(fields | changes))


@pytest.fixture(scope="module")
def golden_model():
    return build_transformer(CASE).eval()


@pytest.mark.parametrize("passes_at_once", [None, 3, 1])
def test_a_guided_run_equals_the_reference(golden_model, passes_at_once):
    reports = []
    video, audio = sample(
        golden_model,
        sampled_stream(CASE, "video"),
        sampled_stream(CASE, "audio"),
        CASE.tensors["input.sigmas"],
        passes_at_once=passes_at_once,
        on_step=reports.append,
    )
    torch.testing.assert_close(video, CASE.tensors["output.final.video"], **TOLERANCE)
    torch.testing.assert_close(audio, CASE.tensors["output.final.audio"], **TOLERANCE)
    for report in reports:
        for name in ("video", "audio"):
            expected = CASE.tensors[f"output.step{report.step}.guided_denoised.{name}"]
            torch.testing.assert_close(getattr(report, name), expected, **TOLERANCE)
    for name in ("video", "audio"):
        for own, theirs in PASS_NAMES.items():
            expected = CASE.tensors[f"output.step0.{theirs}_denoised.{name}"]
            torch.testing.assert_close(getattr(reports[0], f"{name}_passes")[own], expected, **TOLERANCE)


def test_given_tokens_come_out_bit_for_bit():
    for stepper in ("euler", "euler_ancestral"):
        video, audio = stream(6, num_clean=2, guidance=ALL), stream(5, num_clean=3)
        generator = torch.Generator().manual_seed(0)
        found = sample(Recorder(), video, audio, distilled_schedule(), stepper=stepper, generator=generator)
        assert torch.equal(found[0][:, :2], video.clean[:, :2])
        assert torch.equal(found[1][:, :3], audio.clean[:, :3])
        assert not torch.equal(found[0][:, 2:], video.clean[:, 2:])


def test_a_frozen_stream_has_noise_level_zero_and_stays_while_the_other_is_guided():
    model = Recorder()
    video = stream(6, guidance=ALL, is_frozen=True, denoise_mask=torch.zeros(1, 6, 1))
    found_video, found_audio = sample(model, video, stream(5, guidance=ALL), torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(found_video, video.clean)
    assert found_audio.shape == (1, 5, 4)
    for inputs, _, perturbations in model.calls:
        assert inputs.enabled
        assert inputs.sigma.abs().max() == 0
        assert inputs.timesteps.abs().max() == 0
        # Its text and its attention are its own in every pass; only the generated stream is guided.
        assert torch.equal(inputs.context, torch.ones(4, 3, 4))
        kinds = {entry[0] for sample_ in perturbations.samples for entry in sample_}
        assert "skip_video_self_attn" not in kinds


def test_modality_guidance_of_a_lone_stream_costs_nothing():
    model = Recorder()
    sample(model, stream(guidance=Guidance(modality_scale=3.0)), None, torch.tensor([1.0, 0.5, 0.0]))
    assert [call[0].latent.shape[0] for call in model.calls] == [1, 1]


@pytest.mark.parametrize("passes_at_once", [None, 1, 3])
def test_forwards_are_counted_before_they_are_made(passes_at_once):
    model = Recorder()
    video, audio = stream(guidance=ALL), stream(5, is_frozen=True)
    sample(model, video, audio, distilled_schedule(), passes_at_once=passes_at_once)
    assert len(model.calls) == count_forwards(video, audio, 8, passes_at_once)


def test_ancestral_sampling_depends_on_its_generator_alone():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(Recorder(), stream(), None, distilled_schedule(), stepper="euler_ancestral", generator=generator)[
            0
        ]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_partly_given_tokens_have_their_own_noise_level():
    model = Recorder()
    mask = torch.tensor([0.0, 0.5, 1.0])[None, :, None]
    sample(model, stream(3, denoise_mask=mask), None, torch.tensor([0.8, 0.0]))
    (inputs, _, _) = model.calls[0]
    torch.testing.assert_close(inputs.timesteps[0], torch.tensor([0.0, 0.4, 0.8]))
    torch.testing.assert_close(inputs.timestep_values.gather(1, inputs.timestep_index), inputs.timesteps)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="negative prompt"):
        stream(guidance=Guidance(cfg_scale=2.0), negative_context=None)
    with pytest.raises(ValueError, match="no stream is generated"):
        sample(Recorder(), stream(is_frozen=True), None, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="give it a generator"):
        sample(Recorder(), stream(), None, torch.tensor([1.0, 0.0]), stepper="euler_ancestral")
