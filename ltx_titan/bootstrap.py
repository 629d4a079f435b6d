"""Finds or makes a Python that can run ltx_titan, with nothing but the standard library; prints its path.

    python3 ltx_titan/bootstrap.py [extra ...]

The running Python is used as it is if everything that the project and the named extras need can be imported.
Otherwise a `.venv` beside the project is made and filled. Without an NVIDIA GPU the exact CPU-capable torch is
installed first, because any looser requirement fetches gigabytes of CUDA. Set LTX_TITAN_TORCH to ask for another
torch (`torch==2.11.0`). pip reads its own settings (PIP_INDEX_URL, pip.conf, ...) as ever.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH_WITHOUT_GPU = "torch==2.13.0"
TORCH_WITH_GPU = "torch>=2.11,<2.15"
OLDEST_PYTHON = (3, 11)

_MODULES = {
    "": "torch torchtitan torchao pydantic tomli_w safetensors numpy tensorboard rich yaml matplotlib",
    "preprocess": "av diffusers transformers PIL",
    "tools": "av PIL scenedetect cv2 openai",
    "test": "pytest xdist triton peft accelerate psutil wandb",
    "lint": "ruff",
}


def missing_modules(python: Path, extras: list[str]) -> list[str]:
    """Names of modules that `python` lacks, by looking for them, not by importing them; torch's version counts too."""
    wanted = [module for extra in ["", *extras] for module in _MODULES[extra].split()]
    probe = (
        "import importlib.metadata, importlib.util, sys\n"
        f"missing = [m for m in {wanted!r} if importlib.util.find_spec(m) is None]\n"
        f"if sys.version_info < {OLDEST_PYTHON!r}: missing.insert(0, 'python>=3.11')\n"
        "if 'torch' not in missing:\n"
        "    version = tuple(int(part) for part in importlib.metadata.version('torch').split('.')[:2])\n"
        "    if not (2, 11) <= version < (2, 15): missing.append('torch>=2.11,<2.15')\n"
        "print(' '.join(missing))"
    )
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else wanted


def make_venv(extras: list[str]) -> Path:
    """Makes or completes `.venv` and returns its Python."""
    python = VENV / "bin" / "python"
    _say(f"setting up {VENV} (once; this takes a few minutes)")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True, stdout=sys.stderr)
    torch = os.environ.get("LTX_TITAN_TORCH") or (TORCH_WITH_GPU if shutil.which("nvidia-smi") else TORCH_WITHOUT_GPU)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for requirement in ([torch], ["--editable", f"{ROOT}[{','.join(extras)}]"]):
        _say(f"installing {requirement[-1]}")
        subprocess.run([*pip, *requirement], check=True, stdout=sys.stderr)
    return python


def main(extras: list[str]) -> None:
    """Prints the path of a Python that has what `extras` need."""
    unknown = [extra for extra in extras if extra not in _MODULES]
    if unknown:
        sys.exit(f"bootstrap: unknown extras {unknown}; known are {sorted(set(_MODULES) - {''})}.")
    running = Path(sys.executable)
    if not missing_modules(running, extras):
        print(running)
        return
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"bootstrap: ltx_titan needs Python 3.11 or newer; {running} is {sys.version.split()[0]}.")
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs started at once on a shared disk must not both install
        python = VENV / "bin" / "python"
        if not python.exists() or missing_modules(python, extras):
            try:
                python = make_venv(extras)
            except subprocess.CalledProcessError as error:
                sys.exit(f"bootstrap: {' '.join(map(str, error.cmd))} failed (see above); nothing else was changed.")
            missing = missing_modules(python, extras)
            if missing:
                sys.exit(f"bootstrap: {python} still lacks {missing} after installation.")
    print(python)


def _say(text: str) -> None:
    print(f"[ltx_titan] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
