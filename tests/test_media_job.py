"""A job that encodes its clips itself trains as one on prepared data, to the last digit."""

import json
from fractions import Fraction

import pytest
import torch

from tests.commands.process.helpers import run as prepare
from tests.jobs import read_run, write_job
from tests.media.clips import write_clip
from tests.processes import run_ranks


def train_in_given_order(*jobs):
    """Trains on one rank; both datasets get one fingerprint, which decides the order of samples."""
    from ltx_titan.config import load_job
    from ltx_titan.plan import plan_job
    from ltx_titan.train import Trainer

    for job in jobs:
        plan = plan_job(load_job(job), 1)
        plan.batches.fingerprint = "same"
        Trainer(plan).train()


@pytest.mark.distributed
def test_losses_equal_those_of_prepared_data(tmp_path, nano_path):
    for index, channels in enumerate((2, 0, 1)):
        write_clip(tmp_path / f"{index}.mp4", frames=17, fps=Fraction(24), channels=channels)
    table = tmp_path / "dataset.jsonl"
    table.write_text("".join(json.dumps({"video": f"{i}.mp4", "caption": f"clip {i}"}) + "\n" for i in range(3)))
    encoder, buckets = nano_path.parent / "text_encoder", "64x32x17"
    prepare(nano_path, table, buckets)
    settings = {"training__steps": 3, "training__global_batch_size": 2, "checkpoint__export": False}
    prepared = write_job(tmp_path / "prepared", nano_path, tmp_path, **settings)
    media = {
        "dataset_path": str(table),
        "text_encoder_path": str(encoder),
        "resolution_buckets": buckets,
        "cache_dir": str(tmp_path / "cache"),
    }
    on_the_fly = write_job(tmp_path / "media", nano_path, tmp_path, data__source="media", data__media=media, **settings)
    run_ranks(train_in_given_order, 1, prepared, on_the_fly)
    losses = [[(line["loss"], line["grad_norm"]) for line in read_run(job)] for job in (prepared, on_the_fly)]
    assert len(losses[0]) == 3
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0, atol=0)
