"""Finds or makes a Python that can run ltx_titan, with nothing but the standard library; prints its path.

    python3 ltx_titan/bootstrap.py [extra ...]

The running Python is used if it has everything that pyproject.toml and the named extras require. Otherwise `.venv` is
created in the project folder and filled. Without an NVIDIA GPU a fixed torch version is installed first, because any
looser requirement downloads gigabytes of CUDA libraries. Set LTX_TITAN_TORCH for another version (`torch==2.11.0`).
pip reads its own settings (PIP_INDEX_URL, pip.conf, ...) as always.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH_WITHOUT_GPU = "torch==2.13.0"
OLDEST_PYTHON = (3, 11)

# CUDA builds of torch require their own Triton. CPU builds require none, and pip would pick one that is too new.
_TRITON_OF_TORCH = {"2.11": "triton==3.6.*", "2.13": "triton==3.7.*", "2.14": "triton==3.8.*"}

# Runs in the Python that is examined. pip ships `packaging`, so version ranges can be checked in an empty environment.
_PROBE = """
import importlib.metadata, json, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
unmet = []
for text in json.loads(sys.argv[1]):
    requirement = Requirement(text)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        unmet.append(text)
print(json.dumps(unmet))
"""


def read_requirements(extras: list[str]) -> list[str]:
    """Requirements of the project and of the named extras, as pyproject.toml states them."""
    import tomllib  # not at the top: an older Python must get as far as the message that names its version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        sys.exit(f"bootstrap: unknown extras {unknown}; expected some of {sorted(optional)}.")
    return [*project["dependencies"], *(requirement for extra in extras for requirement in optional[extra])]


def unmet_requirements(python: Path, requirements: list[str]) -> list[str]:
    """The requirements that packages installed for `python` do not meet; all of them if it cannot be examined."""
    command = [str(python), "-c", _PROBE, json.dumps(requirements)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(found.stdout) if found.returncode == 0 else requirements


def make_venv(extras: list[str], requirements: list[str]) -> Path:
    """Creates or completes `.venv` and returns its Python."""
    python = VENV / "bin" / "python"
    _say(f"setting up {VENV} (once; this takes a few minutes)")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True, stdout=sys.stderr)
    # pip would compile every file of every package for minutes; `_compile` does those that a rank imports.
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile"]
    # The pip of Python 3.11 takes a minute longer to resolve the same packages. Where none is to be had, it will do.
    subprocess.run([*pip, "--upgrade", "pip"], check=False, stdout=sys.stderr)
    torch = os.environ.get("LTX_TITAN_TORCH")
    if torch is None:
        newest = next(requirement for requirement in requirements if requirement.startswith("torch>"))
        torch = newest if shutil.which("nvidia-smi") else TORCH_WITHOUT_GPU
    _say(f"installing {torch}")
    subprocess.run([*pip, torch], check=True, stdout=sys.stderr)
    project = f"{ROOT}[{','.join(extras)}]"
    _say(f"installing {project}")
    subprocess.run([*pip, *_matching_triton(python), "--editable", project], check=True, stdout=sys.stderr)
    _say("compiling the modules that a job imports")
    _compile(python)
    return python


def _compile(python: Path) -> None:
    """Compiles to bytecode all modules that a rank imports: where PYTHONDONTWRITEBYTECODE is set, no job would."""
    command = [str(python), "-c", "import ltx_titan.cli, ltx_titan.train"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": str(ROOT)}
    # Whatever is wrong here, the command that follows says it better.
    subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _matching_triton(python: Path) -> list[str]:
    """The Triton that belongs to an installed CPU build of torch; empty for a build that requires its own."""
    probe = (
        "import importlib.metadata as m\n"
        "own = any(r.startswith('triton') for r in m.requires('torch') or ())\n"
        "print('' if own else '.'.join(m.version('torch').split('.')[:2]))"
    )
    version = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    return [_TRITON_OF_TORCH[version]] if version in _TRITON_OF_TORCH else []


def main(extras: list[str]) -> None:
    """Prints the path of a Python that meets the requirements of `extras`."""
    running = Path(sys.executable)
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(f"bootstrap: ltx_titan needs Python {oldest} or newer; {running} is {sys.version.split()[0]}.")
    requirements = read_requirements(extras)
    if not unmet_requirements(running, requirements):
        print(running)
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs started at once on a shared disk must not both install
        python = VENV / "bin" / "python"
        if not python.exists() or unmet_requirements(python, requirements):
            try:
                python = make_venv(extras, requirements)
            except subprocess.CalledProcessError as error:
                sys.exit(f"bootstrap: {' '.join(map(str, error.cmd))} failed (see above); nothing else was changed.")
            unmet = unmet_requirements(python, requirements)
            if unmet:
                sys.exit(f"bootstrap: {python} still lacks {unmet} after installation.")
    print(python)


def _say(text: str) -> None:
    print(f"[ltx_titan] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
