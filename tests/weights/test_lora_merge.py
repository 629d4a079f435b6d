import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.lora import adapter_weights, adapters, apply_lora, init_lora_, load_base
from ltx_titan.weights import export_merged, load_parameters, read_metadata
from tests.lora.adapted import golden_inputs, settings, stir, transformer, write_checkpoint


def trained(path, **fields):
    model = transformer()
    apply_lora(model, settings(**fields))
    load_base(model, path)
    init_lora_(model, 1)
    stir(model)
    return model


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "alpha": 3}, {"dora": True}])
def test_the_merged_model_is_equivalent_to_base_and_adapter(tmp_path, fields):
    base = write_checkpoint(tmp_path / "base.safetensors", torch.float32)
    model = trained(base, **fields)
    export_merged(adapter_weights(model), base, tmp_path / "merged.safetensors")
    merged = transformer()
    load_parameters(merged, tmp_path / "merged.safetensors")
    with torch.no_grad():
        plain = transformer()
        load_parameters(plain, base)
        for one, two, without in zip(
            model(*golden_inputs()), merged(*golden_inputs()), plain(*golden_inputs()), strict=True
        ):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=2e-5)
            assert (without - one).abs().max() > 1e-2


def test_the_rest_of_the_transformer_is_copied(tmp_path):
    base = write_checkpoint(tmp_path / "base.safetensors")
    model = trained(base, targets=["video"])
    export_merged(adapter_weights(model), base, tmp_path / "merged.safetensors")
    before, after = load_file(base), load_file(tmp_path / "merged.safetensors")
    assert before.keys() - after.keys() == {"vae.decoder.conv.weight"}
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {f"model.diffusion_model.{name}.weight" for name in adapters(model)}
    assert all(before[key].dtype == after[key].dtype for key in after)
    assert read_metadata(base).raw == read_metadata(tmp_path / "merged.safetensors").raw


def test_a_quantized_base_merges_into_the_original_weights(tmp_path):
    base = write_checkpoint(tmp_path / "base.safetensors", torch.float32)
    model = trained(base, base_dtype="int4", targets=["attn1.to_q"])
    export_merged(adapter_weights(model), base, tmp_path / "merged.safetensors")
    key = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    layer = model.transformer_blocks[0].attn1.to_q
    update = load_file(tmp_path / "merged.safetensors")[key] - load_file(base)[key]
    torch.testing.assert_close(update, 2 * layer.lora_B.weight @ layer.lora_A.weight, rtol=1e-4, atol=1e-5)


def test_a_wrong_base_is_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base.safetensors")
    model = trained(base, targets=["attn1.to_q"])
    model.transformer_blocks[0].attn1.to_q.lora_A.weight.data = torch.zeros(4, 48)
    with pytest.raises(ValueError, match=r"attn1\.to_q\.weight \(model \[64, 48\], file \[64, 64\]\)"):
        export_merged(adapter_weights(model), base, tmp_path / "merged.safetensors")
