"""The trainer end to end: losses that do not depend on the mesh, exact resume, exports, and errors."""

import gc
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ltx_titan.config import load_job
from ltx_titan.data import read_sample, write_sample
from ltx_titan.model import LTXTransformer
from ltx_titan.optim import Optimizers
from ltx_titan.plan import plan_job
from ltx_titan.train import Trainer, main
from ltx_titan.weights import load_parameters, read_metadata
from tests.jobs import NO_CHECKPOINTS, curve, read_run, start_rank, train, train_rank, write_dataset, write_job
from tests.processes import run_here, run_ranks, wait_while_running

EXPORT = "run/export/transformer-step-{}.safetensors"


def without_audio(job: Path) -> Path:
    """Removes the `[audio]` table of a job file, in place."""
    before, after = job.read_text().split("[audio]")
    job.write_text(before + "[training]" + after.split("[training]")[1])
    return job


@pytest.fixture(scope="module")
def single_run(tmp_path_factory, nano_path, data_root) -> list[dict]:
    """Two steps on one rank, all four samples in one forward."""
    settings = {"training__steps": 2, "training__local_batch_size": 4, **NO_CHECKPOINTS}
    return train(write_job(tmp_path_factory.mktemp("single"), nano_path, data_root, **settings))


@pytest.fixture(scope="module")
def finished_job(tmp_path_factory, nano_path, data_root) -> Path:
    """A job of one step that has ended; tests leave its folder as it is."""
    job = write_job(tmp_path_factory.mktemp("finished"), nano_path, data_root, training__steps=1)
    train(job)
    return job


