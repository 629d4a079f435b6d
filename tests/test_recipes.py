"""Every job file ends with clips to look at, trains as fast as its memory allows, and states what it needs."""

import re
import tempfile
from pathlib import Path

import pytest

from ltx_titan.common.hardware import GIB, GPUS
from ltx_titan.config import JobConfig, PreservationSection, ValidationSection, build_job, read_tables
from ltx_titan.config.streams import Reference
from ltx_titan.diffusion.guidance import Guidance
from ltx_titan.estimate.placeholders import add_placeholders
from ltx_titan.estimate.prediction import estimate
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.workload import Workload, make_setup, make_workload
from ltx_titan.model.flops import layer_flops
from ltx_titan.plan import Plan, plan_job
from ltx_titan.validation.sampling import guidance_of, schedule_of

CONFIGS = Path(__file__).parent.parent / "train_configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("ltx*.toml"))
# Modes whose clips depend on more than their text.
CONDITIONED = ("a2v", "v2a", "i2v", "keyframes", "extend", "paint", "_ic_")
LINE = re.compile(
    r"# Estimated by `ltx-titan estimate --gpus (?P<gpus>\d+) --gpu (?P<gpu>\w+)`, not measured: .*\n"
    r"#   (?P<clip>\d+x\d+x\d+), .*\n"
)


def planned(name: str, gpus: int, clip: tuple[int, int, int]) -> tuple[Plan, ValidationSection, Workload]:
    """The recipe on placeholders for checkpoint and data, which leave out its validation and blank prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = CONFIGS / f"{name}.toml"
        tables, origins = read_tables(path, [])
        validation = {**tables["validation"]}
        assert validation.pop("text_encoder_path")
        preservation = PreservationSection.model_validate(tables.get("preservation", {}))
        add_placeholders(tables, Path(folder), clip=clip)
        section = build_job({**tables, "validation": validation}, str(path), origins).validation
        plan = plan_job(build_job(tables, str(path), origins), gpus)
        return plan, section, make_workload(plan, preservation)


def estimated_line(job: JobConfig, work: Workload, plan: Plan, gpu: str, clip: str) -> str:
    """The comment about memory and time, from the project's own estimate."""
    degrees = plan.degrees
    gpus = degrees.dp * degrees.cp * degrees.tp
    memory = GPUS[gpu].memory
    budget_gib = job.activation_checkpoint.memory_gib
    setup = make_setup(job, degrees, gpu)
    setup = with_stream_blocks(work, setup, job.parallelism.stream_blocks, budget_gib, memory)
    setup = with_levels(work, setup, budget_gib, memory)
    found = estimate(work, setup, GPUS[gpu])
    batch, steps = job.training.global_batch_size, job.training.steps
    minutes = max(1, round(found.step_time_s * steps / 60))
    clips = "clip" if batch == 1 else "clips"
    return (
        f"# Estimated by `ltx-titan estimate --gpus {gpus} --gpu {gpu}`, not measured: "
        f"{found.memory.needed / GIB:.0f} GiB per GPU, {found.step_time_s:.2g} s per step of {batch} {clips} of\n"
        f"#   {clip}, MFU {found.mfu:.0%}, {minutes} min for {steps} steps.\n"
    )


def forward_flops(work: Workload, passes: float) -> float:
    """FLOPs of the blocks' forward on one sample; a LoRA step has two such matmuls, a full one three."""
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    flops = layer_flops(work.architecture, **counts, trained=work.trained)
    return passes * (flops.linear / (3 if work.trained == "full" else 2) + flops.attention / 3)


def sampling_share(job: JobConfig, validation: ValidationSection, work: Workload) -> float:
    """FLOPs of a validation's sampling over those of the training steps between two validations."""
    sections = zip(guidance_of(validation), (job.video, job.audio), strict=True)
    streams = [guidance for guidance, section in sections if section is not None]
    both = job.video is not None and job.audio is not None

    def passes(guidance: Guidance) -> int:
        modality = both and guidance.modality_scale > 1
        return 1 + (guidance.cfg_scale > 1) + (guidance.stg_scale > 0) + modality

    steps = (len(schedule_of(validation)) - 1) * max(passes(guidance) for guidance in streams)
    width, height, frames = validation.video_dims
    tokens = (width // 32) * (height // 32) * ((frames - 1) // 8 + 1) if job.video is not None else 0
    one = forward_flops(work, steps)
    # Sizes of prompts are their own; attention is a small part, so tokens scale the rest.
    of_prompts = len(validation.samples) * one * (tokens / work.video_tokens if work.video_tokens else 1.0)
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    flops = layer_flops(work.architecture, **counts, trained=work.trained)
    assert validation.interval is not None
    training = validation.interval * (flops.linear + flops.attention) * job.training.global_batch_size
    return (of_prompts + validation.dataset_samples * one) / training


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_validates_cheaply_and_states_the_estimated_memory_and_time(name):
    text = (CONFIGS / f"{name}.toml").read_text()
    stated = LINE.search(text)
    assert stated, "the comment about estimated memory and time is missing"
    width, height, frames = (int(size) for size in stated["clip"].split("x"))
    plan, validation, work = planned(name, int(stated["gpus"]), (width, height, frames))
    assert stated[0] == estimated_line(plan.job, work, plan, stated["gpu"], stated["clip"])

    job = plan.job
    assert validation.interval is not None
    assert job.training.steps % validation.interval == 0
    assert validation.samples or validation.dataset_samples
    assert sampling_share(job, validation, work) < 0.08  # the rest of the tenth is for loading decoders and decoding
    assert bool(validation.dataset_samples) == any(kind in name for kind in CONDITIONED)
    assert job.compile.enable
    has_reference = any(
        isinstance(condition, Reference)
        for section in (job.video, job.audio)
        if section is not None
        for condition in section.conditions
    )
    assert has_reference == ("_ic_" in name)
