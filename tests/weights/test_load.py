import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.weights import CONNECTORS, check_fits, load_parameters, module_tensors, unused_by
from tests.checkpoint.toy import LAYOUTS, Toy, full, toy
from tests.processes import run_ranks

PREFIX = "model.diffusion_model."


def write(path, module, change=None):
    """A file as the official ones are: bf16, prefixed, with tensors of other components around the model's."""
    tensors = {PREFIX + name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    tensors[PREFIX + "video_embeddings_connector.learnable_registers"] = torch.ones(2, 3)
    tensors["vae.encoder.conv_in.conv.weight"] = torch.ones(3)
    if change is not None:
        change(tensors)
    save_file(tensors, path)
    return path


def meta_toy():
    with torch.device("meta"):
        return Toy()


def load_into_every_layout(path):
    expected = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    for layout, shard in LAYOUTS.items():
        module = shard(meta_toy())
        check_fits(module, path)
        module.to_empty(device="cpu")
        load_parameters(module, path)
        for name, tensor in module_tensors(module).items():
            assert tensor.dtype == torch.float32
            assert torch.equal(full(tensor), expected[name].float()), f"{layout}: {name}"
        # The forward pass reads FSDP's own views of the parameters. Tracing the compiled layout would take seconds.
        if layout != "wrapped":
            x = torch.ones(2, 5)
            assert torch.allclose(module(x), toy()(x), atol=1e-6), layout


@pytest.mark.distributed
def test_every_rank_gets_its_slices_under_every_layout(tmp_path):
    run_ranks(load_into_every_layout, 4, write(tmp_path / "model.safetensors", toy()))


def test_a_video_model_ignores_the_audio_weights_of_the_file(tmp_path):
    path = write(tmp_path / "av.safetensors", toy(audio=True))
    module = toy(seed=1)
    with pytest.raises(ValueError, match=r"2 in the file, but not in the model: audio_patchify_proj"):
        load_parameters(module, path)
    load_parameters(module, path, allow_unused=unused_by("video"))
    assert torch.equal(module.patchify_proj.weight, toy(audio=True).patchify_proj.weight)


def test_all_mismatches_are_reported_together_and_nothing_is_loaded(tmp_path):
    def spoil(tensors):
        del tensors[PREFIX + "patchify_proj.bias"]
        tensors[PREFIX + "patchify_proj.weight"] = torch.zeros(12, 6)
        for index in range(12):
            tensors[f"{PREFIX}extra.{index}"] = torch.zeros(1)

    path = write(tmp_path / "bad.safetensors", toy(), spoil)
    module = toy(seed=1)

    with pytest.raises(ValueError, match=r"bad\.safetensors") as failure:
        load_parameters(module, path)

    message = str(failure.value)
    assert "1 missing from the file: patchify_proj.bias" in message
    assert "12 in the file, but not in the model" in message
    assert "and 2 more" in message
    assert "patchify_proj.weight (model [12, 5], file [12, 6])" in message
    assert torch.equal(module.scale_shift_table, toy(seed=1).scale_shift_table)


def test_a_wrong_file_is_reported_on_the_meta_device(tmp_path):
    path = write(tmp_path / "bad.safetensors", toy(), lambda tensors: tensors.pop(PREFIX + "scale_shift_table"))
    with pytest.raises(ValueError, match="1 missing from the file: scale_shift_table"):
        check_fits(meta_toy(), path)


def test_rename_maps_to_official_names_and_skips_adapters(tmp_path):
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = toy(seed=1)
            self.lora_A = torch.nn.Parameter(torch.ones(2))

    module = Adapted()
    path = write(tmp_path / "model.safetensors", toy())
    load_parameters(module, path, rename=lambda name: None if "lora_" in name else name.removeprefix("base."))
    assert torch.equal(module.base.patchify_proj.weight, toy().patchify_proj.weight)
    assert torch.equal(module.lora_A, torch.ones(2))


def test_a_weight_under_two_keys_is_refused(tmp_path):
    prefix = f"{PREFIX}embeddings_connector."
    twice = {f"{prefix}learnable_registers": torch.zeros(2, 3)}
    path = write(tmp_path / "model.safetensors", toy(), lambda tensors: tensors.update(twice))
    module = torch.nn.Module()
    module.video_embeddings_connector = torch.nn.Module()
    module.video_embeddings_connector.learnable_registers = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"1 under two keys: video_embeddings_connector\.learnable_registers"):
        check_fits(module, path, component=CONNECTORS)


def test_connectors_load_from_under_the_transformer_prefix(tmp_path):
    module = torch.nn.Module()
    module.video_embeddings_connector = torch.nn.Module()
    module.video_embeddings_connector.learnable_registers = torch.nn.Parameter(torch.zeros(2, 3))
    load_parameters(module, write(tmp_path / "model.safetensors", toy()), component=CONNECTORS)
    assert torch.equal(module.video_embeddings_connector.learnable_registers, torch.ones(2, 3))
