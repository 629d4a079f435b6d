"""Runs each test of this folder where it can run, and deselects it elsewhere.

The kernels run natively on a GPU, and elsewhere in Triton's interpreter. That must be chosen before triton is imported,
and nothing compiles under it, so `test_interpreted.py` runs this folder again in a process with TRITON_INTERPRET=1.
`pytest.mark.runs_on` names the modes of a module: "gpu", "interpreter" and "cpu"; without the mark it runs in all.
"""

import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    MODE = "interpreter"
elif torch.cuda.is_available():
    MODE = "gpu"
else:
    MODE = "cpu"


def pytest_configure(config):
    config.addinivalue_line("markers", "runs_on(*modes): modes in which a kernel test runs: gpu, interpreter, cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    deselected = []
    for item in items:
        mark = item.get_closest_marker("runs_on")
        if Path(__file__).parent not in item.path.parents or mark is None:
            continue
        if MODE not in mark.args:
            deselected.append(item)
        elif MODE == "gpu" and "cpu" not in mark.args:
            item.add_marker(pytest.mark.gpu)  # selected by `-m gpu`
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]
