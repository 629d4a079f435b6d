"""Jobs on official quantized files: adapters train on them, over several ranks; full fine-tuning is refused."""

import math

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_titan.config import load_job
from ltx_titan.plan import plan_job
from tests.jobs import NO_CHECKPOINTS, read_run, train_rank, write_job
from tests.processes import run_ranks
from tests.weights.quantized_file import FORMS, quantize

OWN = {"fp8": "float8", "nvfp4": "nvfp4"}


@pytest.fixture(scope="module")
def quantized(nano_path, tmp_path_factory):
    """The nano pack with all linear layers of its blocks but the first quantized, by form."""
    tensors = load_file(nano_path)
    with safe_open(nano_path, "pt") as file:
        metadata = file.metadata()

    def is_chosen(module):
        is_linear = tensors[f"{module}.weight"].ndim == 2
        return is_linear and "transformer_blocks." in module and "transformer_blocks.0." not in module

    folder = tmp_path_factory.mktemp("quantized")
    for form in FORMS:
        stored, _, header = quantize(tensors, form, is_chosen)
        save_file(stored, folder / f"{form}.safetensors", metadata | header)
    return {form: folder / f"{form}.safetensors" for form in FORMS}


def train_all(*jobs):
    for job in jobs:
        train_rank(job)


@pytest.mark.distributed
def test_adapters_train_on_it_whether_its_bits_are_kept_or_not(tmp_path, quantized, data_root):
    jobs = {}
    for form, path in quantized.items():
        for base in (OWN[form], "bfloat16"):
            settings = {"model__mode": "lora", "lora__base_dtype": base, "lora__rank": 4, "training__steps": 2}
            jobs[form, base] = write_job(tmp_path / form / base, path, data_root, **settings, **NO_CHECKPOINTS)
    run_ranks(train_all, 2, *jobs.values())
    for form in quantized:
        kept, plain = ([line["loss"] for line in read_run(jobs[form, base])] for base in (OWN[form], "bfloat16"))
        assert all(math.isfinite(loss) for loss in kept)
        # One rounds scales to bfloat16, the other the weights.
        assert kept == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_full_fine_tuning_is_refused_when_it_is_planned(tmp_path, quantized, data_root, form):
    with pytest.raises(ValueError, match=rf'mode = "full" needs unrounded weights, found \d+ {form} weights'):
        plan_job(load_job(write_job(tmp_path, quantized[form], data_root)), 1)
