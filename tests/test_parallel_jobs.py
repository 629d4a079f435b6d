"""Whole jobs under every parallelism: their curves are those of one rank, and a run resumes on another mesh."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import NO_CHECKPOINTS, curve, read_run, train, write_job

CP2, TP2 = {"parallelism__cp": 2}, {"parallelism__tp": 2}
# Each rank has the whole frozen base.
REPLICAS = {"parallelism__dp_replicate": 2, "training__local_batch_size": 2}
# Two steps of one forward each: gloo's collectives are what such a job waits for. Micro-batches are in test_train.py.
SHORT = {"training__steps": 2, "training__local_batch_size": 4}
LORA = {**SHORT, "model__mode": "lora", "lora__rank": 4, "lora__alpha": 4.0}


@pytest.fixture(scope="module")
def single_run(tmp_path_factory, nano_path, data_root) -> torch.Tensor:
    """Two steps on one rank."""
    return train_curve(tmp_path_factory.mktemp("single"), nano_path, data_root, **SHORT, **NO_CHECKPOINTS)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, nano_path, data_root) -> Path:
    """Two steps of LoRA on one rank, with the adapter's export."""
    job = write_job(tmp_path_factory.mktemp("lora"), nano_path, data_root, **LORA)
    train(job)
    return job


def train_curve(folder, nano_path, data_root, ranks: int = 1, **settings: object) -> torch.Tensor:
    return torch.tensor(curve(train(write_job(folder, nano_path, data_root, **settings), ranks)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {**CP2, "activation_checkpoint__mode": "selective"}),
        (4, {**TP2, **CP2, "activation_checkpoint__mode": "full", "activation_checkpoint__offload": True}),
        (1, {"parallelism__cpu_offload": True}),
    ],
    ids=["cp2-selective", "tp2-cp2-full-offload", "cpu_offload"],
)
def test_losses_and_norms_do_not_depend_on_the_mesh(tmp_path, nano_path, data_root, single_run, ranks, settings):
    actual = train_curve(tmp_path, nano_path, data_root, ranks, **SHORT, **settings, **NO_CHECKPOINTS)
    torch.testing.assert_close(actual, single_run, rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_a_job_resumes_under_other_degrees(tmp_path, nano_path, data_root, single_run):
    job = write_job(tmp_path, nano_path, data_root, **{**SHORT, "training__local_batch_size": 2})
    train(job, 2, "--parallelism.cp=2", "--training.stop_at=1")
    actual = torch.tensor(curve(train(job, 2, "--parallelism.tp=2")))
    torch.testing.assert_close(actual, single_run, rtol=1e-5, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [TP2, CP2, REPLICAS], ids=["tp2", "cp2", "replicas"])
def test_lora_does_not_depend_on_the_mesh(tmp_path, nano_path, data_root, lora_run, mesh):
    job = write_job(tmp_path, nano_path, data_root, **{**LORA, **mesh})
    assert_same_adapter(job, lora_run, train(job, 2), read_run(lora_run))


@pytest.mark.distributed
def test_lora_on_a_quantized_base_does_not_depend_on_the_mesh(tmp_path, nano_path, data_root):
    settings = {**LORA, "lora__base_dtype": "int8"}
    one = write_job(tmp_path / "one", nano_path, data_root, **settings)
    expected = train(one)
    for name, mesh in (("tp", TP2), ("replicas", REPLICAS)):
        two = write_job(tmp_path / name, nano_path, data_root, **{**settings, **mesh})
        assert_same_adapter(two, one, train(two, 2), expected)


@pytest.mark.distributed
def test_replicas_of_a_frozen_base_resume_as_shards_of_it(tmp_path, nano_path, data_root, lora_run):
    job = write_job(tmp_path, nano_path, data_root, **{**LORA, **REPLICAS})
    train(job, 2, "--training.stop_at=1")
    assert_same_adapter(job, lora_run, train(job, 2, "--parallelism.dp_replicate=1"), read_run(lora_run))


def assert_same_adapter(job: Path, expected_job: Path, lines: list[dict], expected: list[dict]) -> None:
    torch.testing.assert_close(torch.tensor(curve(lines)), torch.tensor(curve(expected)), rtol=1e-5, atol=0)
    actual, wanted = (load_file(path.parent / "run/export/lora-step-2.safetensors") for path in (job, expected_job))
    assert actual.keys() == wanted.keys()
    # AdamW divides by the gradient's size: an element whose gradient is almost 0 may go the other way.
    differences = torch.cat([(wanted[name] - actual[name]).abs().flatten() for name in wanted])
    assert (differences > 1e-5).float().mean() <= 1e-3


TENSORWISE = {"float8__recipe": "tensorwise"}
NATIVE = {"float8__recipe": "native", "training__dtype": "bfloat16"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "float8", [{**TENSORWISE, "float8__all_gather": True}, {**NATIVE, **TP2}], ids=["tensorwise", "native-tp2"]
)
def test_float8_trains_near_float32_and_exports_plain_weights(tmp_path, nano_path, data_root, single_run, float8):
    settings = {**SHORT, "training__local_batch_size": 4 if TP2.items() <= float8.items() else 2, **float8}
    job = write_job(tmp_path, nano_path, data_root, **settings)
    assert_near(torch.tensor(curve(train(job, 2))), single_run)
    exported = load_file(tmp_path / "run/export/transformer-step-2.safetensors")
    assert exported.keys() == {key for key in load_file(nano_path) if key.startswith("model.diffusion_model.")}
    # The text connectors are not trained: they are the base's, in its dtype.
    trained = [tensor for key, tensor in exported.items() if "embeddings_connector" not in key]
    assert all(tensor.dtype == torch.float32 for tensor in trained)


@pytest.mark.parametrize("mode", ["selective", "budget"])
def test_native_float8_resumes_exactly(tmp_path, nano_path, data_root, mode):
    settings = {**SHORT, **NATIVE, "float8__skip_blocks": 0, "activation_checkpoint__mode": mode}
    unbroken = write_job(tmp_path / "unbroken", nano_path, data_root, **settings, **NO_CHECKPOINTS)
    broken = write_job(tmp_path / "broken", nano_path, data_root, **settings)
    train(broken, 1, "--training.stop_at=1")
    assert curve(train(broken)) == curve(train(unbroken))


@pytest.mark.distributed
@pytest.mark.parametrize("float8", [TENSORWISE, NATIVE], ids=["tensorwise", "native"])
def test_a_float8_adapter_trains_near_float32_and_exports_plain_weights(
    tmp_path, nano_path, data_root, lora_run, float8
):
    settings = {**LORA, "training__local_batch_size": 2, **float8}
    job = write_job(tmp_path, nano_path, data_root, **settings)
    assert_near(torch.tensor(curve(train(job, 2))), torch.tensor(curve(read_run(lora_run))))
    actual, wanted = (load_file(path.parent / "run/export/lora-step-2.safetensors") for path in (job, lora_run))
    assert actual.keys() == wanted.keys()
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # float8 keeps 3 bits of mantissa: 6 % an element at worst, averaged over hundreds in every matmul.
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=2e-2, atol=0)
