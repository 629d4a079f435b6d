"""Sums of losses: means over the samples that have a stream, in any distribution over micro-batches and ranks."""

from types import SimpleNamespace

import pytest
import torch

from ltx_titan.metrics import Sums

CPU = torch.device("cpu")


def micro_batch(video, audio, sigmas):
    """Losses and inputs of samples; None is a sample without a token of that stream to generate."""

    def stream(losses):
        if losses is None:
            return None, None
        mask = torch.tensor([[loss is not None, False] for loss in losses])
        return torch.tensor([loss or 0.0 for loss in losses]), mask

    (video, video_mask), (audio, audio_mask) = stream(video), stream(audio)
    sigma = SimpleNamespace(sigma=torch.tensor(sigmas))
    inputs = SimpleNamespace(video=sigma, audio=sigma, video_loss_mask=video_mask, audio_loss_mask=audio_mask)
    total = sum(part for part in (video, audio) if part is not None)
    return total, SimpleNamespace(video=video, audio=audio), inputs


def means(*ranks, share):
    """Means over ranks, each a list of steps, each a list of micro-batches."""
    sums = []
    for steps in ranks:
        sums.append(Sums(CPU))
        for micro_batches in steps:
            sums[-1].begin_step()
            for batch in micro_batches:
                sums[-1].add(*batch, share)
    return sums[0].means(sum(one.flat() for one in sums).tolist())


def test_a_stream_is_averaged_over_the_samples_that_have_it():
    # Three of four samples on two ranks have audio: (2 + 4 + 9) / 3. The training loss counts the fourth as 0.
    first = [[micro_batch([1.0, 3.0], [2.0, None], [0.1, 0.9])]]
    second = [[micro_batch([5.0], [4.0], [0.1]), micro_batch([7.0], [9.0], [0.6])]]
    found = means(first, second, share=1 / 4)
    assert found.video == pytest.approx(4.0)
    assert found.audio == pytest.approx(5.0)
    assert found.loss == pytest.approx((1 + 3 + 5 + 7 + 2 + 4 + 9) / 4)
    assert found.by_sigma == pytest.approx(
        {
            "loss/video_sigma_0.00-0.25": 3.0,
            "loss/video_sigma_0.50-0.75": 7.0,
            "loss/video_sigma_0.75-1.00": 3.0,
            "loss/audio_sigma_0.00-0.25": 3.0,
            "loss/audio_sigma_0.50-0.75": 9.0,
        }
    )
    assert found.idle_steps == 0


def test_steps_with_unequal_numbers_of_samples_weigh_by_samples():
    # Three samples with audio in the first step, one in the second: (3 + 3 + 3 + 7) / 4, not (3 + 7) / 2.
    steps = [
        [micro_batch([1.0] * 3, [3.0] * 3, [0.1] * 3)],
        [micro_batch([1.0] * 3, [7.0, None, None], [0.1] * 3)],
    ]
    assert means(steps, share=1 / 3).audio == pytest.approx(4.0)


def test_a_stream_that_no_sample_has_is_none_and_not_zero():
    found = means([[micro_batch([2.0], [None], [0.3])]], [[micro_batch([4.0], [None], [0.3])]], share=1 / 2)
    assert (found.video, found.audio, found.loss) == (3.0, None, 3.0)
    assert list(found.by_sigma) == ["loss/video_sigma_0.25-0.50"]
    assert means([[micro_batch([2.0], None, [0.3])]], share=1).audio is None


def test_only_steps_without_any_loss_on_any_rank_are_idle():
    silent, audible = micro_batch(None, [None], [0.5]), micro_batch(None, [8.0], [0.5])
    found = means([[silent], [silent], [silent]], [[silent], [audible], [silent]], share=1 / 2)
    assert found.idle_steps == 2
    assert found.audio == 8.0
    assert found.loss == pytest.approx(8 / 2 / 3)
    nothing = means([[silent]], share=1)
    assert (nothing.loss, nothing.audio, nothing.idle_steps, nothing.is_finite) == (None, None, 1, True)


def test_a_loss_of_zero_is_a_loss():
    assert means([[micro_batch([0.0], [0.0], [0.5])]], share=1).audio == 0.0


def test_a_loss_that_is_not_finite_is_told():
    assert not means([[micro_batch([float("nan")], [1.0], [0.5])]], share=1).is_finite
