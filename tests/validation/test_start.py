import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy, Grid, audio_steps
from ltx_titan.diffusion import Guidance, draw_step, sample
from ltx_titan.validation import (
    FixedSigma,
    audio_start,
    begin,
    condition_frames,
    condition_where,
    freeze,
    target_latents,
    video_start,
    with_audio_reference,
    with_video_reference,
)

FACTORS = (8, 32, 32)
GRID = Grid(4, 2, 3)


def latents(grid=GRID, channels=5, seed=0):
    return torch.randn(1, channels, *grid, generator=torch.Generator().manual_seed(seed))


def audio(steps, seed=0):
    return torch.randn(1, 8, steps, 16, generator=torch.Generator().manual_seed(seed))


def start(**options):
    return video_start(GRID, 24.0, FACTORS, channels=5, **options)


def begun(made, seed=1, noise_level=1.0):
    generator = torch.Generator().manual_seed(seed)
    return begin(made, torch.zeros(1, 2, 4), None, Guidance(), generator, noise_level, "cpu")


def sampled(made):
    """Latents after a run of a model that predicts nonsense."""
    stream = begun(made)
    model = lambda video, audio, _: (video.latent * 3 + 1, None)  # noqa: E731
    tokens, _ = sample(model, stream, None, torch.tensor([1.0, 0.6, 0.0]))
    return target_latents(tokens, made, "video")


def test_prefix_and_suffix_survive_a_run_and_the_rest_is_generated():
    frames = latents(Grid(2, 2, 3))
    first, last = sampled(condition_frames(start(), frames)), sampled(condition_frames(start(), frames, at="last"))
    assert torch.equal(first[:, :, :2], frames)
    assert torch.equal(last[:, :, 2:], frames)
    assert not torch.isclose(first[:, :, 2:], last[:, :, :2]).any()


@pytest.mark.parametrize(("at", "first"), [(1, 1), (-2, 2), ("middle", 1)])
def test_a_keyframe_survives_at_its_time_and_is_not_marked(at, first):
    image, end = latents(Grid(1, 2, 3)), latents(Grid(1, 2, 3), seed=5)
    made = condition_frames(start(marks_first_frame=True), image, at=at)
    found = sampled(made if first == 2 else condition_frames(made, end, at="last"))
    assert torch.equal(found[:, :, first : first + 1], image)
    assert first == 2 or torch.equal(found[:, :, 3:], end)
    assert not torch.isclose(found[:, :, :1], image).any()
    assert begun(made).keyframes_mask[0, :, 0].tolist() == [1.0] * 6 + [0.0] * 18


def test_a_masked_part_and_a_first_frame_together_survive_a_run():
    whole, frame = latents(), latents(Grid(1, 2, 3), seed=5)
    mask = torch.zeros(tuple(GRID), dtype=torch.bool)
    mask[:, 1, 1:] = True
    found = sampled(condition_frames(condition_where(start(), whole, mask), frame))
    assert torch.equal(found[:, :, :1], frame)
    assert torch.equal(found[:, :, 1:, 1, 1:], whole[:, :, 1:, 1, 1:])
    assert not torch.isclose(found[:, :, 1:, 0], whole[:, :, 1:, 0]).any()


def test_a_frozen_stream_is_its_latents():
    made = freeze(start(), latents())
    assert made.is_frozen
    assert torch.equal(target_latents(begun(made).latent, made, "video"), latents())


def test_audio_latents_come_back_in_their_layout():
    made = freeze(audio_start(6), audio(6))
    assert torch.equal(target_latents(begun(made).latent, made, "audio"), audio(6))


@pytest.mark.parametrize(("grid", "fps"), [(Grid(4, 2, 3), 24.0), (Grid(4, 1, 3), 24.0), (Grid(2, 2, 3), 8.0)])
def test_a_reference_lies_where_training_puts_it(grid, fps):
    target_grid = Grid(4, grid.height * 2, 6)
    block = {
        "is_generated": True,
        "latents_dir": "latents",
        "conditions": [{"type": "reference", "latents_dir": "references"}],
    }
    batch = {
        "video_latents": {"latents": latents(target_grid), "fps": torch.tensor([24.0])},
        "references": {"latents": latents(grid, seed=2), "fps": torch.tensor([fps])},
        "conditions": {"video_prompt_embeds": torch.zeros(1, 2, 4)},
    }
    strategy = FlexibleStrategy.from_config({"name": "flexible", "video": block, "audio": None}, FACTORS)
    draws = draw_step(*strategy.draw_plan(batch), sampler=FixedSigma(0.5), seed=0, step=0, indices=[0])
    trained = strategy.prepare(batch, draws).video
    made = with_video_reference(
        video_start(target_grid, 24.0, FACTORS, channels=5), latents(grid, seed=2), fps, FACTORS
    )
    stream = begun(made)
    # Training puts references first, sampling last.
    at_end = torch.cat([trained.positions[:, :, grid.num_tokens :], trained.positions[:, :, : grid.num_tokens]], dim=2)
    assert torch.equal(stream.positions, at_end)
    assert torch.equal(stream.latent[:, target_grid.num_tokens :], trained.latent[:, : grid.num_tokens])
    assert stream.denoise_mask[:, target_grid.num_tokens :].sum() == 0


def test_references_are_cut_off_and_move_no_noise():
    plain, with_reference = start(), with_video_reference(start(), latents(), 24.0, FACTORS)
    assert torch.equal(begun(plain).latent, begun(with_reference).latent[:, : GRID.num_tokens])
    assert target_latents(begun(with_reference).latent, with_reference, "video").shape == (1, 5, *GRID)
    audios = with_audio_reference(audio_start(6), audio(4))
    assert torch.equal(begun(audio_start(6)).latent, begun(audios).latent[:, :6])
    assert torch.equal(audios.coordinates.positions[:, :, 6:], audio_start(4).coordinates.positions)


def test_only_the_first_latent_frame_of_the_target_is_marked():
    made = with_video_reference(start(marks_first_frame=True), latents(), 24.0, FACTORS)
    marker = begun(made).keyframes_mask[0, :, 0]
    assert marker[:6].sum() == marker.sum() == 6
    assert begun(start()).keyframes_mask is None


def test_positions_in_the_small_form_are_the_same_positions():
    stream = begun(with_video_reference(start(), latents(), 24.0, FACTORS))
    for axis, values in enumerate(stream.coordinate_values):
        expected = stream.positions[:, axis].sum(-1) / 2
        assert torch.equal(values[stream.coordinate_index[:, axis]], expected)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"latents at first are 5 x 2 x 3 .* the sample's 4 x 2 x 3"):
        condition_frames(start(), latents(Grid(5, 2, 3)))
    with pytest.raises(ValueError, match=r"latents at 3 are 2 x 2 x 3 .* fits there"):
        condition_frames(start(), latents(Grid(2, 2, 3)), at=3)
    with pytest.raises(ValueError, match="use a clip and a mask of the sample's size"):
        condition_where(start(), latents(Grid(4, 2, 2)), torch.ones(16, dtype=torch.bool))
    with pytest.raises(ValueError, match="another codec"):
        condition_frames(start(), latents(Grid(1, 2, 3), channels=4))


def test_a_clip_of_89_frames_at_24_per_second_has_93_audio_steps():
    assert audio_start(audio_steps(89 / 24)).num_tokens == 93
