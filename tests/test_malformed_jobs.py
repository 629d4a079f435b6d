"""Malformed jobs, overrides and environments: each is refused in one clear message before a model is built."""
# ruff: noqa: E501  (one row a line)

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel

from ltx_titan.config import JobConfig
from ltx_titan.config.load import models_in
from tests.jobs import write_job
from tests.malformed import check, refuse_to_train, rows

__all__ = ["refuse_to_train"]

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def job(tmp_path_factory, nano_path, data_root):
    """Tables of a valid job."""
    return tomllib.loads(write_job(tmp_path_factory.mktemp("job"), nano_path, data_root).read_text())


def changed(job: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values by dotted key; None removes a key, a text `{...}` is filled in by the caller."""
    tables = tomllib.loads(tomli_w.dumps(job))
    for key, value in changes.items():
        *path, last = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return tables


def all_keys(model: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a job, tables of tables included."""
    for name, field in model.model_fields.items():
        inner = [found for found in models_in(field.annotation) if len(models_in(field.annotation)) == 1]
        if inner and not prefix.count("."):
            yield from all_keys(inner[0], f"{prefix}{name}.")
        elif prefix:
            yield f"{prefix}{name}"


WRONG_TYPES = rows(*((key, key, (key, "expected")) for key in all_keys()))


@pytest.mark.parametrize("row", WRONG_TYPES)
def test_a_value_of_another_type_is_named_by_its_key(row, job, tmp_path, runner, refuse_to_train):
    # A table where a value is expected: no key has this one.
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(changed(job, {row.change: {"nonsense": 1}})))
    check(runner.train(path), row)


