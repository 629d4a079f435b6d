"""Contents of exports beside the trained weights, as the key lists and headers that inference tools read."""

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.weights import (
    CONNECTORS,
    TRANSFORMER,
    ExportTensor,
    complete_export,
    export_safetensors,
    read_metadata,
    read_source,
    save_safetensors,
)

PREFIX = "model.diffusion_model."
CODECS = {"vae", "audio_vae", "vocoder"}


def export(path, base, layout, connectors_path=None):
    """An export of one trained tensor, `proj_out.bias`, on the base at `base`."""
    trained = [ExportTensor(f"{PREFIX}proj_out.bias", (128,), torch.float32, torch.full((128,), 7.0))]
    source = read_source(str(base), None, None)
    export_safetensors(path, *complete_export(trained, source, connectors_path, layout))
    return load_file(path), set(read_metadata(path).config)


def test_layouts_hold_what_they_say_and_their_headers_nothing_else(nano_path, tmp_path):
    base = load_file(nano_path)
    of_transformer = {key for key in base if TRANSFORMER.module_name(key) is not None}
    of_connectors = {key for key in base if CONNECTORS.module_name(key) is not None}
    assert of_connectors
    expected = {
        "transformer": {f"{PREFIX}proj_out.bias"},
        "with_connectors": of_transformer | of_connectors,
        "complete": set(base),
    }
    for layout, keys in expected.items():
        found, sections = export(tmp_path / f"{layout}.safetensors", nano_path, layout)
        assert set(found) == keys, layout
        assert sections & CODECS == (CODECS if layout == "complete" else set()), layout
        assert "transformer" in sections
        assert torch.equal(found.pop(f"{PREFIX}proj_out.bias"), torch.full((128,), 7.0))
        assert all(torch.equal(tensor, base[key]) and tensor.dtype == base[key].dtype for key, tensor in found.items())


@pytest.mark.parametrize("layout", ["with_connectors", "complete"])
def test_the_connectors_that_the_job_trained_with_replace_the_bases(nano_path, tmp_path, layout):
    others = {
        key: tensor + 1 for key, tensor in load_file(nano_path).items() if CONNECTORS.module_name(key) is not None
    }
    save_safetensors(tmp_path / "connectors.safetensors", others, {})
    found, _ = export(tmp_path / "out.safetensors", nano_path, layout, tmp_path / "connectors.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in others.items())


def test_a_base_without_connectors_exports_without_them(nano_path, tmp_path):
    base = {key: tensor for key, tensor in load_file(nano_path).items() if TRANSFORMER.module_name(key) is not None}
    save_safetensors(tmp_path / "base.safetensors", base, read_metadata(nano_path).raw)
    found, sections = export(tmp_path / "out.safetensors", tmp_path / "base.safetensors", "complete")
    assert set(found) == set(base)
    assert not sections & CODECS
