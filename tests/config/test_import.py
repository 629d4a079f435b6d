import json
import subprocess
import sys

HEAVY = ("torch", "torchao", "diffusers", "transformers", "triton", "numpy", "wandb")
OURS = ("ltx_titan", "ltx_titan.config", "ltx_titan_kernels")


def test_config_imports_neither_torch_nor_another_package_of_ours():
    code = "import json, sys, ltx_titan.config; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(found.stdout)
    assert [name for name in modules if name.split(".")[0] in HEAVY] == []
    ours = [name for name in modules if name.split(".")[0] in ("ltx_titan", "ltx_titan_kernels")]
    assert [name for name in ours if name not in OURS and not name.startswith("ltx_titan.config.")] == []
