"""Every file of train_configs/ trains on the nano pack, and conditions tokens as its mode promises."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_titan.build import build_transformer
from ltx_titan.conditioning import (
    ModelInputs,
    StreamTokens,
    check_conditions,
    patchify_audio,
    patchify_video,
    reference_scale,
    to_contexts,
)
from ltx_titan.config import load_job
from ltx_titan.data import Batch, collate, write_sample
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws, draw_step
from ltx_titan.lora import apply_lora, init_lora_, is_adapter, load_base
from ltx_titan.model import TextConnectors
from ltx_titan.plan import Plan, plan_job
from ltx_titan.validation.decode import DecodedSample, Decoders, decode_sample
from ltx_titan.validation.sampling import SampledLatents
from ltx_titan.validation.start import dataset_starts
from ltx_titan.weights import CONNECTORS, build_connectors, load_parameters, read_metadata, unused_by
from tests.jobs import train_rank
from tests.processes import run_ranks

CONFIGS = Path(__file__).parent.parent / "train_configs"
STEPS = 1
LEARNING_STEPS = 9
SMALL, WIDE = (10, 2, 4), (1, 10, 18)
AUDIO_STEPS = 12


def _none(grid: Tensor) -> Tensor:
    return torch.zeros_like(grid)


def _first(count: int) -> Callable[[Tensor], Tensor]:
    def is_clean(grid: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(grid[:count]), torch.zeros_like(grid[count:])])

    return is_clean


def _last(count: int) -> Callable[[Tensor], Tensor]:
    return lambda grid: _first(count)(grid).flip(0)


def _ends_and_middle(grid: Tensor) -> Tensor:
    is_clean = torch.zeros_like(grid)
    is_clean[[0, (len(grid) - 1) // 2, -1]] = True
    return is_clean


def _corner(grid: Tensor) -> Tensor:
    is_clean = torch.zeros_like(grid)
    is_clean[:, :9, :18] = True
    return is_clean


def _checkered(grid: Tensor) -> Tensor:
    return (torch.arange(grid.numel()) % 3 == 0).view(grid.shape)


class Stream(NamedTuple):
    """Promises of a mode for one stream; `clean_cells` marks those of a target, [F, H, W] or [T, 1, 1]."""

    clean_cells: Callable[[Tensor], Tensor] = _none
    is_frozen: bool = False
    reference: str | None = None


class Mode(NamedTuple):
    """Both streams, absent where None, and the latent sizes that the file's own numbers make sense with."""

    video: Stream | None = Stream()
    audio: Stream | None = Stream()
    grid: tuple[int, int, int] = SMALL


