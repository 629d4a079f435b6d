"""`ltx-titan doctor`: checks the machine and the files of a job, and says what to do about what is wrong.

Everything runs without a GPU. A finding is `ok`, a `warning` (slow, or not usable for some jobs) or `broken`, which
stops training; the exit status is 1 if anything is broken.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from ltx_titan.bootstrap import OLDEST_PYTHON, ROOT, read_requirements
from ltx_titan.common.options import Flag, Maybe, Overrides, Positional, placeholder
from ltx_titan.common.secrets import redacted
from ltx_titan.config import JobConfig, load_job

if TYPE_CHECKING:
    from ltx_titan.plan import Plan

DESCRIPTION = """\
Check this machine, and the files of a job if one is named: driver, versions, GPUs, NCCL, memory, disk speed, and
whether checkpoint and data can be read. Every problem comes with its remedy. Works without a GPU. The exit status is 1
if something is broken.

examples:
  ltx-titan doctor
  ltx-titan doctor job.toml
  ltx-titan doctor job.toml --disk /scratch
"""

Level = Literal["ok", "warning", "broken"]

_PROBE_BYTES = 64 * 2**20
_SLOW_BYTES_PER_S = 100e6
_MIN_SHM_BYTES = 2**30
# Samples whose tensors are read.
_SAMPLES = 3


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        level: how bad it is.
        subject: what was checked.
        text: what was found.
        remedy: what to do; empty if it is ok.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `ltx-titan doctor`."""

    job: Annotated[Positional[Maybe[Path]], placeholder("[JOB.toml]")] = None
    """Job file whose checkpoint, data and settings are checked, too."""

    disk: Maybe[Path] = None
    """Folder whose disk is timed. Default: job.dump_folder of the job, or the current folder."""

    quiet: Flag = False
    """Print what is not ok only."""

    overrides: Overrides = ()


def run(options: DoctorOptions) -> int:
    """Prints all findings; returns 1 if one of them is broken."""
    levels = []
    for finding in findings(options):
        levels.append(finding.level)
        if options.quiet and finding.level == "ok":
            continue
        print(f"{finding.level:<8} {finding.subject:<11} {redacted(finding.text)}", flush=True)
        if finding.remedy:
            print(f"{'':<20} -> {redacted(finding.remedy)}", flush=True)
    broken, warnings = levels.count("broken"), levels.count("warning")
    print(f"\n{broken} broken, {warnings} {'warning' if warnings == 1 else 'warnings'}, {levels.count('ok')} ok")
    return 1 if broken else 0


def findings(options: DoctorOptions) -> Iterator[Finding]:
    """Runs all checks, the fast ones first."""
    yield from _versions()
    yield from _gpus()
    yield from _memory()
    job = None
    if options.job is not None:
        try:
            job = load_job(options.job, options.overrides)
        except ValueError as error:
            yield Finding("broken", "job", str(error), "correct the job file; see docs/configuration.md")
    yield from _disk(options.disk or Path(job.job.dump_folder if job is not None else "."))
    if job is not None:
        yield from _job(job)