# fmt: off
VALUES = rows(
    ("unknown section", {"trainer.steps": 5}, ("trainer", "training")),
    ("unknown key", {"training.step": 5}, ("training.step", "did you mean", "steps")),
    ("key of another section", {"training.lr": 1e-4}, ("training.lr", "valid:")),
    ("upper case", {"training.Steps": 5}, ("training.Steps", "valid:")),
    ("section is a number", {"training": 5}, ("training = 5", "expected")),
    ("section is a list", {"optimizer": [{"lr": 1}]}, ("optimizer", "expected")),
    ("steps 0", {"training.steps": 0}, ("training.steps = 0", "expected")),
    ("steps negative", {"training.steps": -5}, ("training.steps = -5", "expected")),
    ("steps text", {"training.steps": "5"}, ("training.steps", "without quotes")),
    ("steps float", {"training.steps": 1e30}, ("training.steps", "expected")),
    ("steps huge", {"training.steps": 10**30}, ("training.steps", "expected")),
    ("steps above all use", {"training.steps": 10**13}, ("training.steps", "expected")),
    ("steps bool", {"training.steps": True}, ("training.steps = true", "expected")),
    ("steps nan", {"training.steps": NAN}, ("training.steps = nan", "expected")),
    ("stop_at above steps", {"training.stop_at": 99}, ("training.stop_at = 99", "training.steps")),
    ("seed negative", {"training.seed": -1}, ("training.seed = -1", "expected")),
    ("seed of 65 bits", {"training.seed": 2**64}, ("training.seed", "expected")),
    ("batch 0", {"training.global_batch_size": 0}, ("training.global_batch_size = 0", "expected")),
    ("batch not divisible", {"training.local_batch_size": 3}, ("training.global_batch_size = 4", "multiple")),
    ("dtype", {"training.dtype": "float17"}, ("training.dtype", "bfloat16")),
    ("max_grad_norm negative", {"training.max_grad_norm": -1.0}, ("training.max_grad_norm", "expected")),
    ("max_grad_norm nan", {"training.max_grad_norm": NAN}, ("training.max_grad_norm", "expected")),
    ("gc_interval 0", {"training.gc_interval": 0}, ("training.gc_interval", "expected")),
    ("lr 0", {"optimizer.lr": -1e-4}, ("optimizer.lr", "expected")),
    ("lr nan", {"optimizer.lr": NAN}, ("optimizer.lr", "expected")),
    ("lr infinite", {"optimizer.lr": INF}, ("optimizer.lr", "expected")),
    ("lr above 1", {"optimizer.lr": 1e39}, ("optimizer.lr", "expected")),
    ("lr text", {"optimizer.lr": "1e-4"}, ("optimizer.lr", "without quotes")),
    ("optimizer unknown", {"optimizer.name": "adam"}, ("optimizer.name", "did you mean", "adamw")),
    ("betas of one", {"optimizer.betas": [0.9]}, ("optimizer.betas", "expected")),
    ("betas of 1", {"optimizer.betas": [0.9, 1.0]}, ("optimizer.betas", "expected")),
    ("weight decay negative", {"optimizer.weight_decay": -1.0}, ("optimizer.weight_decay", "expected")),
    ("ema 1", {"optimizer.ema_decay": 1.0}, ("optimizer.ema_decay", "expected")),
    ("in_backward with clipping", {"optimizer.in_backward": True, "training.local_batch_size": 4}, "max_grad_norm"),
    ("scheduler unknown", {"scheduler.name": "cosin"}, ("scheduler.name", "did you mean", "cosine")),
    ("scheduler of another name", {"scheduler.gamma": 0.5}, ("scheduler.gamma", "remove it")),
    ("warmup too long", {"scheduler.warmup_steps": 99}, ("scheduler.warmup_steps = 99", "training.steps")),
    ("warmup negative", {"scheduler.warmup_steps": -1}, ("scheduler.warmup_steps", "expected")),
    ("sigma unknown", {"sigma.name": "normal"}, ("sigma.name", "expected one of")),
    ("sigma std 0", {"sigma.std": 0.0}, ("sigma.std", "expected")),
    ("sigma order", {"sigma.name": "uniform", "sigma.min_value": 0.9, "sigma.max_value": 0.1}, "sigma.min_value"),
    ("no checkpoint", {"model.checkpoint_path": None}, ("model.checkpoint_path is missing", "set it")),
    ("checkpoint is not there", {"model.checkpoint_path": "/nope.safetensors"}, ("/nope.safetensors", "correct the path")),
    ("checkpoint is a folder", {"model.checkpoint_path": "{tmp}"}, ("model.checkpoint_path", "not a folder")),
    ("checkpoint with a NUL", {"model.checkpoint_path": "a\0b"}, ("model.checkpoint_path", "null byte")),
    ("checkpoint too long", {"model.checkpoint_path": "x" * 5000}, ("model.checkpoint_path", "correct the path")),
    ("checkpoint empty", {"model.checkpoint_path": ""}, ("model.checkpoint_path", "empty")),
    ("shape with a checkpoint", {"model.shape": "ltx-2-19b"}, ("model.shape", "remove it")),
    ("num_layers with a checkpoint", {"model.num_layers": 2}, ("model.num_layers", "remove it")),
    ("random without shape", {"model.init": "random", "model.checkpoint_path": None}, ("model.shape is missing", "ltx-2-19b")),
    ("shape unknown", {"model.init": "random", "model.checkpoint_path": None, "model.shape": "ltx-3"}, ("model.shape", "ltx-3")),
    ("mode unknown", {"model.mode": "dora"}, ("model.mode", "lora")),
    ("adapter in full mode", {"model.adapter_path": "{file}"}, ("model.adapter_path", "remove it")),
    ("adapter is not there", {"model.mode": "lora", "model.adapter_path": "/nope"}, ("model.adapter_path", "/nope")),
    ("connectors are not there", {"model.connectors_path": "/nope"}, ("model.connectors_path", "/nope")),
    ("modalities without audio", {"model.modalities": "video"}, ("model.modalities", "[audio]")),
    ("modalities unknown", {"model.modalities": "both"}, ("model.modalities", "expected one of")),
    ("no data", {"data.root": None}, ("data.root is missing", "set it")),
    ("data is not there", {"data.root": "/nope"}, ("data.root", "/nope", "correct the path")),
    ("data is a file", {"data.root": "{file}"}, ("data.root", "a folder")),
    ("data with a NUL", {"data.root": "a\0b"}, ("data.root", "null byte")),
    ("data source unknown", {"data.source": "folder"}, ("data.source", "precomputed")),
    ("dropout above 1", {"data.caption_dropout": 1.5}, ("data.caption_dropout", "expected")),
    ("workers negative", {"data.num_workers": -1}, ("data.num_workers", "expected")),
    ("prefetch 0", {"data.prefetch": 0}, ("data.prefetch", "expected")),
    ("on_bad_sample unknown", {"data.on_bad_sample": "ignore"}, ("data.on_bad_sample", "skip")),
    ("media without a table", {"data.source": "media"}, ("data.media.dataset_path is missing", "data.media.resolution_buckets")),
    ("synthetic width", {"data.source": "synthetic", "data.synthetic.width": 100}, ("data.synthetic.width", "multiple")),
    ("synthetic frames", {"data.source": "synthetic", "data.synthetic.num_frames": 10}, ("data.synthetic.num_frames", "expected")),
    ("synthetic fps", {"data.source": "synthetic", "data.synthetic.fps": 0.0}, ("data.synthetic.fps", "expected")),
    ("synthetic fps tiny", {"data.source": "synthetic", "data.synthetic.fps": 1e-30}, ("data.synthetic.fps", "expected")),
    ("no stream", {"video": None, "audio": None}, ("video is missing", "add")),
    ("nothing generated", {"video.is_generated": False, "audio.is_generated": False}, ("is_generated", "true")),
    ("latents_dir missing", {"video.latents_dir": None}, "video.latents_dir"),
    ("latents_dir of no folder", {"video.latents_dir": "lat"}, ("'lat'", "found only", "correct the folder's name")),
    ("latents_dir leads outside", {"video.latents_dir": "../x"}, ("video.latents_dir", "below the data root")),
    ("latents_dir absolute", {"audio.latents_dir": "/etc"}, ("audio.latents_dir", "below the data root")),
    ("latents_dir of audio", {"audio": None, "video.latents_dir": "audio_latents"}, ("expected video, found audio", "folder")),
    ("latents_dir twice", {"video.latents_dir": "audio_latents"}, ("'audio_latents'", "separate folder")),
    ("condition unknown", {"video.conditions": [{"type": "last_frame"}]}, ("video.conditions[0].type", "first_frame")),
    ("condition without type", {"video.conditions": [{"probability": 1.0}]}, ("video.conditions[0].type is missing", "add it")),
    ("condition is text", {"video.conditions": ["first_frame"]}, ("video.conditions[0]", "expected")),
    ("conditions are a table", {"video.conditions": {"type": "first_frame"}}, ("video.conditions", "expected")),
    ("probability above 1", {"video.conditions": [{"type": "first_frame", "probability": 2}]}, "video.conditions[0].probability"),
    ("crop of three", {"video.conditions": [{"type": "spatial_crop", "spatial_region": [0, 0, 32]}]}, "spatial_region"),
    ("crop upside down", {"video.conditions": [{"type": "spatial_crop", "spatial_region": [64, 0, 0, 32]}]}, "spatial_region"),
    ("prefix of 0", {"video.conditions": [{"type": "prefix", "temporal_boundary": 0}]}, "temporal_boundary"),
    ("mask folder leads outside", {"video.conditions": [{"type": "mask", "mask_dir": "../masks"}]}, ("mask_dir", "below the data root")),
    ("mask folder is not there", {"video.conditions": [{"type": "mask", "mask_dir": "masks"}]}, ("'masks'", "found only")),
    ("reference is not there", {"video.conditions": [{"type": "reference", "latents_dir": "refs"}]}, ("'refs'", "found only")),
    ("crop of audio", {"audio.conditions": [{"type": "spatial_crop", "spatial_region": [0, 0, 9, 9]}]}, "audio.conditions[0]"),
    ("loss weights 0", {"loss.video_weight": 0.0, "loss.audio_weight": 0.0}, ("loss.video_weight", "above 0")),
    ("loss weight of the only stream 0", {"audio": None, "loss.video_weight": 0.0}, ("loss.video_weight", "above 0")),
    ("loss weight negative", {"loss.video_weight": -1.0}, ("loss.video_weight", "expected")),
    ("loss weight nan", {"loss.video_weight": NAN}, ("loss.video_weight", "expected")),
    ("dp_shard 0", {"parallelism.dp_shard": 0}, ("parallelism.dp_shard", "-1")),
    ("dp_shard -2", {"parallelism.dp_shard": -2}, ("parallelism.dp_shard", "expected")),
    ("more ranks than there are", {"parallelism.tp": 2}, ("parallelism.dp_shard", "1 ranks")),
    ("dp_shard of 4", {"parallelism.dp_shard": 4, "training.local_batch_size": 1}, ("parallelism.dp_shard", "start 4 ranks")),
    ("cp 0", {"parallelism.cp": 0}, ("parallelism.cp", "expected")),
    ("recompute unknown", {"activation_checkpoint.mode": "all"}, ("activation_checkpoint.mode", "full")),
    ("every_k without k", {"activation_checkpoint.mode": "every_k"}, ("activation_checkpoint.k is missing", "set it")),
    ("k without every_k", {"activation_checkpoint.k": 2}, ("activation_checkpoint.k", "remove it")),
    ("budget without its mode", {"activation_checkpoint.memory_gib": 8.0}, ("activation_checkpoint.memory_gib", "budget")),
    ("float8 native in float32", {"float8.recipe": "native", "training.dtype": "float32"}, ("float8.recipe", "bfloat16")),
    ("float8 skip without recipe", {"float8.skip_blocks": 2}, ("float8.skip_blocks", "float8.recipe")),
    ("float8 recipe", {"float8.recipe": "fp8"}, ("float8.recipe", "rowwise")),
    ("float8 all_gather alone", {"float8.all_gather": True}, ("float8.all_gather", "float8.recipe")),
    ("float8 all_gather rowwise", {"float8.all_gather": True, "float8.recipe": "rowwise"}, ("float8.all_gather", "tensorwise")),
    ("graphs", {"compile.graphs": "yes"}, ("compile.graphs", "auto")),
    ("kernels", {"kernels.backend": "cuda"}, ("kernels.backend", "triton")),
    ("keep_last 0", {"checkpoint.keep_last": 0}, ("checkpoint.keep_last", "-1")),
    ("interval negative", {"checkpoint.interval": -1}, ("checkpoint.interval", "expected")),
    ("export dtype", {"checkpoint.export_dtype": "fp8"}, ("checkpoint.export_dtype", "bfloat16")),
    ("dump folder empty", {"job.dump_folder": ""}, ("job.dump_folder", "expected")),
    ("dump folder is a file", {"job.dump_folder": "{file}"}, ("{file}", "job.dump_folder")),
    ("dump folder below a file", {"job.dump_folder": "{file}/run"}, ("{file}", "job.dump_folder")),
    ("dump folder is a dangling link", {"job.dump_folder": "{link}"}, ("{link}", "job.dump_folder", "does not exist")),
    ("dump folder too long", {"job.dump_folder": "{tmp}/" + "x" * 300}, ("job.dump_folder", "too long")),
    ("dump folder in proc", {"job.dump_folder": "/proc/nope"}, ("/proc/nope", "job.dump_folder")),
    ("dump folder with a NUL", {"job.dump_folder": "a\0b"}, ("job.dump_folder", "null byte")),
    ("lora rank 0", {"model.mode": "lora", "lora.rank": 0}, ("lora.rank", "expected")),
    ("lora alpha 0", {"model.mode": "lora", "lora.alpha": 0.0}, ("lora.alpha", "expected")),
    ("lora dropout 1", {"model.mode": "lora", "lora.dropout": 1.0}, ("lora.dropout", "expected")),
    ("lora targets text", {"model.mode": "lora", "lora.targets": "attn1"}, ("lora.targets", '["attn1"]')),
    ("lora targets empty", {"model.mode": "lora", "lora.targets": []}, ("lora.targets", "expected")),
    ("lora targets unknown", {"model.mode": "lora", "lora.targets": ["attn9.to_q"]}, ("lora.targets", "attn9.to_q")),
    ("lora base dtype", {"model.mode": "lora", "lora.base_dtype": "int2"}, ("lora.base_dtype", "int4")),
    ("float8 matmuls without a float8 base", {"model.mode": "lora", "lora.float8_matmuls": "on"}, ("lora.float8_matmuls", "lora.base_dtype")),
    ("metrics interval 0", {"metrics.interval": 0}, ("metrics.interval", "expected")),
    ("wandb mode", {"metrics.wandb": "on"}, ("metrics.wandb", "online")),
    ("wandb project while off", {"metrics.wandb_project": "x"}, ("metrics.wandb_project", "remove it")),
    ("trace after the end", {"profiling.trace_start": 99}, ("profiling.trace_start", "training.steps")),
    ("validation without work", {"validation.interval": 2}, ("interval is set", "add samples")),
    ("validation dims", {"validation.video_dims": [64, 64]}, ("validation.video_dims", "expected")),
    ("validation dims text", {"validation.video_dims": "64x64x9"}, ("validation.video_dims", "expected")),
    ("validation dims not of the VAE", {"validation.samples": [{"prompt": "a"}], "validation.interval": 2, "validation.text_encoder_path": "{encoder}", "validation.video_dims": [65, 64, 9], "validation.stg_blocks": [1]}, ("video_dims", "65")),
    ("validation dims negative", {"validation.video_dims": [-64, 64, 9]}, ("validation.video_dims", "expected")),
    ("validation frame rate", {"validation.frame_rate": 0.0}, ("validation.frame_rate", "expected")),
    ("validation stg block", {"validation.samples": [{"prompt": "a"}], "validation.interval": 2, "validation.text_encoder_path": "{encoder}", "validation.video_dims": [64, 64, 9], "validation.stg_blocks": [99]}, ("validation.stg_blocks", "99")),
    ("validation text encoder missing", {"validation.samples": [{"prompt": "a"}], "validation.interval": 2, "validation.stg_blocks": [1]}, "validation.text_encoder_path"),
    ("validation text encoder is not there", {"validation.samples": [{"prompt": "a"}], "validation.interval": 2, "validation.stg_blocks": [1], "validation.text_encoder_path": "/nope"}, ("validation.text_encoder_path", "/nope")),
    ("validation held-out root", {"validation.interval": 2, "validation.held_out_root": "/nope"}, ("validation.held_out_root", "/nope")),
    ("validation held-out root is data without samples", {"validation.interval": 2, "validation.held_out_root": "{tmp}"}, ("validation.held_out_root", "{tmp}")),
    ("validation sigma above 1", {"validation.held_out_sigmas": [1.5]}, ("validation.held_out_sigmas", "expected")),
    ("validation sample without prompt", {"validation.samples": [{"seed": 1}]}, ("validation.samples[0].prompt is missing", "add")),
    ("validation prompt is a list", {"validation.samples": [{"prompt": ["a"]}]}, ("validation.samples[0].prompt", "quotes")),
    ("validation image is not there", {"validation.samples": [{"prompt": "a", "conditions": [{"type": "first_frame", "image_or_video": "/nope.png"}]}], "validation.interval": 2, "validation.text_encoder_path": "{encoder}", "validation.video_dims": [64, 64, 9], "validation.stg_blocks": [1]}, ("/nope.png", "correct the path")),
    ("validation both streams false", {"validation.samples": [{"prompt": "a"}], "validation.generate_video": False, "validation.generate_audio": False}, "both false"),
    ("validation steps of distilled", {"validation.samples": [{"prompt": "a"}], "validation.interval": 2, "validation.text_encoder_path": "{encoder}", "validation.video_dims": [64, 64, 9], "validation.stg_blocks": [1], "validation.schedule": "distilled", "validation.inference_steps": 30}, ("validation.inference_steps", "30")),
    ("validation use_ema without ema", {"validation.use_ema": True}, ("validation.use_ema", "optimizer.ema_decay")),
)
# fmt: on