FROZEN = Stream(is_frozen=True)
MODES = {
    "ltx2_full_av_8gpu": Mode(),
    "ltx23_full_av_8gpu": Mode(),
    "ltx23_full_1gpu": Mode(),
    "ltx23_lora_low_vram": Mode(),
    "ltx23_lora_t2v": Mode(),
    "ltx23_lora_subject": Mode(),
    "ltx23_lora_t2v_video_only": Mode(audio=None),
    "ltx23_lora_t2a": Mode(video=None),
    "ltx23_lora_i2v": Mode(Stream(_first(1))),
    "ltx23_lora_keyframes": Mode(Stream(_ends_and_middle)),
    "ltx23_lora_extend_forward": Mode(Stream(_first(8))),
    "ltx23_lora_extend_backward": Mode(Stream(_last(8))),
    "ltx23_lora_inpaint": Mode(Stream(_checkered), None),
    "ltx23_lora_outpaint": Mode(Stream(_corner), None, WIDE),
    "ltx23_lora_ic_v2v": Mode(Stream(_first(1), reference="reference_latents"), None),
    "ltx23_lora_a2v": Mode(audio=FROZEN),
    "ltx23_lora_v2a": Mode(video=FROZEN),
    "ltx23_lora_audio_extend_forward": Mode(None, Stream(_first(8))),
    "ltx23_lora_audio_extend_backward": Mode(None, Stream(_last(8))),
    "ltx23_lora_audio_inpaint": Mode(None, Stream(_checkered)),
    "ltx23_lora_ic_a2a": Mode(None, Stream(reference="reference_audio_latents")),
    "ltx23_lora_ic_av2av": Mode(Stream(reference="reference_latents"), Stream(reference="reference_audio_latents")),
}
# The same mode on other numbers or kinds of GPUs: file -> the file above; on many GPUs it trains on the same. LTX-2.5's
# is trained by test_ltx25.py.
SIZES = {
    "ltx25_lora_i2v": "ltx23_lora_i2v",
    "ltx2_full_av_4gpu": "ltx2_full_av_8gpu",
    "ltx2_full_av_64gpu": "ltx2_full_av_8gpu",
    "ltx23_full_av_4gpu": "ltx23_full_av_8gpu",
    "ltx23_full_av_64gpu": "ltx23_full_av_8gpu",
    "ltx23_lora_t2v_4gpu": "ltx23_lora_t2v",
    "ltx23_lora_t2v_8gpu": "ltx23_lora_t2v",
    "ltx23_lora_24gb": "ltx23_lora_t2v",
    "ltx23_lora_16gb": "ltx23_lora_t2v",
    "ltx23_lora_12gb": "ltx23_lora_t2v",
}
# Keyframes differ from image to video in their tokens alone, which the last test checks; test_ltx25.py trains them.
TRAINED = [name for name in MODES if name != "ltx23_lora_keyframes"]
# The others differ from these in what a step costs, not in its inputs.
LEARNING = [
    name
    for name in TRAINED
    if name not in ("ltx2_full_av_8gpu", "ltx23_full_1gpu", "ltx23_lora_low_vram", "ltx23_lora_subject")
]
# The others export without a checkpoint, whose writing takes as long as the step.
SAVED = ("ltx23_full_av_8gpu", "ltx23_lora_t2v")
# On one rank.
REDUCED = ("--parallelism.dp_replicate=1", "--training.global_batch_size=2")
# Modes whose clips depend on more than their text are validated once, in one sampling step without text encoder.
CONDITIONED = ("a2v", "v2a", "i2v", "keyframes", "extend", "paint", "_ic_")
SAMPLED = [name for name in MODES if any(kind in name for kind in CONDITIONED)]
DECODED = ("ltx23_lora_outpaint",)  # its clips have one frame
VALIDATED = (
    "--validation.dataset_samples=1",
    "--validation.inference_steps=1",
    "--validation.video_cfg_scale=1",
    "--validation.audio_cfg_scale=1",
)


