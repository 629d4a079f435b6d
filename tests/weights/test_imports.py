import subprocess
import sys


def test_weights_load_neither_adapters_nor_training_state():
    program = "import sys, ltx_titan.weights; print(*(name for name in sys.modules if name.startswith('ltx_titan.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.split(".")[1] for name in done.stdout.split()}
    assert "weights" in packages
    assert not packages & {"lora", "checkpoint", "codecs", "encode", "conditioning"}