@pytest.mark.parametrize("row", VALUES)
def test_a_malformed_job_is_refused_by_key(row, job, tmp_path, nano_path, runner, refuse_to_train):
    file = tmp_path / "a_file"
    file.write_text("text")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    filled = {
        "{tmp}": str(tmp_path),
        "{link}": str(link),
        "{file}": str(file),
        "{encoder}": str(nano_path.parent / "text_encoder"),
    }

    def fill(value: Any) -> Any:
        for key, path in filled.items():
            value = value.replace(key, path) if isinstance(value, str) else value
        return value

    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(changed(job, {key: fill(value) for key, value in row.change.items()})))
    check(runner.train(path), row._replace(parts=tuple(map(fill, row.parts))))


FILES = rows(
    ("empty", b"", ("model.checkpoint_path", "video")),
    ("not TOML", b"[training", ("job.toml", "valid TOML")),
    ("JSON", b'{"training": {}}', ("job.toml", "valid TOML")),
    ("YAML", b"training:\n  steps: 5\n", ("job.toml", "valid TOML")),
    ("latin-1", "[job]\ndescription = 'ä'".encode("latin-1"), ("job.toml", "UTF-8", "iconv")),
    ("UTF-16 cut", "[training]".encode("utf-16")[:-1], ("job.toml", "expected UTF-8")),
    ("binary", bytes(range(256)), ("job.toml", "expected UTF-8")),
    ("zeros", bytes(100), ("job.toml", "valid TOML")),
    ("key twice", b"[training]\nsteps = 1\nsteps = 2\n", ("job.toml", "valid TOML")),
    ("section twice", b"[training]\nsteps = 1\n[training]\nseed = 2\n", ("job.toml", "valid TOML")),
    ("deep nesting", b"a = " + b"[" * 5000 + b"]" * 5000, ("job.toml", "valid TOML")),
    ("duplicate table as value", b"training = 1\n[training]\nsteps = 2\n", ("job.toml", "valid TOML")),
    ("dates", b"[training]\nsteps = 2026-01-01\n", ("training.steps", "expected")),
)


