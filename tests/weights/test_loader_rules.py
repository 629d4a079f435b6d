"""Exports against what inference tools look up: 0 missing, 0 unexpected tensors.

ComfyUI strips `model.diffusion_model.` and builds transformer and text connectors as one model; it takes codecs and the
text projection from a file that has them. ltx-core builds every part that the header's config describes, and takes its
tensors from the same file. Both build models from the config; the names here are those of models built from it.
"""

import json

import pytest
import torch

from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
from ltx_titan.nano.pack_config import TEXT_ENCODER
from ltx_titan.weights import (
    LoRAWeights,
    complete_export,
    export_merged,
    export_safetensors,
    load_parameters,
    read_metadata,
    read_source,
    transformer_tensors,
    unused_by,
)

PREFIX = "model.diffusion_model."
CODECS = {"vae": "vae.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}
LAYER = "transformer_blocks.0.attn1.to_q"


def full(path, nano_path, layout, modalities="av"):
    """The export of a full fine-tune."""
    source = read_source(str(nano_path), None, None)
    model = LTXTransformer.from_config(source.config["transformer"], modalities)
    load_parameters(model, nano_path, allow_unused=unused_by(modalities))
    export_safetensors(path, *complete_export(transformer_tensors(model), source, None, layout))


def of_one_stream(path, nano_path, layout):
    full(path, nano_path, layout, "video")


def merged(path, nano_path, layout):
    """The export of a DoRA job, and of `ltx-titan lora merge`."""
    adapter = LoRAWeights(torch.ones(2, 128), torch.ones(128, 2), 0.1)
    export_merged({LAYER: adapter}, nano_path, path, layout=layout)


def names_of(config):
    """Names within ComfyUI's model: the transformer's and the connectors'."""
    with torch.device("meta"):
        models = (LTXTransformer.from_config(config["transformer"]), TextConnectors.from_config(config))
    return {name for model in models for name in model.state_dict()}


@pytest.mark.parametrize("layout", ["with_connectors", "complete"])
@pytest.mark.parametrize("export", [full, of_one_stream, merged])
def test_every_tensor_is_found_and_used(export, layout, nano_path, tmp_path):
    path = tmp_path / "export.safetensors"
    export(path, nano_path, layout)
    metadata, base = read_metadata(path), read_metadata(nano_path)
    config = json.loads(metadata.raw["config"])
    keys = set(metadata.tensors)

    comfyui = {key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)}
    assert comfyui - names_of(config) == set()
    assert names_of(config) - comfyui == set()

    # ltx-core: a section in the config without its tensors stays on the meta device.
    used = {key for key in keys if key.startswith(PREFIX)}
    for section, prefix in CODECS.items():
        expected = {key for key in base.tensors if key.startswith(prefix)} if section in config else set()
        assert {key for key in keys if key.startswith(prefix)} == expected, section
        used |= expected
    with torch.device("meta"):
        projection = FeatureExtractor.from_config(config, TEXT_ENCODER).state_dict()
    expected = {f"text_embedding_projection.{name}" for name in projection} if layout == "complete" else set()
    assert keys - used == expected
    assert {section for section in CODECS if section in config} == (set(CODECS) if layout == "complete" else set())
    # Both read the version from the header to choose their text encoder.
    assert metadata.model_version == base.model_version


@pytest.mark.parametrize("export", [full, of_one_stream, merged])
def test_shapes_and_dtypes_are_those_of_the_base(export, nano_path, tmp_path):
    export(tmp_path / "export.safetensors", nano_path, "complete")
    found, base = read_metadata(tmp_path / "export.safetensors").tensors, read_metadata(nano_path).tensors
    assert {key: (info.shape, info.dtype) for key, info in found.items()} == {
        key: (info.shape, info.dtype) for key, info in base.items()
    }


def test_a_transformer_alone_promises_nothing_else(nano_path, tmp_path):
    full(tmp_path / "export.safetensors", nano_path, "transformer")
    metadata = read_metadata(tmp_path / "export.safetensors")
    assert {key.removeprefix(PREFIX) for key in metadata.tensors} == set(
        LTXTransformer.from_config(metadata.transformer_config()).state_dict()
    )
    assert not set(CODECS) & set(metadata.config)
