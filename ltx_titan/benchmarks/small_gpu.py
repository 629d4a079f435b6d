"""Checks and times LoRA with streamed weights as on small GPUs, on one GPU whose allocator is capped.

    ltx-titan bench small-gpu --out rows.jsonl

1. Equality, on few blocks: for every format of the base, a resident and a streamed job train with deterministic
   operations; all losses and gradient norms must be equal, eager and as CUDA graphs.
2. Time, on all blocks: the settings of the recipes for 24, 16 and 12 GB. Each size trains with streamed weights under
   its cap and with resident weights without one, one after the other.
3. Validation (`--variants validation`): the same jobs with a validation after the second step, all of it under the
   cap: prompts through the text encoder, sampling with streamed weights, decoders loaded next to the job. Without
   `--checkpoint` on placeholders of the released sizes, whose weights are zeros.

A row holds the cap, the peak of what the allocator reserved and of what the process took on the device, the estimate,
and the size of the pinned host memory. The exit status is 1 if a loss differs, a job fails, or a peak exceeds its cap.

The cap limits memory only: a small GPU also has a slower link to the host, slower matmuls and another architecture.
`gpu_ms_to_copy_a_block` is measured on this machine.
"""

import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.train import measure
from ltx_titan.common.files import write_text
from ltx_titan.common.hardware import GIB, GPUS
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.options import Maybe, Overrides
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.config import load_job
from ltx_titan.estimate.prediction import estimate
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.peak import pinned_bytes
from ltx_titan.memory.workload import make_setup, make_workload
from ltx_titan.parallel.mesh import init_distributed
from ltx_titan.plan import plan_job

DESCRIPTION = __doc__

_JOB = """\
[model]
init = "random"
shape = "ltx-2.3-22b"
mode = "lora"
[lora]
targets = ["t2v"]
[data]
source = "synthetic"
[data.synthetic]
fps = 24.0
num_samples = 16
[video]
is_generated = true
latents_dir = "latents"
[audio]
is_generated = true
latents_dir = "audio_latents"
[training]
global_batch_size = 1
[optimizer]
name = "adamw"
[compile]
enable = true
[activation_checkpoint]
mode = "full"
[metrics]
tensorboard = false
"""

_VALIDATION = """\
[validation]
interval = 2
skip_initial_validation = true
text_encoder_path = "{text_encoder}"
inference_steps = 4
video_dims = [512, 288, 49]
[[validation.samples]]
prompt = "A red fox trots through fresh snow between birches."
"""

# GB of the card -> (memory of such a card, base, clip), as in the recipes.
SIZES = {
    24: (GPUS["4090"].memory, "bfloat16", (1280, 704, 49)),
    16: (GPUS["4080"].memory, "int8", (768, 448, 89)),
    12: (GPUS["3060"].memory, "nvfp4", (768, 448, 57)),
}
_BASES = ("bfloat16", "int8", "nvfp4")
_EQUALITY_STEPS = 6
_NOT_RUN = "not run: the budget of seconds is used up"


