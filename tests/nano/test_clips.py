import json

import pytest
import torch

from ltx_titan.media import read_audio, read_clip
from ltx_titan.nano.clip_score import UNKNOWN, adherence, measure
from ltx_titan.nano.clips import (
    ALL_SHAPES,
    FPS,
    SAMPLE_RATE,
    SHAPES,
    TRIGGER,
    combinations,
    draw_clips,
    is_held_out,
    render_audio,
    render_video,
)
from ltx_titan.nano.make_clips import ClipOptions, make_clips

RED, CIRCLE, LEFT = 0, 0, 0


@pytest.fixture(scope="module")
def clips():
    every = combinations(held_out=True) + combinations(held_out=False, shapes=[len(SHAPES)])
    return draw_clips(10, 0, every)


@pytest.fixture(scope="module")
def rendered(clips):
    return render_video(clips), render_audio(clips)


def test_scorer_reads_every_attribute_of_a_rendered_clip(clips, rendered):
    assert adherence(measure(*rendered, SAMPLE_RATE), clips) == dict.fromkeys(
        adherence(measure(*rendered, SAMPLE_RATE), clips), 1.0
    )


def test_scorer_tells_a_wrong_direction_time_and_register(clips, rendered):
    frames, audio = rendered
    backwards = measure(frames.flip(2), audio, SAMPLE_RATE)
    assert not (backwards.motion == clips.motion).any()
    # Cut by a seventh of a second, nearly two more frames than are tolerated: the tone comes too early.
    early = measure(frames, audio[..., SAMPLE_RATE // 7 :], SAMPLE_RATE)
    assert adherence(early, clips)["sync_time"] == 0
    # Read at another rate, the same samples are a tone of another register, or none.
    assert adherence(measure(frames, audio, 3 * SAMPLE_RATE), clips)["pitch"] < 1


def test_scorer_finds_nothing_in_noise_and_silence(clips, generator):
    noise = torch.randn(4, 3, 25, 64, 64, generator=generator)
    measured = measure(noise, torch.zeros(4, 2, SAMPLE_RATE), SAMPLE_RATE)
    for name in ("shape", "motion", "pitch", "tone_motion"):
        assert (getattr(measured, name) == UNKNOWN).all(), name


def test_held_out_combinations_have_all_parts_in_training_clips():
    training, held_out = combinations(held_out=False), combinations(held_out=True)
    assert len(held_out) * 7 == len(training)
    assert is_held_out(CIRCLE, RED, LEFT)
    pairs = {(a, b, c[a], c[b]) for c in training for a in range(3) for b in range(a)}
    assert all((a, b, c[a], c[b]) in pairs for c in held_out for a in range(3) for b in range(a))
    assert not set(training) & set(held_out)


def test_written_clips_are_what_is_rendered_and_repeat(tmp_path):
    table = make_clips(ClipOptions(tmp_path / "a", count=1, seed=3, concept=True))
    again = make_clips(ClipOptions(tmp_path / "b", count=1, seed=3, concept=True))
    row = json.loads(table.read_text())
    assert TRIGGER in row["caption"]
    assert ALL_SHAPES[row["shape"]] not in row["caption"]
    path = table.parent / row["video"]
    frames, audio = read_clip(path, FPS, 64, 64), read_audio(path)
    # Not byte by byte: with AVX-512, x264 writes other bits for the same frames now and then.
    repeated = again.parent / row["video"]
    assert again.read_text() == table.read_text()
    assert (frames - read_clip(repeated, FPS, 64, 64)).abs().mean() < 1 / 255
    assert torch.equal(audio.waveform, read_audio(repeated).waveform)
    clip = draw_clips(1, 3, combinations(held_out=False, shapes=[len(SHAPES)]))
    scores = adherence(measure(frames[None], audio.waveform[None], audio.sample_rate), clip)
    assert scores["all"] == 1
    assert scores["sync"] == 1


def test_refuses_held_out_concepts(tmp_path):
    with pytest.raises(ValueError, match="--held-out only"):
        make_clips(ClipOptions(tmp_path, held_out="only", concept=True))