@pytest.mark.distributed
def test_losses_and_norms_do_not_depend_on_ranks_and_micro_batches(tmp_path, nano_path, data_root, single_run):
    """Two micro-batches of one sample on each of two ranks, instead of one of four."""
    settings = {"training__steps": 2, "training__local_batch_size": 1, **NO_CHECKPOINTS}
    lines = train(write_job(tmp_path, nano_path, data_root, **settings), 2)
    torch.testing.assert_close(torch.tensor(curve(lines)), torch.tensor(curve(single_run)), rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_hsdp_equals_one_rank(tmp_path, nano_path, data_root, single_run):
    settings = {"parallelism__dp_replicate": 2, "training__steps": 2, "training__local_batch_size": 1, **NO_CHECKPOINTS}
    job = write_job(tmp_path, nano_path, data_root, **settings)
    torch.testing.assert_close(torch.tensor(curve(train(job, 4))), torch.tensor(curve(single_run)), rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_activation_checkpointing_changes_no_number(tmp_path, nano_path, data_root, single_run):
    settings = {"training__local_batch_size": 4, "activation_checkpoint__mode": "full", **NO_CHECKPOINTS}
    settings["training__steps"] = 2
    job = write_job(tmp_path, nano_path, data_root, **settings)
    torch.testing.assert_close(torch.tensor(curve(train(job))), torch.tensor(curve(single_run)), rtol=1e-5, atol=0)


def train_and_count_graphs(job: Path) -> int:
    """Trains a job in this process; returns the number of graphs that were compiled."""
    from torch._dynamo.utils import counters

    counters.clear()
    train_rank(job)
    return counters["stats"]["unique_graphs"]


@pytest.mark.distributed
def test_a_compiled_job_trains_to_the_same_losses(tmp_path, nano_path, data_root):
    """On one stream, which halves what Inductor has to compile."""

    def write(name: str, **settings: object) -> Path:
        job = write_job(tmp_path / name, nano_path, data_root, training__steps=2, **NO_CHECKPOINTS, **settings)
        return without_audio(job)

    eager, compiled = write("eager"), write("compiled", compile__enable=True)
    assert run_ranks(train_and_count_graphs, 1, eager) == [0]
    assert run_ranks(train_and_count_graphs, 1, compiled) == [1]  # one graph for all blocks, micro-batches and steps
    losses, expected = ([(line["loss"], line["grad_norm"]) for line in read_run(job)] for job in (compiled, eager))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_resume_after_a_kill_is_bit_exact(tmp_path, nano_path, data_root):
    settings = {"training__steps": 4, "checkpoint__interval": 2, "training__local_batch_size": 4}
    straight = write_job(tmp_path / "straight", nano_path, data_root, **settings)
    killed = write_job(tmp_path / "killed", nano_path, data_root, **settings)
    expected = train(straight)

    process = start_rank(killed)
    wait_while_running(process, (tmp_path / "killed/run/checkpoint/step-2").is_dir)
    process.kill()
    process.join()
    lines = train(killed)

    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert curve(lines) == curve(expected)
    exports = [tmp_path / name / EXPORT.format(4) for name in ("straight", "killed")]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def test_the_export_reloads_bit_for_bit_under_the_official_names(nano_path, finished_job):
    export = finished_job.parent / EXPORT.format(1)
    source = read_metadata(nano_path)
    prefix = "model.diffusion_model."
    with safe_open(export, framework="pt") as file:
        assert file.metadata()["model_version"] == source.raw["model_version"]
        keys = set(file.keys())
    assert keys == {k for k in source.tensors if k.startswith(prefix)}  # the text connectors included
    reloaded = LTXTransformer.from_config(read_metadata(export).transformer_config())
    load_parameters(reloaded, export)
    written = load_file(export)
    assert all(torch.equal(written[prefix + name], tensor) for name, tensor in reloaded.state_dict().items())
    trained = load_file(nano_path)
    assert not torch.equal(trained[f"{prefix}proj_out.weight"].float(), written[f"{prefix}proj_out.weight"])


def test_an_export_can_be_trained(tmp_path, data_root, finished_job):
    export = finished_job.parent / EXPORT.format(1)
    # Its text connectors come from the export itself.
    assert len(train(write_job(tmp_path, export, data_root, training__steps=1))) == 1


def test_a_job_without_audio_trains_video_and_exports_the_audio_stream_of_its_base(tmp_path, nano_path, data_root):
    lines = train(without_audio(write_job(tmp_path, nano_path, data_root, training__steps=1)))
    assert lines[0]["loss_audio"] is None
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_video"], rel=1e-6)
    # The audio stream is the base's: with the config of an audio-video model, readers would leave it uninitialized.
    exported, base = load_file(tmp_path / EXPORT.format(1)), load_file(nano_path)
    audio = [key for key in base if key.startswith("model.diffusion_model.") and "audio" in key]
    assert audio
    assert all(torch.equal(exported[key], base[key]) for key in audio)


def test_mixed_shapes_train_in_one_job(tmp_path, nano_path):
    root = write_dataset(tmp_path / "data", nano_path, clips=3)
    write_dataset(tmp_path / "more", nano_path, clips=2, frames=2)
    for source in ("latents", "audio_latents", "conditions"):
        for clip in (tmp_path / "more" / source).glob("*.pt"):
            clip.rename(root / source / f"short_{clip.name}")
    one, two = (
        train(write_job(tmp_path / f"on_{n}", nano_path, root, training__local_batch_size=2, **NO_CHECKPOINTS), n)
        for n in (1, 2)
    )
    torch.testing.assert_close(torch.tensor(curve(two)), torch.tensor(curve(one)), rtol=1e-5, atol=0)


def test_random_weights_and_synthetic_data_need_no_files(tmp_path, nano_path):
    shape = tmp_path / "shape.json"
    shape.write_text(read_metadata(nano_path).raw["config"])
    job = write_job(tmp_path, nano_path, tmp_path, model__init="random", model__shape=str(shape), model__num_layers=1)
    text = job.read_text().replace(f'checkpoint_path = "{nano_path}"\n', "")
    job.write_text(text.replace(f'root = "{tmp_path}"', 'source = "synthetic"'))
    overrides = ["--data.synthetic.width=64", "--data.synthetic.height=64", "--data.synthetic.num_frames=17"]
    lines = train(job, 1, *overrides, "--data.synthetic.text_tokens=8", "--training.steps=2")
    assert lines[1]["loss"] > 0


def test_a_finished_job_exits_with_nothing_to_do(finished_job, caplog):
    before = read_run(finished_job)
    caplog.set_level("INFO", "ltx_titan")
    assert main([str(finished_job)]) == 0
    assert "step-1 has step 1, and the job ends at step 1 of 1" in caplog.text
    assert read_run(finished_job) == before


def test_steps_that_a_resumed_run_does_not_save_are_called_lost(tmp_path, finished_job, caplog):
    folder = shutil.copytree(finished_job.parent / "run", tmp_path / "run")
    overrides = [f"--job.dump_folder={folder}", "--training.steps=2", "--checkpoint.enable=false"]
    caplog.set_level("INFO", "ltx_titan")
    assert main([str(finished_job), *overrides]) == 0
    assert "the weights of step 2 are neither saved nor exported" in caplog.text
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-1"]


def test_a_new_run_in_a_used_folder_is_refused(finished_job, caplog):
    assert main([str(finished_job), "--checkpoint.resume=false"]) == 1
    assert "is not empty" in caplog.text


def test_a_stop_signal_saves_and_the_run_resumes(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=400)
    process = start_rank(job)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_while_running(process, lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    reached = read_run(job)[-1]["step"]
    assert (tmp_path / f"run/checkpoint/step-{reached}").is_dir()
    assert len(train(job, 1, f"--training.stop_at={reached + 1}")) == reached + 1


def test_wrong_input_is_named_before_any_process_group(tmp_path, nano_path, data_root, caplog):
    def message(**settings: object) -> str:
        caplog.clear()
        assert main([str(write_job(tmp_path / "job", nano_path, data_root, **settings))]) == 1
        assert not torch.distributed.is_initialized()
        return caplog.text

    assert "no_such.safetensors" in message(model__checkpoint_path=str(tmp_path / "no_such.safetensors"))
    assert "training.stepz" in message(training__stepz=1)

    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(nano_path.read_bytes()[:-1000])
    assert str(torn) in message(model__checkpoint_path=str(torn))

    root = write_dataset(tmp_path / "data", nano_path, clips=2)
    clip = root / "latents" / "clip_1.pt"
    clip.write_bytes(clip.read_bytes()[:-500])
    assert str(clip) in message(data__root=str(root))

    clip.unlink()
    text = message(data__root=str(root), training__global_batch_size=3, training__local_batch_size=2)
    assert "global_batch_size" in text


def test_the_plan_counts_all_tokens(tmp_path, nano_path, data_root):
    plan = plan_job(load_job(write_job(tmp_path, nano_path, data_root)), 1)
    assert plan.sample_tokens(0) == 3 * 2 * 3 + 9


@pytest.mark.distributed
def test_lora_trains_resumes_and_exports_an_adapter(tmp_path, nano_path, data_root):
    settings = {"model__mode": "lora", "lora__rank": 4, "lora__alpha": 4.0, "training__steps": 3}
    straight = train(write_job(tmp_path / "straight", nano_path, data_root, **settings))
    job = write_job(tmp_path / "parts", nano_path, data_root, **settings)
    train(job, 2, "--training.stop_at=2")
    lines = train(job, 1)
    torch.testing.assert_close(torch.tensor(curve(lines)), torch.tensor(curve(straight)), rtol=1e-5, atol=0)
    tensors = load_file(tmp_path / "straight/run/export/lora-step-3.safetensors")
    assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in tensors)
    assert any(key.endswith("lora_B.weight") and tensor.abs().max() > 0 for key, tensor in tensors.items())


def test_a_sample_without_audio_trains_like_a_job_without_audio(tmp_path, nano_path):
    # One clip: which of several gets which noise depends on the dataset's fingerprint, which audio changes.
    root = write_dataset(tmp_path / "data", nano_path, clips=1)
    for clip in (root / "audio_latents").glob("*.pt"):
        write_sample(clip, {**read_sample(clip, "audio"), "present": False})
    settings = {"training__steps": 1, "training__global_batch_size": 1, **NO_CHECKPOINTS}
    lines = train(write_job(tmp_path / "silent", nano_path, root, **settings))
    job = write_job(tmp_path / "video", nano_path, root, **settings)
    assert lines[0]["loss_audio"] is None
    assert not [key for key in lines[0] if key.startswith("loss/audio")]
    assert train(without_audio(job))[0]["loss_video"] == pytest.approx(lines[0]["loss_video"], rel=1e-5)


def silenced(root: Path, *clips: int) -> Path:
    """Marks the audio of some clips of a dataset as absent."""
    for clip in clips:
        path = root / f"audio_latents/clip_{clip}.pt"
        write_sample(path, {**read_sample(path, "audio"), "present": False})
    return root


@pytest.mark.distributed
def test_the_audio_loss_is_a_mean_over_the_clips_with_audio_on_all_ranks(tmp_path, nano_path):
    root = silenced(write_dataset(tmp_path / "data", nano_path, clips=4), 0, 1, 2)
    lines = train(write_job(tmp_path, nano_path, root, training__steps=1, **NO_CHECKPOINTS), 2)
    # One of four clips has audio, and the training loss is a mean over all four.
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_video"] + lines[0]["loss_audio"] / 4, rel=1e-5)
    counted = [value for key, value in lines[0].items() if key.startswith("loss/audio_sigma")]
    assert counted == pytest.approx([lines[0]["loss_audio"]])


def test_steps_that_learn_nothing_are_counted_and_jobs_that_cannot_learn_are_refused(tmp_path, nano_path):
    root = silenced(write_dataset(tmp_path / "data", nano_path, clips=2), 0)
    settings = {"training__steps": 2, "training__global_batch_size": 1, **NO_CHECKPOINTS}
    job = write_job(tmp_path, nano_path, root, **settings)
    job.write_text(job.read_text().split("[video]")[0] + "[audio]" + job.read_text().split("[audio]")[1])
    lines = train(job)
    assert sorted(line.get("data/idle_steps", 0) for line in lines) == [0, 1]
    [idle] = [line for line in lines if line.get("data/idle_steps")]
    assert (idle["loss"], idle["loss_audio"], idle["loss_video"]) == (None, None, None)
    silenced(root, 1)
    with pytest.raises(ValueError, match=r"no sample can train anything, .*clip_0.*the audio is absent in 2 of 2"):
        plan_job(load_job(job), 1)


@pytest.mark.parametrize("skipped", [0, 5])
def test_gradients_that_the_update_clips_train_to_the_same_losses(tmp_path, nano_path, data_root, monkeypatch, skipped):
    settings = {"training__max_grad_norm": 0.01, "training__max_skipped_steps": skipped, **NO_CHECKPOINTS}
    expected = curve(train(write_job(tmp_path / "scaled", nano_path, data_root, **settings)))
    # As on a GPU.
    monkeypatch.setattr(Optimizers, "can_scale", Optimizers.can_skip)
    monkeypatch.setattr("ltx_titan.train.step.scale_grads_", None)
    found = curve(train(write_job(tmp_path / "update", nano_path, data_root, **settings)))
    assert min(norm for *_, norm in found) > 0.01
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)


def test_updates_in_the_backward_pass_are_the_same_without_a_norm(tmp_path, nano_path, data_root):
    settings = {"training__local_batch_size": 4, "training__max_grad_norm": 0.0, **NO_CHECKPOINTS}
    expected = train(write_job(tmp_path / "after", nano_path, data_root, **settings))
    lines = train(write_job(tmp_path / "during", nano_path, data_root, **settings, optimizer__in_backward=True))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert all(line["grad_norm"] is None for line in lines)


def test_caption_dropout_changes_what_is_trained_but_not_the_draws(tmp_path, nano_path, data_root, single_run):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1, data__caption_dropout=1.0, **NO_CHECKPOINTS)
    loss = train(job)[0]["loss"]
    assert loss != single_run[0]["loss"]
    assert loss == pytest.approx(single_run[0]["loss"], rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer__in_backward": True, "training__max_grad_norm": 0.0, "optimizer__ema_decay": 0.9},
        {"model__mode": "lora", "lora__rank": 2, "parallelism__stream_blocks": 1, "training__dtype": "bfloat16"},
    ],
    ids=["in_backward and ema", "lora and streaming"],
)
def test_a_process_that_trains_twice_has_the_memory_of_the_first_job_back(tmp_path, nano_path, data_root, settings):
    def train_and_watch() -> None:
        plan = plan_job(load_job(job), 1)
        trainer = Trainer(plan)
        trainer.train()
        weights.extend(weakref.ref(parameter) for parameter in trainer.model.parameters())

    weights: list[weakref.ref] = []
    settings = {"training__steps": 1, "training__local_batch_size": 4, **NO_CHECKPOINTS, **settings}
    job = write_job(tmp_path, nano_path, data_root, **settings)
    run_here(train_and_watch)
    gc.collect()
    assert weights
    assert not [weight() for weight in weights if weight() is not None]