@pytest.mark.parametrize("row", FILES)
def test_a_file_that_is_no_job_is_refused_by_name(row, tmp_path, runner, refuse_to_train):
    path = tmp_path / "job.toml"
    path.write_bytes(row.change)
    check(runner.train(path), row)


OVERRIDES = rows(
    ("without dashes", "training.steps=5", ("training.steps=5", "--section.key=value")),
    ("without section", "--steps=5", ("--steps=5", "--section.key=value")),
    ("empty key", "--training.=5", ("--training.=5", "--section.key=value")),
    ("dots only", "--..=5", ("--..=5", "--section.key=value")),
    ("unknown section", "--train.steps=5", ("override --train.steps=5", "train")),
    ("unknown key", "--training.step=5", ("override --training.step=5", "did you mean")),
    ("without value", "--training.steps", ("training.steps = true", "expected")),
    ("empty value", "--training.steps=", ("training.steps", "expected")),
    ("text", "--training.steps=many", ("training.steps", "many", "expected")),
    ("key of a value", "--training.steps.more=1", ("training.steps", "a table")),
    ("injected keys", "--job.dump_folder=a\nb=1\n\0", ("job.dump_folder", "null byte")),
    ("nan", "--optimizer.lr=nan", ("optimizer.lr", "expected")),
    ("list for a number", "--training.steps=[1]", ("training.steps", "expected")),
    ("number for a text", "--job.description=5", ("job.description", "quotes")),
    ("quotes left open", '--training.dtype="float32', ("training.dtype", "expected")),
    ("nested too deep", "--a.b.c.d.e=1", ("override --a.b.c.d.e=1", "a section of a job")),
    ("override before the job", None, ("--training.steps=1", "job file")),
    ("huge number", "--training.steps=" + "9" * 5000, ("training.steps", "expected")),
)


