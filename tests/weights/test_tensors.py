import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ltx_titan.checkpoint import TrainingState, load_state, save_state
from ltx_titan.weights import export_safetensors, load_parameters, module_tensors, transformer_tensors
from tests.checkpoint.toy import fsdp, full, toy
from tests.processes import run_ranks


def float8_toy(seed):
    """Float8 linears whose FSDP all-gather is in float8: their weights are tensor subclasses."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
    module = toy(seed)
    convert_to_float8_training(module, config=config)
    weight = module.patchify_proj.weight
    assert type(weight.data) is not torch.Tensor, "the conversion no longer makes subclasses; this test checks nothing"
    return fsdp(module)


def export_load_and_save(folder):
    expected = toy().state_dict()
    export_safetensors(folder / "float8.safetensors", transformer_tensors(float8_toy(0), None), {})
    written = load_file(folder / "float8.safetensors")
    assert all(torch.equal(written["model.diffusion_model." + name], expected[name]) for name in expected)

    loaded = float8_toy(1)
    load_parameters(loaded, folder / "float8.safetensors")
    save_state(folder, 1, TrainingState(loaded))


def resume_alone(folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    resumed = fsdp(toy(2))
    load_state(folder / "step-1", TrainingState(resumed))
    expected = toy().state_dict()
    for name, tensor in module_tensors(resumed).items():
        assert torch.equal(full(tensor), expected[name]), name
    dist.destroy_process_group()


@pytest.mark.distributed
def test_float8_weights_are_exported_loaded_and_saved_as_plain_tensors(tmp_path):
    run_ranks(export_load_and_save, 2, tmp_path)
    # In a process that cannot import torchao.
    program = (
        "import sys; sys.modules['torchao'] = None\n"
        "from pathlib import Path; from tests.weights.test_tensors import resume_alone\n"
        f"resume_alone(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
