"""The estimate against counts: bytes that autograd saves, shards and peaks of real builds on fake ranks."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_titan.cli import main
from ltx_titan.common.hardware import GIB, GPUS, bus_bandwidth
from ltx_titan.config import Degrees, build_job, load_job
from ltx_titan.estimate.command import PEAK_ERROR, TIME_ERROR, TIMED_LAYERS, overrides_of
from ltx_titan.estimate.dry_run import DryRun, dry_run
from ltx_titan.estimate.prediction import candidates, estimate, search, step_times
from ltx_titan.memory.budget import with_levels
from ltx_titan.memory.peak import Memory, saved_per_block
from ltx_titan.memory.workload import Setup, make_setup, make_workload
from ltx_titan.model import LTXTransformer, Modality
from ltx_titan.model.init import init_random_
from ltx_titan.parallel.activation_checkpoint import apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.parallelize import apply_compile
from ltx_titan.plan import Plan, plan_job
from ltx_titan.weights import released_config

LAYERS = 2
CONFIGS = Path(__file__).parents[2] / "train_configs"
BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
SYNTHETIC = {"source": "synthetic", "synthetic": {"num_samples": 2}}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plan_of(gpus: int, **sections: dict) -> Plan:
    """The LTX-2.3 shape cut to a few layers, on clips of 4,032 tokens."""
    tables = {
        "job": {"dump_folder": "outputs/none"},
        "model": {"init": "random", "shape": "ltx-2.3-22b", "num_layers": LAYERS, **sections.pop("model", {})},
        "data": SYNTHETIC,
        "video": {"is_generated": True, "latents_dir": "latents"},
        "audio": {"is_generated": True, "latents_dir": "audio_latents"},
        "training": {"global_batch_size": gpus},
        **sections,
    }
    return plan_job(build_job(tables, "test"), gpus)


def predict(plan: Plan) -> Memory:
    return estimate(make_workload(plan), make_setup(plan.job, plan.degrees), GPUS["h100"]).memory


# Mesh and checkpointing -> the job's sections.
BUILDS = {
    "hsdp 2 x 2, full": (4, {"parallelism": {"dp_replicate": 2}, "activation_checkpoint": {"mode": "full"}}),
    "tp 2 x cp 2, batch 2": (
        8,
        {"parallelism": {"tp": 2, "cp": 2}, "training": {"global_batch_size": 4, "local_batch_size": 2}},
    ),
}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Plan, DryRun]]:
    """Real builds and steps, counted byte by byte."""
    plans = {name: plan_of(gpus, **sections) for name, (gpus, sections) in BUILDS.items()}
    return {name: (plan, dry_run(plan)) for name, plan in plans.items()}


@pytest.mark.parametrize("name", BUILDS)
def test_shards_and_optimizer_state_equal_a_real_build(counted, name):
    plan, run = counted[name]
    memory = predict(plan)
    assert memory.parameters + memory.optimizer == pytest.approx(run.resident, rel=1e-3)


@pytest.mark.parametrize("name", BUILDS)
def test_peak_is_within_a_tenth_of_a_real_build(counted, name):
    plan, run = counted[name]
    assert predict(plan).peak == pytest.approx(run.peak, rel=0.10)


VIDEO, AUDIO, TEXT = 311, 53, 29
HEADS = 2


def saved_bytes(recompute: str, backend: str | None, timesteps: int) -> int:
    """Bytes that autograd saves of one more block, in a small model of the released proportions."""
    config = released_config("ltx-2.3-22b")["transformer"] | {"num_layers": 2}
    for prefix, size in (("", 128), ("audio_", 64)):
        config |= {f"{prefix}num_attention_heads": HEADS, f"{prefix}cross_attention_dim": HEADS * size}
    model = LTXTransformer.from_config(config)
    init_random_(model, 0)
    model = model.to(torch.bfloat16)
    if backend is not None:
        apply_selective_checkpointing(model.transformer_blocks, (recompute,) * len(model.transformer_blocks))
        apply_compile([])  # for its partitioner settings, which decide what is saved; Inductor's code does not matter
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    if recompute == "full":
        apply_full_checkpointing(model.transformer_blocks)
    blocks = list(model.transformer_blocks)

    def stream(tokens: int, axes: int, width: int) -> Modality:
        values = torch.tensor([[0.0, 0.5][-timesteps:]])
        return Modality(
            latent=torch.randn(1, tokens, 128),
            sigma=torch.tensor([0.5]),
            timesteps=torch.full((1, tokens), 0.5),
            positions=torch.rand(1, axes, tokens, 2),
            context=torch.randn(1, TEXT, width),
            timestep_values=values,
            timestep_index=torch.zeros(1, tokens, dtype=torch.int64),
        )

    streams = stream(VIDEO, 3, HEADS * 128), stream(AUDIO, 1, HEADS * 64)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    totals = []
    for count in (2, 1):
        model.transformer_blocks = torch.nn.ModuleList(blocks[:count])
        kept = {}

        def keep(tensor: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*streams)
        totals.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    return totals[0] - totals[1]


@pytest.mark.parametrize(
    ("recompute", "backend", "timesteps"),
    [
        ("none", None, 1),
        ("none", None, 2),
        ("full", None, 1),
        ("matmuls", "aot_eager_decomp_partition", 1),
    ],
)
def test_saved_activations_equal_what_autograd_saves(recompute, backend, timesteps):
    work = make_workload(plan_of(1))
    work = replace(
        work,
        transformer={**work.transformer, "num_attention_heads": HEADS, "audio_num_attention_heads": HEADS},
        largest=(VIDEO, AUDIO),
        text_tokens=TEXT,
        video_timesteps=timesteps,
        audio_timesteps=timesteps,
    )
    setup = Setup(Degrees(), compile=backend is not None)
    assert saved_per_block(work, setup, recompute) == pytest.approx(
        saved_bytes(recompute, backend, timesteps), rel=0.02
    )


def measured_rows() -> list[tuple[str, dict]]:
    """Rows of whole steps in docs/benchmarks, each with the job that was run."""
    found = []
    for name, job in (("full_step.jsonl", "ltx23_full_step.toml"), ("lora_step.jsonl", "ltx23_lora_step.toml")):
        found += [(job, json.loads(line)) for line in (BENCHMARKS / name).read_text().splitlines()]
    return found


@pytest.mark.parametrize(
    ("job", "row"), measured_rows(), ids=lambda value: value["case"] if isinstance(value, dict) else ""
)
def test_estimate_agrees_with_a_measured_run(job, row):
    """The errors are those that the command prints."""
    common, *cases = row["command"].partition("--all=")[2].split("--case=")
    (own,) = {case.partition(":")[2] for case in cases if case.startswith(f"{row['case']}:")}
    overrides = [word for word in f"{common} {own}".split() if word.startswith("--") and "." in word.partition("=")[0]]
    # Rows without this field were measured before there were slots.
    overrides.append(f"--parallelism.fsdp_static_slots={row.get('static_slots', 'off')}")
    # On when rows that do not say so were measured; jobs without a float8 base ignore it.
    overrides.insert(0, "--lora.float8_matmuls=auto")
    plan = plan_job(load_job(BENCHMARKS / job, overrides), row["ranks"])
    gpu = GPUS["h200" if "H200" in row["device"] else "h100"]
    work = make_workload(plan)
    memory_gib = plan.job.activation_checkpoint.memory_gib
    found = estimate(work, with_levels(work, make_setup(plan.job, plan.degrees), memory_gib, gpu.memory), gpu)
    assert found.memory.peak / GIB == pytest.approx(row["peak_mem_gib"], rel=PEAK_ERROR)
    # Without graphs the host decides, whose speed differs between machines and is not predicted; nor does the command
    # promise this error for updates in the backward pass.
    if (
        plan.job.compile.graphs != "off"
        and not plan.job.optimizer.in_backward
        and plan.architecture.num_layers >= TIMED_LAYERS
    ):
        assert found.time.total == pytest.approx(row["step_time_s"], rel=TIME_ERROR)


def test_a_search_only_proposes_what_can_be_planned_and_fits():
    plan = plan_of(16, model={"num_layers": 48}, training={"global_batch_size": 8}, parallelism={"cp": 2})
    work, setup = make_workload(plan), make_setup(plan.job, plan.degrees)
    found = search(work, setup, GPUS["h100"])
    assert found
    assert all(one.memory.needed <= GPUS["h100"].memory for one in found)
    times = [one.time.total for one in found]
    assert all(later >= earlier * 0.98 for earlier, later in itertools.pairwise(times))
    for one in {one.setup.degrees: one for one in found}.values():
        table = dict(part.removeprefix("--").split("=") for part in overrides_of(one.setup).split())
        mesh = {key.partition(".")[2]: int(value) for key, value in table.items() if "parallelism" in key}
        batch = {"global_batch_size": 8, "local_batch_size": one.setup.local_batch_size}
        assert plan_of(16, model={"num_layers": 1}, parallelism=mesh, training=batch).degrees == one.setup.degrees
    assert {setup.degrees.cp * setup.degrees.tp for setup in candidates(work, setup, 8)} >= {2, 4, 8, 16}


def test_memory_and_bandwidth_follow_the_setup():
    plan = plan_of(8, model={"num_layers": 48})
    work = make_workload(plan)

    def memory(**changes: object) -> Memory:
        return estimate(work, Setup(Degrees(dp_shard=8), **changes), GPUS["h100"]).memory

    def peak(**changes: object) -> float:
        return memory(**changes).peak

    assert peak() > peak(recompute="every_k", k=2) > peak(recompute="full")
    assert peak(recompute="full") > peak(recompute="full", cpu_offload=True)
    # At this length the peak is at the end of the backward pass, when the inputs of blocks are freed in any case.
    kept, moved = memory(recompute="full"), memory(recompute="full", offload_activations=True)
    assert kept.start_of_backward > moved.start_of_backward
    slow, fast = bus_bandwidth(GPUS["h100"], 8, 8), bus_bandwidth(GPUS["h100"], 1, 64)
    assert slow == GPUS["h100"].network
    assert slow < fast <= GPUS["h100"].nvlink


def test_gradients_may_use_what_activations_free_where_ranks_exchange_them():
    def setup(gpus: int, gpu: str, **parallelism: object) -> Setup:
        plan = plan_of(gpus, model={"num_layers": 48}, parallelism=parallelism)
        return make_setup(plan.job, plan.degrees, gpu)

    node = {"fsdp_copy_engines": "auto"}
    assert setup(8, "h200", **node).exchanges_gradients
    assert not setup(8, "h200", fsdp_copy_engines="off").exchanges_gradients
    assert setup(8, "h200", fsdp_copy_engines="off", fsdp_exchange_gradients="on").exchanges_gradients
    for gpus, gpu in ((1, "h200"), (16, "h200"), (8, "4090")):
        assert not setup(gpus, gpu, **node).exchanges_gradients
    work = make_workload(plan_of(8, model={"num_layers": 48}))
    graphed = Setup(Degrees(dp_shard=8), compile=True, graphs=True, static_slots=True)
    exchanging = replace(graphed, exchanges_gradients=True)
    apart = estimate(work, graphed, GPUS["h200"]).memory.apart
    assert apart > 8e9
    assert estimate(work, exchanging, GPUS["h200"]).memory.apart == 0
    assert estimate(work, exchanging, GPUS["h200"]).time.total < estimate(work, graphed, GPUS["h200"]).time.total


def test_native_float8_is_expected_to_be_faster_than_torchaos_with_graphs():
    work = make_workload(plan_of(8, model={"num_layers": 48}))
    times = {
        recipe: estimate(work, Setup(Degrees(dp_shard=8), compile=True, graphs=True, float8=recipe), GPUS["h100"]).time
        for recipe in ("none", "native", "tensorwise")
    }
    # The count of docs/benchmarks/log.md, at the 4,032 tokens of this job.
    assert times["native"].total < min(times["none"].total, times["tensorwise"].total)
    assert times["none"].total / times["native"].total == pytest.approx(1.1, abs=0.05)


def test_a_job_with_missing_files_is_estimated_and_its_placeholders_are_listed(tmp_path, capsys):
    out = tmp_path / "estimate.json"
    job = CONFIGS / "ltx23_lora_ic_v2v.toml"
    status = main(["estimate", str(job), "--gpus", "1", "--clip", "1280x704x49", "--json", str(out), "--lora.rank=16"])
    text = capsys.readouterr().out
    assert status == 0
    assert "12,320 video" in text  # 7 x 22 x 40 of the target, and as many of its reference
    assert "not found; assuming ltx-2.3-22b" in text
    assert "assuming clips of 1280x704x49" in text
    row = json.loads(out.read_text())
    assert 20 < row["peak_mem_gib"] < row["needed_gib"] < 79
    assert row["step_time_s"] > 0


def test_a_job_whose_data_is_prepared_is_estimated_without_its_checkpoint(tmp_path, data_root, capsys):
    job = tmp_path / "job.toml"
    text = (CONFIGS / "ltx23_lora_t2v.toml").read_text()
    job.write_text(text.replace('root = "clips"', f'root = "{data_root}"'))
    assert main(["estimate", str(job), "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert "4,032 video" in text
    assert f"the connectors that {data_root} needs are in the checkpoint; assuming clips of 768x448x89" in text


MEDIA = """
[model]
checkpoint_path = "/nowhere/ltx-2.3-22b-dev.safetensors"
mode = "lora"
[data]
source = "media"
[data.media]
dataset_path = "/nowhere/clips"
text_encoder_path = "/nowhere/gemma"
resolution_buckets = "768x448x89"
[video]
is_generated = true
latents_dir = "latents"
[validation]
interval = 100
text_encoder_path = "/nowhere/gemma"
held_out_root = "/nowhere/held-out"
[[validation.samples]]
prompt = "x"
conditions = [{ type = "first_frame", image_or_video = "/nowhere/a.png" }]
"""


@pytest.mark.parametrize("job", ["media", "ltx23_lora_inpaint", "ltx23_lora_audio_inpaint"])
def test_jobs_of_every_source_and_mask_are_estimated_without_their_files(job, tmp_path, capsys):
    path = CONFIGS / f"{job}.toml"
    if job == "media":
        path = tmp_path / "job.toml"
        path.write_text(MEDIA)
    assert main(["estimate", str(path), "--gpu", "rtx6000-blackwell"]) == 0
    text = capsys.readouterr().out
    assert "1 x rtx6000-blackwell (not measured)" in text
    assert "assuming clips of 768x448x89" in text


def test_the_table_of_gpus_has_what_people_use_and_says_what_was_measured():
    used = {"3090", "4090", "5090", "a6000", "l40s", "rtx6000-ada", "rtx6000-blackwell", "b200", "gh200"}
    assert used <= set(GPUS)
    assert {name for name, gpu in GPUS.items() if gpu.is_measured} == {"h100", "h200"}
    for gpu in GPUS.values():
        assert gpu.is_measured or "nothing measured" in gpu.assumed
        # A matmul cannot exceed the data sheet, and memory is below what the card is sold with.
        assert gpu.matmul < gpu.peak <= gpu.matmul_float8 / 0.5
        assert 8 * GIB < gpu.memory < 192e9


def test_a_job_that_does_not_fit_says_what_to_try(capsys):
    assert main(["estimate", str(CONFIGS / "ltx23_full_av_8gpu.toml"), "--gpus", "1", "--gpu", "h100"]) == 1
    assert "docs/parallelism.md, When it does not fit" in capsys.readouterr().out


def test_a_job_that_does_not_fit_exits_with_1_and_a_search_finds_one_that_does(capsys):
    job = str(CONFIGS / "ltx23_full_av_8gpu.toml")
    assert main(["estimate", job, "--gpus", "4", "--training.global_batch_size=4"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    options = ["--training.global_batch_size=4", "--optimizer.name=adamw8bit", "--search"]
    assert main(["estimate", job, "--gpus", "4", *options]) == 0
    assert "--parallelism.dp_shard=" in capsys.readouterr().out


def test_a_dry_run_of_512_ranks_passes_or_reports_the_error_of_a_cluster(tmp_path, capsys):
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\ninit = "random"\nshape = "ltx-2.3-22b"\nnum_layers = 1\n[data]\nsource = "synthetic"\n'
        '[audio]\nis_generated = true\nlatents_dir = "audio_latents"\n[training]\nglobal_batch_size = 256\n'
    )
    options = ["--gpus", "512", "--dry-run", "--parallelism.tp=2"]
    assert main(["estimate", str(job), *options]) == 0
    assert "dry run: 512 ranks" in capsys.readouterr().out
    # An error that the ranks of a cluster would raise in their first update.
    assert main(["estimate", str(job), *options, "--parallelism.tp=32", "--optimizer.name=adamw8bit"]) == 1
    assert "parallelism.tp = 32 cuts through blocks" in capsys.readouterr().err


def test_sample_times_are_those_of_the_estimate_unless_an_mfu_is_assumed():
    """`ltx-titan inspect` and `ltx-titan estimate` agree on the step time of a clip."""
    sections = {
        "model": {"num_layers": 48},
        "compile": {"enable": True},
        "activation_checkpoint": {"mode": "selective"},
    }
    plan = plan_of(1, **sections)
    work = make_workload(plan)
    seconds = estimate(work, make_setup(plan.job, plan.degrees), GPUS["h100"]).step_time_s
    times = step_times(None, "ltx-2.3-22b", "H100", None, "full")
    own = times.seconds(work.video_tokens, work.audio_tokens)
    # The job's text has another length, which is a percent of the work.
    assert own == pytest.approx(seconds, rel=0.02)
    assumed = step_times(None, "ltx-2.3-22b", "H100", 0.25, "full").seconds(work.video_tokens, work.audio_tokens)
    assert assumed == pytest.approx(estimate(work, Setup(plan.degrees), GPUS["h100"]).flops / 0.25 / 989e12, rel=0.02)


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "job.toml", "--gpuz", "8"])
    assert "--gpuz" in capsys.readouterr().err


def test_a_dry_run_and_a_search_use_the_levels_of_the_gpu_that_is_asked_about():
    plan = plan_of(1, model={"num_layers": 2}, activation_checkpoint={"mode": "budget"})
    work, setup = make_workload(plan), make_setup(plan.job, plan.degrees)
    large, small = (with_levels(work, setup, memory_gib, 80 * GIB) for memory_gib in ("auto", 0.2))
    assert large.levels != small.levels
    phases: list[str] = []
    assert dry_run(plan, small.levels, on_phase=phases.append).after_forward < dry_run(plan, large.levels).after_forward
    # With more layers and ranks each takes a minute, and says so.
    assert [phase.split()[0] for phase in phases] == ["building", "optimizer", "forward", "backward", "update"]
    # Levels belong to the mode that a candidate replaces.
    assert all(not candidate.levels for candidate in candidates(work, large, 8))
