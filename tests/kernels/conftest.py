"""The kernels run natively on a GPU, and elsewhere under Triton's interpreter, which must be chosen before triton is
imported and must not be on where anything compiles: `test_interpreted.py` therefore runs this folder in a process of
its own, and a process that can run no kernel collects only that file and what needs no kernel.
"""

import os

import torch

CAN_RUN_KERNELS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = (
    ["test_interpreted.py"]
    if CAN_RUN_KERNELS
    else [
        "test_rms_norm_modulate.py",
        "test_gated_residual_norm.py",
        "test_qk_norm_rope.py",
        "test_golden.py",
        "test_benchmark.py",
    ]
)
if not torch.cuda.is_available():
    collect_ignore.append("test_long_sequences.py")