def write_data(root: Path, nano_path: Path, grid: tuple[int, int, int]) -> Path:
    """Four samples with everything that any mode reads; video references are 2 x smaller and 3 x sparser."""
    config = read_metadata(nano_path).transformer_config()
    generator = torch.Generator().manual_seed(11)

    def video(sizes: tuple[int, int, int], fps: float) -> dict:
        fields = dict(zip(("num_frames", "height", "width"), sizes, strict=True))
        return {"latents": torch.randn(128, *sizes, generator=generator).bfloat16(), "fps": fps} | fields

    def audio() -> dict:
        return {"latents": torch.randn(8, AUDIO_STEPS, 16, generator=generator), "num_time_steps": AUDIO_STEPS}

    def text(width: int) -> Tensor:
        return torch.randn(128, width, generator=generator).bfloat16()

    frames, height, width = grid
    for clip in range(4):
        fields = {
            "latents": video(grid, 24.0),
            "reference_latents": video(((frames - 1) // 3 + 1, height // 2, width // 2), 8.0),
            "audio_latents": audio(),
            "reference_audio_latents": audio(),
            "video_masks": {"mask": _checkered(torch.zeros(grid)).float()},
            "audio_masks": {"mask": _checkered(torch.zeros(AUDIO_STEPS)).float()},
            "conditions": {
                "video_prompt_embeds": text(config["cross_attention_dim"]),
                "audio_prompt_embeds": text(config["audio_cross_attention_dim"]),
                "prompt_attention_mask": (torch.arange(128) >= 120 - clip).long(),
            },
        }
        for source, sample in fields.items():
            write_sample(root / source / f"clip_{clip}.pt", sample)
    return root


@pytest.fixture(scope="module")
def data_roots(tmp_path_factory, nano_path) -> dict[tuple[int, int, int], Path]:
    return {grid: write_data(tmp_path_factory.mktemp("data"), nano_path, grid) for grid in (SMALL, WIDE)}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, nano_path, data_roots) -> Callable[[str], list[str]]:
    """Paths, and no compilation: it takes minutes on a CPU."""
    folder = tmp_path_factory.mktemp("modes")

    def root(name: str) -> str:
        data = data_roots[MODES[SIZES.get(name, name)].grid]
        if name == "ltx23_lora_subject":  # without its trigger word, which these captions lack
            sources = (f'{{name = "{part}", root = "{data}", weight = 1}}' for part in ("subject", "class"))
            return f"--data.sources=[{', '.join(sources)}]"
        return f"--data.root={data}"

    return lambda name: [
        "--compile.enable=false",
        *(["--validation.stg_blocks=[1]"] if name.startswith("ltx2_") else []),
        f"--validation.text_encoder_path={nano_path.parent / 'text_encoder'}",
        f"--model.checkpoint_path={nano_path}",
        root(name),
        f"--job.dump_folder={folder / name}",
    ]


def quick_decode(latents: SampledLatents, decoders: Decoders, seed: int = 0) -> DecodedSample:
    """Black frames instead of decoded ones: 73 frames take a CPU ten seconds, and decoding has its own tests."""
    if latents.video is None:
        return decode_sample(latents, decoders, seed)
    assert latents.video.isfinite().all()
    return DecodedSample(torch.zeros(8 * latents.video.shape[2] - 7, 16, 16, 3, dtype=torch.uint8), None)


def train_all(jobs: list[tuple[Path, list[str]]]) -> None:
    """Trains one job after the other in this process; an error is written to a file in the run's folder."""
    from ltx_titan.train.saves import Saves
    from ltx_titan.validation import engine

    save = Saves.save
    for path, arguments in jobs:
        engine.decode_sample = decode_sample if path.stem in DECODED else quick_decode
        Saves.save = save if path.stem in SAVED else lambda *_: None
        try:
            train_rank(path, *arguments)
        except Exception as error:
            folder = Path(load_job(path, arguments).job.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(repr(error))


@pytest.fixture(scope="module")
def runs(overrides) -> Callable[[str], Path]:
    """Folder of each mode's run. One process trains them all, for starting one costs more than two steps."""
    jobs = []
    for name in TRAINED:
        reduced = REDUCED if name.endswith("_8gpu") else ()
        validated = VALIDATED if name in SAMPLED else ("--validation.skip_initial_validation=true",)
        arguments = [*overrides(name), f"--training.stop_at={STEPS}", *reduced, *validated]
        jobs.append((CONFIGS / f"{name}.toml", arguments))
    run_ranks(train_all, 1, jobs)
    return lambda name: Path(load_job(CONFIGS / f"{name}.toml", overrides(name)).job.dump_folder)


def test_every_job_file_is_a_mode_here():
    # Two jobs that run_train.sh makes the data for are no recipes.
    names = [path.stem for path in CONFIGS.glob("*.toml") if path.stem not in ("debug", "nano_concept")]
    assert sorted(names) == sorted([*MODES, *SIZES])


@pytest.mark.parametrize("name", [name for name in [*MODES, *SIZES] if name.endswith("gpu")])
def test_a_job_file_for_many_gpus_is_planned_for_as_many(name, overrides):
    gpus = int(name.rpartition("_")[2].removesuffix("gpu"))
    plan = plan_job(load_job(CONFIGS / f"{name}.toml", overrides(name)), gpus)
    degrees = plan.degrees
    assert degrees.dp * degrees.cp * degrees.tp == gpus
    assert plan.job.training.global_batch_size == gpus
    like = load_job(CONFIGS / f"{SIZES.get(name, name)}.toml", overrides(name))
    same = ("model", "video", "audio", "sigma", "lora", "optimizer", "scheduler", "loss")
    assert all(getattr(plan.job, section) == getattr(like, section) for section in same)


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINED)
def test_a_job_file_trains_as_shipped(runs, overrides, name):
    folder, mode = runs(name), MODES[name]
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]
    for stream, promised in (("video", mode.video), ("audio", mode.audio)):
        is_generated = promised is not None and not promised.is_frozen
        assert all((line[f"loss_{stream}"] is not None) == is_generated for line in lines)
    # Without a norm where each weight is updated as soon as its gradient is there.
    assert all(0 < line["loss"] < 10 and (name == "ltx23_full_1gpu" or line["grad_norm"] > 0) for line in lines)
    (export,) = (folder / "export").glob("*.safetensors")
    with safe_open(export, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if "_lora_" in name:
        assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in tensors)
        assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_B.weight"))
    else:
        assert any(key.endswith("audio_proj_out.weight") for key in tensors)
    clips = sorted(path.name for path in folder.glob("samples/step-0/sample-*"))
    kind = "wav" if mode.video is None else "png" if mode.grid[0] == 1 else "mp4"
    assert clips == ([f"sample-01.{kind}"] if name in SAMPLED else [])
    assert (folder / "report.html").stat().st_size > 0
    has_reference = mode.video is not None and mode.video.reference is not None
    found = [metadata.get(f"reference_{part}_scale_factor") for part in ("spatial", "temporal")]
    assert found == (["2", "3"] if has_reference else [None, None])


