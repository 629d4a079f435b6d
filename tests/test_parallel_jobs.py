"""Whole jobs under every parallelism: their curves are those of one rank, and a run resumes on another mesh."""

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import curve, train, write_job

CP2, TP2 = {"parallelism__cp": 2}, {"parallelism__tp": 2}
LORA = {"model__mode": "lora", "lora__rank": 4, "lora__alpha": 4.0}


@pytest.fixture(scope="module")
def single_run(tmp_path_factory, nano_path, data_root) -> torch.Tensor:
    """Three steps on one rank."""
    return train_curve(tmp_path_factory.mktemp("single"), nano_path, data_root)


def train_curve(folder, nano_path, data_root, ranks: int = 1, **settings: object) -> torch.Tensor:
    return torch.tensor(curve(train(write_job(folder, nano_path, data_root, **settings), ranks)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, TP2),
        (2, {**CP2, "activation_checkpoint__mode": "selective"}),
        (4, {**TP2, **CP2, "activation_checkpoint__mode": "full", "activation_checkpoint__offload": True}),
        (1, {"parallelism__cpu_offload": True}),
    ],
    ids=["tp2", "cp2-selective", "tp2-cp2-full-offload", "cpu_offload"],
)
def test_losses_and_norms_do_not_depend_on_the_mesh(tmp_path, nano_path, data_root, single_run, ranks, settings):
    actual = train_curve(tmp_path, nano_path, data_root, ranks, **settings)
    torch.testing.assert_close(actual, single_run, rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_a_job_goes_on_under_other_degrees(tmp_path, nano_path, data_root, single_run):
    job = write_job(tmp_path, nano_path, data_root)
    train(job, 2, "--parallelism.tp=2", "--training.stop_at=1")
    train(job, 2, "--parallelism.cp=2", "--training.stop_at=2")
    actual = torch.tensor(curve(train(job, 4, "--parallelism.tp=2")))
    torch.testing.assert_close(actual, single_run, rtol=1e-5, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize(("base", "mesh"), [("float32", TP2), ("int8", TP2), ("float32", CP2)], ids=str)
def test_lora_does_not_depend_on_the_mesh(tmp_path, nano_path, data_root, base, mesh):
    settings = {**LORA, "lora__base_dtype": base, "training__steps": 2}
    expected = train_curve(tmp_path / "one", nano_path, data_root, **settings)
    actual = train_curve(tmp_path / "two", nano_path, data_root, 2, **settings, **mesh)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    one, two = (load_file(tmp_path / run / "run/export/lora-step-2.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        # AdamW divides by the gradient's size: an element whose gradient is almost 0 may go the other way.
        assert ((one[name] - two[name]).abs() > 1e-5).float().mean() <= 1e-3, name


@pytest.mark.distributed
@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
def test_float8_trains_near_float32_and_exports_plain_weights(tmp_path, nano_path, data_root, mode):
    settings = {**mode, "float8__recipe": "tensorwise"}
    expected = train_curve(tmp_path / "one", nano_path, data_root, **mode)
    gathered = {} if mode else {"float8__all_gather": True}
    actual = train_curve(tmp_path / "two", nano_path, data_root, 2, **settings, **gathered)
    # float8 keeps 3 bits of mantissa: 6 % an element at worst, averaged over hundreds in every matmul.
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=2e-2, atol=0)
    name = "lora" if mode else "transformer"
    exports = [load_file(tmp_path / run / f"run/export/{name}-step-3.safetensors") for run in ("one", "two")]
    assert exports[0].keys() == exports[1].keys()
    # The text connectors are not trained: they are the base's, in its dtype.
    trained = [tensor for key, tensor in exports[1].items() if "embeddings_connector" not in key]
    assert all(tensor.dtype == torch.float32 for tensor in trained)