@pytest.mark.parametrize("row", OVERRIDES)
def test_a_malformed_override_is_named(row, job, tmp_path, runner, refuse_to_train):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(job))
    arguments = ["--training.steps=1", path] if row.change is None else [path, row.change]
    check(runner.train(*arguments), row)


ENVIRONMENT = rows(
    ("world size text", {"WORLD_SIZE": "two"}, ("WORLD_SIZE", "two", "expected")),
    ("world size 0", {"WORLD_SIZE": "0", "RANK": "0"}, ("WORLD_SIZE", "0", "expected")),
    ("world size negative", {"WORLD_SIZE": "-1", "RANK": "0"}, ("WORLD_SIZE", "expected")),
    ("world size without rank", {"WORLD_SIZE": "2"}, ("RANK", "WORLD_SIZE", "torchrun")),
    ("rank text", {"RANK": "first", "WORLD_SIZE": "1"}, ("RANK", "first", "expected")),
    ("rank beyond", {"RANK": "2", "WORLD_SIZE": "2"}, ("RANK", "WORLD_SIZE", "expected")),
    ("rank negative", {"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK", "expected")),
    (
        "port text",
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
        ("MASTER_PORT", "x"),
    ),
    (
        "port beyond",
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
        "MASTER_PORT",
    ),
    ("local rank text", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "gpu"}, ("LOCAL_RANK", "gpu")),
)


