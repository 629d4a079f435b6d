import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.validation import as_batch, held_out_losses
from tests.validation.sharded import held_out, held_out_sample


class Halved(torch.nn.Module):
    """Predicts half of what it is given, and remembers it."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.perturbations = []

    def forward(self, video, audio, perturbations):
        self.seen.append((video, audio))
        self.perturbations.append(perturbations)
        return video.latent / 2, audio.latent / 2


def test_each_level_is_held_with_the_same_noise_in_every_validation():
    first, second = Halved(), Halved()
    assert held_out(first) == held_out(second)
    for (a, _), (b, _) in zip(first.seen, second.seen, strict=True):
        assert torch.equal(a.latent, b.latent)
    levels = [video.sigma.item() for video, _ in first.seen]
    assert levels == pytest.approx([0.2, 0.8] * 3)
    low, high = first.seen[0][0], first.seen[1][0]
    clean_and_noise = (high.latent - low.latent)[0, -1] / 0.6
    torch.testing.assert_close(low.latent[0, -1] + 0.6 * clean_and_noise, high.latent[0, -1])


def test_the_mean_is_over_samples_and_the_total_is_the_sum_of_the_streams():
    losses = held_out(Halved())
    for level in ("", "_sigma_0.2", "_sigma_0.8"):
        parts = losses[f"held_out/video{level}"] + losses[f"held_out/audio{level}"]
        assert losses[f"held_out/total{level}"] == pytest.approx(parts)
    mean = (losses["held_out/audio_sigma_0.2"] + losses["held_out/audio_sigma_0.8"]) / 2
    assert losses["held_out/audio"] == pytest.approx(mean)


def test_a_stream_that_is_not_generated_has_no_loss():
    block = {"latents_dir": "latents"}
    strategy = FlexibleStrategy.from_config(
        {
            "video": block | {"is_generated": True},
            "audio": {"is_generated": False, "latents_dir": "audio_latents"},
        }
    )
    losses = held_out_losses(Halved(), strategy, held_out_sample, 2, (0.5,), 0, "cpu")
    assert set(losses) == {"held_out/total", "held_out/video", "held_out/total_sigma_0.5", "held_out/video_sigma_0.5"}


def test_a_sample_without_audio_does_not_count_for_audio():
    blocks = {"is_generated": True}
    strategy = FlexibleStrategy.from_config(
        {
            "video": blocks | {"latents_dir": "latents"},
            "audio": blocks | {"latents_dir": "audio_latents"},
        }
    )

    def load(index, marked=True):
        batch = held_out_sample(index)
        if marked:
            batch["audio_latents"]["present"] = torch.tensor([index != 1])
        return batch

    model = Halved()
    losses = held_out_losses(model, strategy, load, 2, (0.5,), 0, "cpu")
    # Nor does its placeholder reach the video: the two streams do not attend to each other.
    assert [perturbations.has_both.tolist() for perturbations in model.perturbations] == [[True], [False]]
    alone = held_out_losses(Halved(), strategy, lambda index: load(index, marked=False), 1, (0.5,), 0, "cpu")
    assert losses["held_out/audio"] == pytest.approx(alone["held_out/audio"])
    assert losses["held_out/video"] != pytest.approx(alone["held_out/video"])


def test_a_sample_becomes_a_batch_of_one():
    sample = {"video_latents": {"latents": torch.zeros(4, 2, 2, 2), "fps": 25.0}}
    batch = as_batch(sample, "cpu")
    assert batch["video_latents"]["latents"].shape == (1, 4, 2, 2, 2)
    assert batch["video_latents"]["fps"].tolist() == [25.0]
