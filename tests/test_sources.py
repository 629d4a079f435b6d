"""A job with several sources: each has its own streams, conditions and captions, and the run says what it drew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.config import ConfigError, build_job, load_job
from ltx_titan.estimate.placeholders import add_placeholders
from ltx_titan.plan import plan_job
from ltx_titan.train.step import TrainStep
from tests.jobs import NO_CHECKPOINTS, train, write_job

CLIPS = {"name": "clips", "weight": 3.0, "caption_dropout": 1.0, "audio_conditions": []}
SILENT = {
    "name": "silent",
    "weight": 1,
    "modality": "video",
    "loss_weight": 0.25,
    "video_conditions": [{"type": "keyframe", "at": ["last"]}],
}


def write(folder: Path, nano_path: Path, data_root: Path, *sources: dict[str, Any], **overrides: object) -> Path:
    """A job with sources, all of the same samples."""
    made = [{"root": str(data_root), **source} for source in sources]
    job = write_job(folder, nano_path, data_root, data__sources=made, **NO_CHECKPOINTS, **overrides)
    # In place of the root that `write_job` sets, which comes first.
    job.write_text(job.read_text().replace(f'root = "{data_root}"\n', "", 1))
    return job


def test_each_source_is_trained_under_its_own_conditions(tmp_path, nano_path, data_root, monkeypatch):
    drawn, prepared, by_step = [], [], []
    draw, prepare = TrainStep.draw, FlexibleStrategy.prepare

    def record_draw(self, batch, step, positions, samples):
        draws = draw(self, batch, step, positions, samples)
        by_step.append((step, samples))
        drawn.append((samples, batch["conditions"]["prompt_attention_mask"].sum(dim=1)))
        return draws

    def record_inputs(self, batch, draws):
        inputs = prepare(self, batch, draws)
        prepared.append((batch, inputs))
        return inputs

    monkeypatch.setattr(TrainStep, "draw", record_draw)
    monkeypatch.setattr(FlexibleStrategy, "prepare", record_inputs)
    lines = train(write(tmp_path, nano_path, data_root, CLIPS, SILENT, training__steps=2, data__num_workers=0))
    samples = [index for indices, _ in drawn for index in indices]
    assert 0 < sum(index >= 6 for index in samples) < 4
    for (indices, caption_tokens), (batch, inputs) in zip(drawn, prepared, strict=True):
        is_silent = indices[0] >= 6
        assert all((index >= 6) == is_silent for index in indices)
        assert caption_tokens.gt(0).eq(is_silent).all()
        assert inputs.audio_loss_mask.any() == (not is_silent)
        clean = batch["video_latents"]["latents"].float().flatten(2).transpose(1, 2)
        is_clean = ~inputs.video_loss_mask
        assert torch.equal(inputs.video.latent[is_clean], clean[is_clean])
        # Three latent frames of 6 tokens: the last one, or the job's first one in half of the samples.
        expected = [[False] * 12 + [True] * 6] if is_silent else [[True] * 6 + [False] * 12, [False] * 18]
        assert all(row in expected for row in is_clean.tolist())
    assert any("data/clips/loss" in line and "data/silent/loss" in line for line in lines)
    for line in lines:
        indices = [index for step, samples in by_step for index in samples if step == line["step"]]
        silent = sum(index >= 6 for index in indices)
        weighted = (4 - silent) * line.get("data/clips/loss", 0) + 0.25 * silent * line.get("data/silent/loss", 0)
        assert line["loss"] == pytest.approx(weighted / 4)
    last = lines[-1]
    assert last["data/clips/samples"] + last["data/silent/samples"] == last["data/samples"] == 8
    assert last["data/clips/samples"] == sum(index < 6 for index in samples)
    assert last["data/silent/epochs"] == last["data/silent/samples"] / 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<th>silent</th><td>{last['data/silent/samples']}</td>" in page


def test_a_job_of_one_source_twice_is_planned_with_both_names(tmp_path, nano_path, data_root):
    twice = [{"name": name, "repeats": number} for name, number in (("once", 1), ("often", 3))]
    plan = plan_job(load_job(write(tmp_path, nano_path, data_root, *twice)), 1)
    assert [(part.name, part.indices) for part in plan.parts] == [("once", range(6)), ("often", range(6, 12))]
    assert plan.drawn(plan.batches.batches_per_epoch) == {"once": (6, 1.0), "often": (18, 3.0)}
    # Equal conditions: samples of both share a forward.
    assert plan.batches.num_shapes == 1


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"root": "no/such"}], ['data.sources[0].root = "no/such"', "preprocess"]),
        ([{"weight": 0}], ["data.sources[0].weight = 0", "greater than 0"]),
        ([{"weight": 1, "repeats": 2}], ["data.sources[0].repeats = 2", "weight = 1", "keep one"]),
        ([{"weight": 1}, {"name": "b"}], ["data.sources[1].weight is missing", "other sources have one"]),
        ([{"name": "a"}, {"name": "a"}], ['data.sources[1].name = "a"', "data.sources[0]"]),
        ([{"name": "a/b"}], ["data.sources[0].name"]),
        (
            [{"modality": "video", "audio_conditions": [{"type": "prefix", "temporal_boundary": 1}]}],
            ['data.sources[0].audio_conditions = "prefix"', 'modality = "video"'],
        ),
        ([{"video_conditions": [{"type": "keyframe"}]}], ["data.sources[0].video_conditions[0].at is missing"]),
    ],
)
def test_a_contradictory_source_is_named(sources, words, tmp_path, nano_path, data_root):
    with pytest.raises(ConfigError) as caught:
        load_job(write(tmp_path, nano_path, data_root, *sources))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_sources_replace_the_root_and_need_a_stream_that_is_generated(tmp_path, nano_path, data_root):
    job = write(tmp_path, nano_path, data_root, {"modality": "audio"})
    with pytest.raises(ConfigError, match=r"data\.root = .* unset with data\.sources"):
        load_job(job, [f"--data.root={data_root}"])
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.modality = \"audio\": .* trains nothing"):
        load_job(job, ["--audio.is_generated=false"])
    conditioned = write(tmp_path, nano_path, data_root, {"video_conditions": [{"type": "first_frame"}]})
    with pytest.raises(ConfigError, match=r"video_conditions = \"first_frame\": .* clean already; remove"):
        load_job(conditioned, ["--video.is_generated=false"])


def test_a_trigger_word_that_the_captions_lack_is_refused(tmp_path, nano_path, data_root, monkeypatch):
    from ltx_titan.conditioning import sources

    job = load_job(write(tmp_path, nano_path, data_root, {"trigger": "SKS"}, {"name": "other", "trigger": "TOK"}))
    assert sources.prepared_triggers(job.data) == ["SKS", "TOK"]
    plan_job(job, 1)  # prepared by other tools: nothing is recorded
    monkeypatch.setattr(sources, "recorded_options", lambda folder, name: {"SKS"})
    with pytest.raises(ValueError, match=r"data\.sources\[1\]\.trigger = 'TOK': .* found 'SKS'; .*--lora-trigger TOK"):
        plan_job(job, 1)


def test_sources_that_are_not_on_this_machine_are_estimated_as_one(tmp_path):
    tables = {
        "model": {"init": "random", "shape": "ltx-2.3-22b", "num_layers": 1},
        "data": {"sources": [{"root": "no/such", "weight": 1.0}]},
        "video": {"is_generated": True, "latents_dir": "latents"},
    }
    notes = add_placeholders(tables, tmp_path)
    assert any("data.sources: not all found" in note for note in notes)
    assert build_job(tables, "job").data.root == str(tmp_path)