@pytest.fixture(scope="module")
def connectors(nano_path, overrides) -> TextConnectors:
    plan = plan_job(load_job(CONFIGS / "ltx23_lora_t2v.toml", overrides("ltx23_lora_t2v")), 1)
    module = build_connectors(plan.source, nano_path).float().requires_grad_(False).to_empty(device="cpu")
    load_parameters(module, nano_path, component=CONNECTORS)
    return module.eval()


def build_model(plan: Plan) -> nn.Module:
    """The job's model on one device, without a mesh."""
    model, unused = build_transformer(plan.source, plan.modalities), unused_by(plan.modalities)
    if plan.job.model.mode == "full":
        load_parameters(model.to_empty(device="cpu"), plan.source.path, allow_unused=unused)
    else:
        apply_lora(model, plan.job.lora)
        load_base(model.to_empty(device="cpu"), plan.source.path, allow_unused=unused)
        init_lora_(model, seed=1)
    return model


def draw(plan: Plan, batch: Batch) -> StepDraws:
    """Draws of one step in which all conditions fire, so that a chance of one half cannot hide what they do."""
    plans = plan.strategy.draw_plan(batch)
    draws = draw_step(*plans, sampler=ShiftedLogitNormal(), seed=5, step=1, indices=(0, 1))
    fired = {
        name: None if uses is None else [use if use is None else torch.ones_like(use) for use in uses]
        for name, uses in (("video_uses", draws.video_uses), ("audio_uses", draws.audio_uses))
    }
    return dataclasses.replace(draws, **fired)


