import json
import shutil

import pytest
import torch
from transformers import Gemma3Config, Gemma3Model, SiglipVisionConfig

from ltx_titan.codecs import encode_by_layers, load_feature_extractor, load_text_encoder


@pytest.fixture(scope="module")
def encoder(nano):
    return load_text_encoder(nano.parent / "text_encoder", dtype=torch.float32)


def test_captions_are_stripped_and_begin_with_one_bos(encoder):
    bos = encoder.tokenizer.bos_token_id
    ids = encoder.tokenize("  Häschen gähnt — ☃\n")
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert encoder.tokenizer.eos_token_id not in ids
    assert encoder.tokenizer.decode(ids[1:]) == "Häschen gähnt — ☃"
    assert encoder.tokenize("") == [bos]


def test_long_captions_are_cut_at_the_end(encoder):
    ids = encoder.tokenize("a" * 5000)
    assert len(ids) == 1024
    assert ids[0] == encoder.tokenizer.bos_token_id


def test_a_tokenizer_that_states_a_smaller_limit_is_obeyed(nano, tmp_path):
    folder = shutil.copytree(nano.parent / "text_encoder", tmp_path / "text_encoder")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 256}))
    encoder = load_text_encoder(folder, dtype=torch.float32)
    states, mask = encoder.encode(["short", "a" * 5000])
    assert states.shape[1] == 256
    assert mask.sum(1).tolist() == [6, 256]


def test_states_are_left_padded_and_stacked_layer_last(encoder):
    states, mask = encoder.encode(["short", "a longer caption"])
    assert states.shape == (2, 1024, 64, 4)
    assert mask.shape == (2, 1024)
    assert mask.dtype == torch.int64
    assert mask[0].tolist() == [0] * 1018 + [1] * 6
    assert not states[0, :1018].any()


def test_states_equal_those_of_a_fully_padded_run(encoder):
    states, mask = encoder.encode(["short", "a longer caption"])
    ids = encoder.tokenize("short")
    padded = torch.tensor([[0] * (1024 - len(ids)) + ids])
    with torch.no_grad():
        output = encoder.model(input_ids=padded, attention_mask=mask[:1], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    expected = torch.stack(output.hidden_states, dim=-1)[0, -len(ids) :]
    torch.testing.assert_close(states[0, -len(ids) :], expected, atol=1e-5, rtol=1e-5)
    # First the scaled embeddings, last the output after the final norm.
    embeddings = encoder.model.embed_tokens.weight[ids] * 64**0.5
    torch.testing.assert_close(states[0, -len(ids) :, :, 0], embeddings, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[0, -len(ids) :, :, -1], output.last_hidden_state[0, -len(ids) :])


def test_one_layer_at_a_time_is_on_the_device(nano, encoder):
    by_layers = encode_by_layers(load_text_encoder(nano.parent / "text_encoder", dtype=torch.float32), "cpu")
    layers = by_layers.model.layers
    host = [layer.mlp.up_proj.weight.data_ptr() for layer in layers]
    copied = []
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: copied.append(
                [layer.mlp.up_proj.weight.data_ptr() != at for layer, at in zip(layers, host, strict=True)]
            )
        )
    states, mask = by_layers.encode(["a rabbit"])
    assert copied == [[i == j for i in range(len(layers))] for j in range(len(layers))]
    assert [layer.mlp.up_proj.weight.data_ptr() for layer in layers] == host
    expected = encoder.encode(["a rabbit"])
    assert torch.equal(states, expected[0])
    assert torch.equal(mask, expected[1])


def test_language_model_of_a_multimodal_folder(encoder, tmp_path):
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    whole = Gemma3Model(Gemma3Config(text_config=encoder.model.config, vision_config=vision, mm_tokens_per_image=4))
    whole.language_model.load_state_dict(encoder.model.state_dict())
    whole.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.encode(["rabbit"])[0], encoder.encode(["rabbit"])[0])


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        load_text_encoder(tmp_path)


def test_features_of_both_streams(nano, encoder):
    extractor = load_feature_extractor(nano, encoder, dtype=torch.float32)
    video, audio = extractor(*encoder.encode(["a rabbit", "another rabbit"]))
    assert video.shape == (2, 1024, 128)
    assert audio.shape == (2, 1024, 64)
    assert torch.isfinite(video).all()
    assert not torch.allclose(video[0, -1], video[1, -1])
