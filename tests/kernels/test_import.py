import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_plain_checkout_has_the_kernels_under_their_own_name(tmp_path):
    probe = (
        "import ltx_titan\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('ltx_titan_kernels.rms_norm_modulate').origin)\n"
        "print(find_spec('kernels') is None or find_spec('kernels').origin)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    # Nothing can be imported from a folder without __init__.py, so whoever wants the public `kernels` is not misled.
    assert run.stdout.split() == [str(ROOT / "kernels" / "rms_norm_modulate.py"), "None"]