def check_stream(name: str, promised: Stream | None, batch: Batch, inputs: ModelInputs) -> None:
    """Clean tokens are the data's own, bit for bit, at time 0 and out of the loss; all others are noised."""
    modality, target, mask = (getattr(inputs, f"{name}{part}") for part in ("", "_target", "_loss_mask"))
    if promised is None:
        assert modality is None
        return
    patchify = patchify_video if name == "video" else patchify_audio
    latents = batch[f"{name}_latents"]["latents"].float()
    clean = patchify(latents)
    grid = torch.zeros(latents.shape[2:] if name == "video" else (latents.shape[2], 1, 1))
    is_clean = (
        torch.ones(grid.numel(), dtype=torch.bool)
        if promised.is_frozen
        else promised.clean_cells(grid).flatten().bool()
    )
    if promised.reference:
        reference = patchify(batch[promised.reference]["latents"].float())
        clean = torch.cat([reference, clean], dim=1)
        is_clean = torch.cat([torch.ones(reference.shape[1], dtype=torch.bool), is_clean])
    assert torch.equal(modality.latent[:, is_clean], clean[:, is_clean])
    assert not modality.timesteps[:, is_clean].any()
    assert (modality.latent[:, ~is_clean] != clean[:, ~is_clean]).any(dim=-1).all()
    assert torch.equal(modality.timesteps[:, ~is_clean], modality.sigma[:, None].expand(-1, int((~is_clean).sum())))
    assert (target is None) == promised.is_frozen
    if mask is not None:
        assert torch.equal(mask, (~is_clean).expand_as(mask))


def check_start(promised: Stream | None, start: StreamTokens | None, latents: Tensor | None) -> None:
    """Sampling starts from the conditioned tokens of the data, bit for bit, and from nothing else of it."""
    if promised is None:
        assert start is None
        return
    assert start is not None
    assert latents is not None
    clean = (patchify_video if latents.ndim == 5 else patchify_audio)(latents.float())
    grid = torch.zeros(latents.shape[2:] if latents.ndim == 5 else (latents.shape[2], 1, 1))
    assert start.is_frozen == promised.is_frozen
    is_clean = promised.clean_cells(grid).flatten().bool() | promised.is_frozen
    assert torch.equal(start.target.tokens, torch.where(is_clean[:, None], clean, torch.zeros(())))
    if not promised.is_frozen:
        assert start.conditioned is not None
        assert torch.equal(start.conditioned, is_clean[None])
    assert len(start.references) == (promised.reference is not None)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_learns_and_leaves_clean_tokens_and_frozen_weights_unchanged(name, overrides, connectors):
    mode = MODES[name]
    is_lora = "_lora_" in name
    base = ["--lora.base_dtype=float32"] if is_lora else []
    plan = plan_job(load_job(CONFIGS / f"{name}.toml", [*overrides(name), *base]), 1)
    keys = [plan.dataset.shape_key(index) for index in range(len(plan.dataset))]
    assert check_conditions(plan.strategy, keys, plan.dataset.name) == []
    has_reference = mode.video is not None and mode.video.reference
    assert reference_scale(plan.strategy, keys) == ((2, 3) if has_reference else None)

    batch = collate([plan.dataset.load(0), plan.dataset.load(1)])
    batch["conditions"] = to_contexts(batch["conditions"], connectors, torch.float32)
    inputs = plan.strategy.prepare(batch, draw(plan, batch))
    check_stream("video", mode.video, batch, inputs)
    check_stream("audio", mode.audio, batch, inputs)

    single = {source: {n: value[:1] for n, value in fields.items()} for source, fields in batch.items()}
    starts = dataset_starts(plan.strategy, single)
    for stream, promised in (("video", mode.video), ("audio", mode.audio)):
        check_start(promised, starts.get(stream), single.get(f"{stream}_latents", {}).get("latents"))

    if name not in LEARNING:
        return
    model = build_model(plan)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(is_adapter(name) == is_lora for name in trained)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2 if is_lora else 2e-3)
    losses = []
    for _ in range(LEARNING_STEPS):
        video, audio = model(inputs.video, inputs.audio)
        for prediction in (video, audio):
            if prediction is not None and prediction.requires_grad:
                prediction.retain_grad()
        loss = plan.strategy.loss(video, audio, inputs)
        loss.total.backward()
        for prediction, promised in ((video, mode.video), (audio, mode.audio)):
            if promised is not None and promised.is_frozen:
                assert prediction.grad is None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    assert losses[-1] < 0.7 * losses[0], losses
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None for name in frozen)
    assert all(torch.equal(parameters[name], before) for name, before in frozen.items())