@pytest.mark.parametrize("row", ENVIRONMENT)
def test_a_malformed_environment_is_named(row, job, tmp_path, runner, monkeypatch, refuse_to_train):
    for name, value in row.change.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(job))
    check(runner.train(path), row)


LAUNCHES = rows(
    ("NGPU text", {"NGPU": "all"}, ("NGPU", "all", "expected")),
    ("NGPU 0", {"NGPU": "0"}, ("NGPU", "expected")),
    ("NGPU negative", {"NGPU": "-1"}, ("NGPU", "expected")),
    ("NNODES text", {"NNODES": "many", "MASTER_ADDR": "localhost"}, ("NNODES", "many", "expected")),
    ("NNODES without MASTER_ADDR", {"NNODES": "2"}, ("MASTER_ADDR", "NNODES")),
    ("NODE_RANK text", {"NNODES": "2", "MASTER_ADDR": "localhost", "NODE_RANK": "x"}, ("NODE_RANK", "x", "expected")),
    ("NODE_RANK beyond", {"NNODES": "2", "MASTER_ADDR": "localhost", "NODE_RANK": "2"}, ("NODE_RANK", "expected")),
    ("MASTER_PORT text", {"MASTER_PORT": "http"}, ("MASTER_PORT", "http", "expected")),
    ("MASTER_PORT beyond", {"MASTER_PORT": "70000"}, ("MASTER_PORT", "70000", "expected")),
)


@pytest.mark.parametrize("row", LAUNCHES)
def test_a_malformed_launch_is_named(row, tmp_path, runner, monkeypatch):
    for name, value in row.change.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ltx_titan.launch.launch", lambda arguments: pytest.fail(f"launched {arguments}"))
    check(runner.command("train", tmp_path / "job.toml"), row)