@dataclass(frozen=True)
class SmallGpuOptions:
    """Options of `ltx-titan bench small-gpu`."""

    sizes: tuple[int, ...] = tuple(SIZES)
    """Sizes to time, in GB; 0 for none."""

    bases: tuple[str, ...] = _BASES
    """Formats of the base to compare, any `lora.base_dtype`; "none" for none."""

    variants: tuple[str, ...] = ("recipe", "streamed", "resident")
    """Jobs to time of each size: the recipe, and with full checkpointing streamed and resident weights; "validation":
    the recipe with a validation, not timed."""

    checkpoint: Maybe[Path] = None
    """Checkpoint with codecs of the variant "validation". Default: placeholders with the sizes of LTX-2.3."""

    text_encoder: Maybe[Path] = None
    """Text encoder of `--checkpoint`."""

    outside: Maybe[float] = None
    """GiB that a process takes besides the allocator's memory, if others use the GPU as well. Default: measured."""

    equality_layers: int = 6
    """Blocks of the comparison."""

    steps: int = 9
    """Steps of a timed job."""

    budget: float = 560.0
    """Seconds after which no further job starts."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    overrides: Overrides = ()
    """Overrides of all jobs, such as --model.num_layers=4."""


def run(options: SmallGpuOptions) -> int:
    """Runs all parts; returns 1 if something is not as it should be."""
    begun = time.monotonic()
    quiet_libraries()
    device = init_distributed()
    set_up_logging()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.toml"
        write_text(job, _JOB)
        bench = _Bench(job, options.overrides, device, begun + options.budget, options.outside, options.out)
        # In the order of what matters most, because the budget may end before the list.
        bases = [base for base in options.bases if base != "none"]
        for base in bases[:1]:
            bench.equality(base, options.equality_layers, rows)
        for size in options.sizes:
            if size in SIZES:
                rows += bench.timed(size, options.steps, options.variants)
                write_rows(options.out, rows)
                if "validation" in options.variants:
                    validating = _validating_job(Path(folder), options.checkpoint, options.text_encoder)
                    rows.append(replace(bench, job=validating).validated(size))
                    write_rows(options.out, rows)
        for base in bases[1:]:
            bench.equality(base, options.equality_layers, rows)
    dist.destroy_process_group()
    wrong = [row for row in rows if not row["ok"] and row.get("error") != _NOT_RUN]
    skipped = sum(row.get("error") == _NOT_RUN for row in rows)
    print(f"{len(rows)} rows, {len(wrong)} not as expected, {skipped} not run", flush=True)
    return 1 if wrong else 0


@dataclass(frozen=True)
class _Bench:
    job: Path
    overrides: Sequence[str]
    device: torch.device
    until: float
    outside: float | None
    out: Path | None

    def equality(self, base: str, layers: int, rows: list[dict]) -> None:
        """Compares losses and gradient norms of streamed jobs with those of resident ones; adds rows."""
        # Without graphs everything is launched from Python; with them copies are part of the recording.
        for graphs in ("off", "auto") if self.device.type == "cuda" else ("off",):
            common = [f"--lora.base_dtype={base}", f"--training.steps={_EQUALITY_STEPS}", "--job.deterministic=true"]
            common += [f"--model.num_layers={layers}", f"--compile.graphs={graphs}"]
            found = {slots: self._measure([*common, f"--parallelism.stream_blocks={slots}"]) for slots in (0, 2)}
            curves = [(row.get("losses"), row.get("grad_norms")) for row in found.values()]
            row = {
                "case": f"equality {base}, graphs {graphs}",
                "layers": layers,
                "losses": curves[0][0],
                "losses_streamed": curves[1][0],
                "ok": curves[0][0] is not None and all(curve == curves[0] for curve in curves),
            }
            errors = [row["error"] for row in found.values() if "error" in row]
            rows.append(self._row(row | ({"error": errors[0]} if errors else {})))
            write_rows(self.out, rows)

    def timed(self, size: int, steps: int, variants: Sequence[str]) -> list[dict]:
        """A recipe under its cap, and with resident weights without one."""
        memory, base, _ = SIZES[size]
        common = _settings(size, steps)
        rows = []
        for name, wanted, cap, mode in (
            ("recipe", "auto", memory, "budget"),
            ("streamed", "auto", memory, "full"),
            ("resident", "0", None, "full"),
        ):
            if name not in variants:
                continue
            settings = [*common, f"--parallelism.stream_blocks={wanted}", f"--activation_checkpoint.mode={mode}"]
            row = self._capped(settings, cap)
            rows.append(self._row({"case": f"{size} GB, {base}, {name}", "size_gb": size, **row}))
        return rows

    def validated(self, size: int) -> dict:
        """A recipe with a validation, all of it under the cap; `reserved_gib` is the largest of the whole job."""
        memory, base, _ = SIZES[size]
        settings = [*_settings(size, 3), "--parallelism.stream_blocks=auto", "--activation_checkpoint.mode=budget"]
        with _largest_reserved(self.device) as largest:
            row = self._capped(settings, memory)
        if "reserved_gib" in row:
            row["reserved_gib"] = max(row["reserved_gib"], *largest)
            row["ok"] = (row["reserved_gib"] + row["outside_gib"]) * GIB <= memory
        return self._row({"case": f"{size} GB, {base}, validation", "size_gb": size, **row})

    def _capped(self, settings: Sequence[str], cap: float | None) -> dict:
        on_gpu = self.device.type == "cuda"
        total = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else 0
        limit = cap or total
        plan = plan_job(load_job(self.job, [*settings, *self.overrides]), 1)
        work, setup = make_workload(plan), make_setup(plan.job, plan.degrees)
        setup = with_stream_blocks(work, setup, plan.job.parallelism.stream_blocks, "auto", limit)
        setup = with_levels(work, setup, "auto", limit)
        memory = estimate(work, setup, GPUS["h100"]).memory
        if on_gpu and cap is not None:
            torch.cuda.set_per_process_memory_fraction(cap / total, self.device)
        row = self._measure(settings)
        row |= {
            "cap_gib": None if cap is None else cap / GIB,
            "stream_blocks": setup.stream_blocks,
            "pinned_host_gib": pinned_bytes(work, setup) / GIB,
            "estimated_peak_gib": memory.peak / GIB,
            "estimated_needed_gib": memory.needed / GIB,
            "ok": "error" not in row,
        }
        if setup.stream_blocks:
            row["gpu_ms_to_copy_a_block"] = self._copy_ms(work.block.frozen_bytes)
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        if "reserved_gib" in row and cap is not None:
            row["ok"] = row["ok"] and (row["reserved_gib"] + row["outside_gib"]) * GIB <= cap
        return row

    def _measure(self, settings: Sequence[str]) -> dict:
        if time.monotonic() > self.until:
            return {"error": _NOT_RUN}
        try:
            row = measure(self.job, [*settings, *self.overrides], self.device)
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                # What the process takes besides the allocator: context, kernels, workspaces.
                outside = (total - free - torch.cuda.memory_reserved(self.device)) / GIB
                row["outside_gib"] = outside if self.outside is None else self.outside
                row["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        except Exception as error:  # a job that runs out of memory must not lose the other rows
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
        torch.compiler.reset()
        free_device_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return row

    def _copy_ms(self, size: int) -> float | None:
        if self.device.type != "cuda":
            return None
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        slot = torch.empty(size, dtype=torch.uint8, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        slot.copy_(host, non_blocking=True)
        start.record()
        for _ in range(4):
            slot.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 4

    def _row(self, row: dict) -> dict:
        shown = {key: row[key] for key in ("ok", "step_time_s", "peak_mem_gib", "reserved_gib", "error") if key in row}
        print(f"CASE {row['case']}: {shown}", flush=True)
        return {**environment(self.device), **row}


def _settings(size: int, steps: int) -> list[str]:
    _, base, (width, height, frames) = SIZES[size]
    clip = {"width": width, "height": height, "num_frames": frames}
    clips = [f"--data.synthetic.{key}={value}" for key, value in clip.items()]
    return [*clips, f"--lora.base_dtype={base}", f"--training.steps={steps}"]


def _validating_job(folder: Path, checkpoint: Path | None, text_encoder: Path | None) -> Path:
    job = folder / "validating.toml"
    if not job.is_file():
        if checkpoint is None:
            # Imported here: it loads diffusers and transformers.
            from ltx_titan.benchmarks.placeholder_pack import write_pack

            checkpoint, text_encoder = write_pack(folder)
        with_file = _JOB.replace('init = "random"\nshape = "ltx-2.3-22b"\n', f'checkpoint_path = "{checkpoint}"\n')
        write_text(job, with_file + _VALIDATION.format(text_encoder=text_encoder))
    return job


@contextmanager
def _largest_reserved(device: torch.device) -> Iterator[list[float]]:
    """Fills a list of one number, the GiB that the allocator reserved at most; the trainer resets its statistics."""
    largest, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            largest[0] = max(largest[0], torch.cuda.memory_reserved(device) / GIB)

    if device.type != "cuda":
        yield largest
        return
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        ended.set()
        thread.join()
