"""Small real jobs for tests: the nano pack, a dataset of random latents, and runs on any number of gloo ranks."""

import json
import multiprocessing
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tomli_w
import torch

from ltx_titan.data import write_sample
from ltx_titan.weights import read_metadata
from tests.processes import run_here, run_ranks

# For jobs whose curve is all that a test reads: saving and exporting take longer than a few steps.
NO_CHECKPOINTS = {"checkpoint__enable": False}


@pytest.fixture(scope="session")
def nano_path(tmp_path_factory) -> Path:
    """The nano pack's single file."""
    from ltx_titan.nano.pack import make_nano  # loads diffusers, which most tests do without

    folder = tmp_path_factory.mktemp("nano")
    make_nano(folder)
    return next(folder.glob("*.safetensors"))


def write_dataset(root: Path, nano_path: Path, clips: int = 6, frames: int = 3, text_tokens: int = 128) -> Path:
    """Random latents with audio and text features of the nano pack's widths; returns the data root."""
    config = read_metadata(nano_path).transformer_config()
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for clip in range(clips):
        name = f"clip_{clip}.pt"
        video = {
            "latents": random(128, frames, 2, 3).bfloat16(),
            "num_frames": frames,
            "height": 2,
            "width": 3,
            "fps": 24.0,
        }
        audio = {"latents": random(8, 9, 16), "num_time_steps": 9, "frequency_bins": 16, "duration": 0.36}
        mask = (torch.arange(text_tokens) >= text_tokens - 5 - clip).long()
        text = {
            "video_prompt_embeds": random(text_tokens, config["cross_attention_dim"]).bfloat16(),
            "audio_prompt_embeds": random(text_tokens, config["audio_cross_attention_dim"]).bfloat16(),
            "prompt_attention_mask": mask,
        }
        for source, fields in {"latents": video, "audio_latents": audio, "conditions": text}.items():
            write_sample(root / source / name, fields)
    return root


@pytest.fixture(scope="session")
def data_root(tmp_path_factory, nano_path) -> Path:
    """Six joint audio-video samples of one shape."""
    return write_dataset(tmp_path_factory.mktemp("data"), nano_path)


def small_validation(nano_path: Path, **more: object) -> dict[str, object]:
    """Settings of `[validation]` for tiny clips in two steps, as `write_job` takes them; `more` adds to them."""
    table = {
        "interval": 2,
        "video_dims": [64, 64, 9],
        "inference_steps": 2,
        "stg_blocks": [1],
        "text_encoder_path": str(nano_path.parent / "text_encoder"),
        **more,
    }
    return {f"validation__{key}": value for key, value in table.items()}


def write_job(folder: Path, nano_path: Path, data_root: Path, **overrides: object) -> Path:
    """A float32 job file; `overrides` are `section__key=value`."""
    tables = {
        "job": {"dump_folder": str(folder / "run")},
        "model": {"checkpoint_path": str(nano_path)},
        "data": {"root": str(data_root), "num_workers": 1},
        "video": {
            "is_generated": True,
            "latents_dir": "latents",
            "conditions": [{"type": "first_frame", "probability": 0.5}],
        },
        "audio": {"is_generated": True, "latents_dir": "audio_latents"},
        "training": {"steps": 3, "global_batch_size": 4, "local_batch_size": 2, "dtype": "float32", "seed": 3},
        "optimizer": {"lr": 1e-3},
        "scheduler": {"name": "linear"},
        "checkpoint": {"interval": 0, "export_dtype": "float32"},
        "metrics": {"tensorboard": False},
    }
    if "training__global_batch_size" in overrides:
        del tables["training"]["local_batch_size"]  # 1, which divides any
    for key, value in overrides.items():
        section, name = key.split("__")
        tables[section] = {**tables.get(section, {}), name: value}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def train_rank(job: Path, *overrides: str) -> None:
    """Body of one rank: the trainer's own entry point, in a process group that exists already."""
    import torch.distributed as dist

    from ltx_titan.config import load_job
    from ltx_titan.plan import plan_job
    from ltx_titan.train import Trainer

    Trainer(plan_job(load_job(job, list(overrides)), dist.get_world_size())).train()


def train(job: Path, ranks: int = 1, *overrides: str) -> list[dict]:
    """Trains a job on `ranks` ranks and returns its metrics."""
    if ranks == 1:
        run_here(train_rank, job, *overrides)
    else:
        run_ranks(train_rank, ranks, job, *overrides)
    return read_run(job)


def start_rank(job: Path) -> BaseProcess:
    """Starts a job of one rank, as the command does, in a process forked with its modules; it can be killed."""
    process = multiprocessing.get_context("forkserver").Process(target=_run_command, args=(job,))
    process.start()
    return process


def _run_command(job: Path) -> None:
    from ltx_titan.train import main

    torch.set_num_threads(1)
    sys.exit(main([str(job)]))


def read_run(job: Path) -> list[dict]:
    """The lines of a job's metrics."""
    return [json.loads(line) for line in (job.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict]) -> list[tuple[float, float, float, float]]:
    """Values of each logged step that do not depend on the mesh."""
    return [(line["loss"], line["loss_video"], line["loss_audio"], line["grad_norm"]) for line in lines]
