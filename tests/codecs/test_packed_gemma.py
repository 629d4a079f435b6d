import pytest
import torch

from ltx_titan.codecs import load_feature_extractor, load_text_encoder, text_encoder_config
from tests.codecs import packed
from tests.codecs.packed import (
    GEMMA_CONFIG,
    SOURCE,
    TEXT,
    VERSION,
    packed_tensors,
    write_packed,
    write_transformer_file,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed") / "gemma4.safetensors")


@pytest.fixture(scope="module")
def encoder(file):
    return load_text_encoder(file, dtype=torch.float32)


def test_captions_begin_with_a_bos_that_the_tokenizer_does_not_add(encoder):
    assert packed.tokenizer().encode("ab").ids[0] != 2
    ids = encoder.tokenize(" Häschen gähnt\n")
    assert ids[0] == 2
    assert ids.count(2) == 1
    assert 1 not in ids
    assert len(encoder.tokenize("a" * 3000)) == 1024
    assert encoder.tokenize("") == [2]


@pytest.mark.parametrize("naming", ["model.language_model.", "model."])
def test_states_are_those_of_the_packed_model_under_either_naming(tmp_path, naming):
    encoder = load_text_encoder(
        write_packed(tmp_path / "gemma4.safetensors", packed_tensors(naming)), dtype=torch.float32
    )
    states, mask = encoder.encode(["a rabbit", "another, longer caption than the window of the sliding layers"])
    assert states.shape == (2, 1024, 32, 7)
    ids = torch.tensor([encoder.tokenize("a rabbit")])
    model = packed.language_model()
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    count = ids.shape[1]
    assert mask[0].sum() == count
    torch.testing.assert_close(states[0, -count:], torch.stack(expected.hidden_states, dim=-1)[0], atol=1e-5, rtol=1e-5)
    # First the scaled embeddings, last the output after the final norm.
    torch.testing.assert_close(states[0, -count:, :, 0], model.embed_tokens.weight[ids[0]] * 32**0.5)
    torch.testing.assert_close(states[0, -count:, :, -1], expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_the_projection_comes_from_the_packed_file(file, encoder, tmp_path):
    checkpoint = write_transformer_file(
        tmp_path / "transformer.safetensors", model_version="2.5.0", gemma_source_checkpoint=SOURCE
    )
    extractor = load_feature_extractor(checkpoint, encoder, dtype=torch.float32)
    stored = packed_tensors()
    weight = stored["text_embedding_projection.video_aggregate_embed.weight"]
    assert torch.equal(extractor.video_aggregate_embed.weight, weight)
    states, mask = encoder.encode(["a rabbit"])
    video, audio = extractor(states, mask)
    assert video.shape == (1, 1024, 128)
    assert audio.shape == (1, 1024, 64)
    # f = W . flat(x / rms(x)) * sqrt(width / hidden) + b, channel outermost.
    x = states[0, -1]
    flat = (x * (x.square().mean(0) + 1e-6).rsqrt()).flatten()
    bias = stored["text_embedding_projection.video_aggregate_embed.bias"]
    torch.testing.assert_close(video[0, -1], weight @ flat * (128 / 32) ** 0.5 + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model_version": "2.5.0", "gemma_source_checkpoint": '{"gemma_version": "gemma4-12b-ltx-v2"}'}, "ltx-v2"),
        ({"model_version": "2.5.0"}, "has no 'gemma_source_checkpoint'"),
        ({"model_version": "2.3.rc1"}, "was trained with Gemma 3"),
    ],
)
def test_a_text_encoder_of_another_release_is_refused(encoder, tmp_path, metadata, message):
    checkpoint = write_transformer_file(tmp_path / "transformer.safetensors", **metadata)
    with pytest.raises(ValueError, match=message):
        load_feature_extractor(checkpoint, encoder)


def test_a_stock_gemma_4_is_refused(tmp_path):
    stock = {key: value for key, value in GEMMA_CONFIG.items() if key != "gemma_version"}
    encoder = load_text_encoder(write_packed(tmp_path / "stock.safetensors", config=stock), dtype=torch.float32)
    checkpoint = write_transformer_file(tmp_path / "transformer.safetensors", gemma_source_checkpoint=SOURCE)
    with pytest.raises(ValueError, match=rf"'{VERSION}', found 'a gemma4_unified_text without a version'"):
        load_feature_extractor(checkpoint, encoder)


def test_gemma_3_is_refused_for_a_checkpoint_that_names_its_encoder(nano, tmp_path):
    encoder = load_text_encoder(nano.parent / "text_encoder")
    checkpoint = write_transformer_file(tmp_path / "transformer.safetensors", gemma_source_checkpoint=SOURCE)
    with pytest.raises(ValueError, match=f"'{VERSION}', found 'a gemma3_text without a version'"):
        load_feature_extractor(checkpoint, encoder)


def test_damage_is_named(tmp_path, nano):
    tensors = packed_tensors()
    tensors["model.language_model.layers.0.mlp.extra"] = tensors.pop("model.language_model.norm.weight")
    with pytest.raises(ValueError, match=r"(?s)1 missing from the file: norm.weight\n.*layers.0.mlp.extra"):
        load_text_encoder(write_packed(tmp_path / "gemma4.safetensors", tensors))
    newer = {**GEMMA_CONFIG, "text_config": TEXT | {"model_type": "gemma4_next_text"}}
    path = write_packed(tmp_path / "newer.safetensors", config=newer)
    with pytest.raises(ValueError, match=r"transformers [\d.]+ has no model of type 'gemma4_next_text'.*5\.23"):
        text_encoder_config(path)
    with pytest.raises(ValueError, match="not a packed text encoder"):
        text_encoder_config(nano)
    tensors = packed_tensors()
    del tensors["tokenizer_json"]
    with pytest.raises(ValueError, match="lacks the tensor 'tokenizer_json'"):
        load_text_encoder(write_packed(tmp_path / "gemma4.safetensors", tensors))