def _versions() -> Iterator[Finding]:
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("broken", "python", sys.version.split()[0], f"install Python {oldest} or newer")
    else:
        yield Finding("ok", "python", f"{sys.version.split()[0]}, {sys.executable}")
    for text, extra in _requirements():
        from packaging.requirements import Requirement

        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield Finding(
                "broken" if not extra else "warning",
                "package",
                f"{requirement.name} is not installed" + (f", which '{extra}' needs" if extra else ""),
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                "broken",
                "package",
                f"{requirement.name} {version}: expected {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        elif requirement.name in ("torch", "torchao", "diffusers", "transformers"):
            yield Finding("ok", "package", f"{requirement.name} {version}")


def _requirements() -> list[tuple[str, str]]:
    """Requirements of the installed project, or of a checkout, with the extra that each belongs to."""
    if (ROOT / "pyproject.toml").is_file():
        needed = read_requirements([])
        return [(text, "") for text in needed] + [(text, "preprocess") for text in read_requirements(["preprocess"])
                                                  if text not in needed]  # fmt: skip
    return [(text, "preprocess" if "extra" in text else "") for text in importlib.metadata.requires("ltx-titan") or ()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    # Here, because `--help` does not need it.
    import torch

    driver = _nvidia_smi("name,driver_version,memory.total,memory.used")
    if not torch.cuda.is_available():
        if not driver:
            yield Finding("warning", "gpu", "none found", "training works on a CPU, for models as small as the demo's")
        elif torch.version.cuda is None and torch.version.hip is None:
            # Forced: the build without CUDA meets the same requirement.
            release = torch.__version__.split("+")[0]
            remedy = f"install a CUDA build: {sys.executable} -m pip install --force-reinstall torch=={release}"
            yield Finding(
                "broken", "gpu", f"torch {torch.__version__} is a build without CUDA, and there are GPUs", remedy
            )
        else:
            yield Finding(
                "broken",
                "gpu",
                f"torch {torch.__version__} cannot use the GPUs (driver {driver[0][1]}, CUDA {torch.version.cuda})",
                "install a driver for that CUDA version or newer, and check CUDA_VISIBLE_DEVICES",
            )
        return
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_properties(index).name for index in range(count)}
    version = f"driver {driver[0][1]}" if driver else "driver unknown"
    yield Finding("ok", "gpu", f"{count} x {', '.join(sorted(names))}, {version}, CUDA {torch.version.cuda}")
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < 0.9 * total:
            yield Finding(
                "warning",
                "gpu",
                f"GPU {index}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "another process uses it: see nvidia-smi, or choose others with CUDA_VISIBLE_DEVICES",
            )
    if torch.cuda.get_device_capability(0) < (8, 0):
        yield Finding("broken", "gpu", "no bfloat16 units (compute capability below 8.0)", "use an Ampere GPU or newer")
    if count > 1:
        yield from _nccl(count)


def _nccl(count: int) -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        yield Finding(
            "broken", "nccl", "torch is built without NCCL", "install the torch build of pytorch.org for CUDA"
        )
        return
    settings = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_"))
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("ok", "nccl", f"{version}{f', with {settings}' if settings else ''}")
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        yield Finding(
            "warning",
            "nccl",
            f"{len(apart)} of {len(pairs)} pairs of GPUs have no direct access to each other",
            "collectives pass through host memory: prefer dp_replicate, and see nvidia-smi topo -m",
        )


def _nvidia_smi(query: str) -> list[list[str]]:
    """Values of a query for each GPU; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _memory() -> Iterator[Finding]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    yield Finding(
        "ok",
        "memory",
        f"{sizes['MemAvailable'] / 2**30:.0f} of {sizes['MemTotal'] / 2**30:.0f} GiB of the host available",
    )
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).total < _MIN_SHM_BYTES:
        found = (
            f"/dev/shm has {shutil.disk_usage(shm).total / 2**20:.0f} MiB, through which NCCL exchanges data of a node"
        )
        yield Finding("warning", "memory", found, "start the container with --shm-size=8g or --ipc=host")


def _disk(folder: Path) -> Iterator[Finding]:
    # The folder may not exist yet; its disk is that of the nearest one that does.
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    folder = folder.resolve()
    free = shutil.disk_usage(folder).free
    path = folder / f".ltx-titan-doctor-{os.getpid()}"
    if free < 4 * _PROBE_BYTES:
        yield Finding("broken", "disk", f"{folder}: {free / 2**20:,.0f} MiB free", "free some space")
        return
    try:
        write, read = _speeds(path)
    except OSError as error:
        remedy = "choose another folder (job.dump_folder), or make it writable"
        yield Finding("broken", "disk", f"{folder}: cannot be written to ({error.strerror})", remedy)
        return
    finally:
        path.unlink(missing_ok=True)
    text = f"{folder}: {free / 2**30:,.0f} GiB free, writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if min(write, read) < _SLOW_BYTES_PER_S:
        yield Finding("warning", "disk", text, "saves and loads of a 46 GB model take minutes there; use a faster disk")
    else:
        yield Finding("ok", "disk", text)


def _speeds(path: Path) -> tuple[float, float]:
    """Bytes per second of writing a file to the disk, and of reading it back."""
    block = os.urandom(2**20)  # not zeros, which some file systems do not store
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        # Else the read would come from memory; some file systems ignore it.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened = time.perf_counter()
    with path.open("rb") as file:
        while file.read(2**20):
            pass
    return _PROBE_BYTES / (written - started), _PROBE_BYTES / (time.perf_counter() - opened)


def _job(job: JobConfig) -> Iterator[Finding]:
    """Checks the files that a job reads, as training does before it starts."""
    import torch

    from ltx_titan.plan import plan_job

    degrees = job.parallelism
    fixed = degrees.dp_replicate * max(degrees.dp_shard, 1) * degrees.cp * degrees.tp
    # The mesh of the job if it has a fixed size: this machine may be a login node without GPUs.
    ranks = fixed if degrees.dp_shard > 0 else max(torch.cuda.device_count(), fixed)
    try:
        plan = plan_job(job, ranks)
    except ValueError as error:
        yield Finding("broken", "job", str(error), "correct the key that is named")
        return
    yield Finding("ok", "job", f"fits {ranks} rank{'s' if ranks > 1 else ''}, checkpoint and data")
    for subject, check in (("checkpoint", _read_checkpoint), ("data", _read_samples)):
        try:
            yield Finding("ok", subject, check(plan))
        except (ValueError, OSError) as error:
            yield Finding("broken", subject, str(error), "copy or download it again, or prepare the sample again")
    yield from _validation(plan)


def _read_checkpoint(plan: "Plan") -> str:
    """Reads the first and the last tensor of the base's file: a file system may fail although the header is fine.

    An export of ours is read as a whole, to compare it with its digest.
    """
    import torch
    from safetensors import safe_open

    from ltx_titan.weights import check_contents

    path = plan.source.path
    if path is None:
        return "random weights"
    check_contents(path)
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        for key in (keys[0], keys[-1]):
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: {key} has NaN or infinity")
    return f"{path}, {path.stat().st_size / 1e9:.1f} GB, {len(keys)} tensors"


def _read_samples(plan: "Plan") -> str:
    """Reads a few samples with all their tensors."""
    from ltx_titan.common.tensors import evenly_spaced

    count = len(plan.dataset)
    # Clips that are encoded during training would need the encoders.
    for index in evenly_spaced(count, _SAMPLES) if plan.job.data.source == "precomputed" else ():
        plan.dataset.load(index)
    return f"{count} samples, such as {plan.dataset.name(0)}"


def _validation(plan: "Plan") -> Iterator[Finding]:
    from ltx_titan.validation.training import check_validation_files

    interval = plan.job.validation.interval
    if interval is None:
        remedy = "add [validation] with an interval and samples; see docs/validation.md"
        yield Finding("warning", "validation", "the job samples no clips: there will be nothing to look at", remedy)
        return
    try:
        check_validation_files(plan)
    except ValueError as error:
        yield Finding("broken", "validation", str(error), "correct the key that is named")
        return
    yield Finding("ok", "validation", f"every {interval} steps")
