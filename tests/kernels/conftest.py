"""The kernels run natively on a GPU, and elsewhere under Triton's interpreter, which must be chosen before triton is
imported and must not be on where anything compiles: `test_interpreted.py` therefore runs this folder in a process of
its own, and a process that can run no kernel collects only that file and what needs no kernel.
"""

import os
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_EVERYWHERE = ["test_rms_norm_modulate.py", "test_gated_residual_norm.py", "test_qk_norm_rope.py", "test_golden.py"]
_NATIVE = ["test_long_sequences.py"]
# Tries the command out, which on a GPU would be a benchmark.
_INTERPRETED = ["test_benchmark.py"]

# Compiles for a GPU that need not be there, which the interpreter does not.
_COMPILED = ["test_compilation.py"]

if IS_INTERPRETED:
    collect_ignore = ["test_interpreted.py", *_NATIVE, *_COMPILED]
elif torch.cuda.is_available():
    collect_ignore = ["test_interpreted.py", *_INTERPRETED]
else:
    collect_ignore = [*_EVERYWHERE, *_NATIVE, *_INTERPRETED]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Natively they need the GPU, and `-m gpu` is to run them."""
    if torch.cuda.is_available() and not IS_INTERPRETED:
        for item in items:
            if Path(__file__).parent in item.path.parents and item.path.name not in ("test_import.py", *_COMPILED):
                item.add_marker(pytest.mark.gpu)
