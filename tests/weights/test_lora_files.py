import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from safetensors.torch import load_file, save_file

from ltx_titan.lora import adapter_weights, adapters, init_lora_
from ltx_titan.weights import export_lora, load_lora, read_metadata, reference_metadata
from tests.lora.adapted import adapted, settings


def state(model):
    return {name: (layer.lora_A.weight, layer.lora_B.weight) for name, layer in adapters(model).items()}


def same(one, two):
    return all(torch.equal(a, b) for n in state(one) for a, b in zip(state(one)[n], state(two)[n], strict=True))


def exported(tmp_path, chosen=None, **options):
    model = adapted(chosen or settings())
    path = tmp_path / "adapter.safetensors"
    export_lora(adapter_weights(model), path, **({"dtype": torch.float32} | options))
    return model, path


def test_keys_shapes_and_header(tmp_path):
    model, path = exported(
        tmp_path,
        settings(targets=["attn1.to_q", "patchify_proj"]),
        metadata=reference_metadata(2, 1),
        dtype=torch.bfloat16,
    )
    tensors = load_file(path)
    layers = [f"transformer_blocks.{i}.attn1.to_q" for i in range(2)] + ["patchify_proj"]
    assert set(tensors) == {f"diffusion_model.{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    assert tensors["diffusion_model.patchify_proj.lora_A.weight"].shape == (4, 16)
    assert tensors["diffusion_model.patchify_proj.lora_B.weight"].shape == (64, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert read_metadata(path).raw == {
        "reference_downscale_factor": "2",
        "reference_spatial_scale_factor": "2",
        "reference_temporal_scale_factor": "1",
    }


@pytest.mark.parametrize(
    ("fields", "factor"), [({"alpha": 4}, 1), ({"alpha": 8}, 2), ({"alpha": 3, "rslora": True}, 1.5)]
)
def test_a_reader_without_alpha_applies_the_same_update(tmp_path, fields, factor):
    model, path = exported(tmp_path, settings(**fields))
    tensors = load_file(path)
    name = "transformer_blocks.0.attn1.to_q"
    layer = adapters(model)[name]
    read = tensors[f"diffusion_model.{name}.lora_B.weight"] @ tensors[f"diffusion_model.{name}.lora_A.weight"]
    torch.testing.assert_close(read, factor * layer.lora_B.weight @ layer.lora_A.weight)


@pytest.mark.parametrize("form", ["official", "diffusers", "bare"])
def test_round_trip(tmp_path, form):
    chosen = settings(targets=["all_attention", "patchify_proj", "adaln_single.linear"])
    model, path = exported(tmp_path, chosen)
    if form == "diffusers":
        save_file(_convert_non_diffusers_ltx2_lora_to_diffusers(load_file(path)), path)
        assert "transformer.proj_in.lora_A.weight" in load_file(path)
    if form == "bare":
        save_file({k.removeprefix("diffusion_model."): v for k, v in load_file(path).items()}, path)
    again = adapted(chosen)
    init_lora_(again, 9)
    assert not same(model, again)
    load_lora(adapter_weights(again), path)
    assert same(model, again)


def refused(path, match, **fields):
    model = adapted(settings(**fields))
    before = {name: (a.clone(), b.clone()) for name, (a, b) in state(model).items()}
    with pytest.raises(ValueError, match=match):
        load_lora(adapter_weights(model), path)
    assert all(torch.equal(a, b) for n in before for a, b in zip(before[n], state(model)[n], strict=True))


def test_differences_are_listed_and_nothing_is_loaded(tmp_path):
    _, path = exported(tmp_path, settings(targets=["video"]))
    refused(path, r"(?s)16 layers missing from the file: .*audio_attn1.*lora\.targets", targets=["video", "audio"])
    refused(path, r"(?s)8 layers that have no adapter in the model: .*attn2.*lora\.targets", targets=[
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])  # fmt: skip
    refused(path, r"The file's rank is 4, lora\.rank is 8", targets=["video"], rank=8)
    tensors = load_file(path)
    save_file(tensors | {"diffusion_model.transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(64)}, path)
    refused(path, r"1 tensors other than LoRA weights: .*to_q\.dora_scale.*This is DoRA: merge it", targets=["video"])
    del tensors["diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight"]
    save_file(tensors, path)
    refused(path, r"1 tensors without the other of A and B: .*to_q\.lora_A", targets=["video"])


def test_a_lora_of_another_model_generation_is_refused(tmp_path):
    _, path = exported(tmp_path, settings(targets=["attn1.to_q"]))
    save_file({key: torch.zeros(4, 96) if "lora_A" in key else t for key, t in load_file(path).items()}, path)
    refused(
        path,
        r"(?s)2 layers with another shape.*model \[64, 64\], file \[64, 96\].*another model generation",
        targets=["attn1.to_q"],
    )


def test_a_lora_file_cannot_store_dora(tmp_path):
    with pytest.raises(ValueError, match=r"lora\.dora = true.*export a merged checkpoint"):
        export_lora(adapter_weights(adapted(settings(dora=True, targets=["video"]))), tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())
