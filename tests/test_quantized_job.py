"""Jobs on official quantised files: adapters train on them, over several ranks; full fine-tuning does not begin."""

import math

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_titan.config import load_job
from ltx_titan.plan import plan_job
from tests.checkpoint.quantized_file import FORMS, quantize
from tests.jobs import train, write_job

OWN = {"fp8": "float8", "nvfp4": "nvfp4"}


@pytest.fixture(scope="module", params=FORMS)
def quantized(request, nano_path, tmp_path_factory):
    """The nano pack with all linear layers of its blocks but the first quantised, and the form."""
    tensors = load_file(nano_path)
    with safe_open(nano_path, "pt") as file:
        metadata = file.metadata()

    def is_chosen(module):
        is_linear = tensors[f"{module}.weight"].ndim == 2
        return is_linear and "transformer_blocks." in module and "transformer_blocks.0." not in module

    stored, _, header = quantize(tensors, request.param, is_chosen)
    path = tmp_path_factory.mktemp(request.param) / "nano-quantized.safetensors"
    save_file(stored, path, metadata | header)
    return path, request.param


@pytest.mark.distributed
def test_adapters_train_on_it_whether_its_bits_are_kept_or_not(tmp_path, quantized, data_root):
    path, form = quantized
    losses = {}
    for base in (OWN[form], "bfloat16"):
        settings = {"model__mode": "lora", "lora__base_dtype": base, "lora__rank": 4, "training__steps": 3}
        job = write_job(tmp_path / base, path, data_root, **settings, checkpoint__export=False)
        losses[base] = [line["loss"] for line in train(job, 2)]
    assert all(math.isfinite(loss) for values in losses.values() for loss in values)
    # One rounds scales to bfloat16, the other the weights.
    assert losses[OWN[form]] == pytest.approx(losses["bfloat16"], rel=1e-2)


def test_full_fine_tuning_is_refused_when_it_is_planned(tmp_path, quantized, data_root):
    path, form = quantized
    with pytest.raises(ValueError, match=rf'mode = "full" needs unrounded weights, found \d+ {form} weights'):
        plan_job(load_job(write_job(tmp_path, path, data_root)), 1)
