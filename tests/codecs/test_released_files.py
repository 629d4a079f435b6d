"""Every loader against the whole key set of the released files, on the meta device."""

from math import prod

import pytest
import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

from ltx_titan.codecs import TextEncoder, load_audio_codec, load_feature_extractor, load_video_codec, load_vocoder
from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.weights import CONNECTORS, check_fits, quantized_forms, read_metadata, refuse_quantized, released_config
from tests.codecs import released_files as files
from tests.codecs.full_size import AUDIO_VAE, VIDEO_VAE_19B, VIDEO_VAE_23, VOCODER_19B, VOCODER_23

NAMES = {"19B": "ltx-2-19b", "2.3": "ltx-2.3-22b", "2.5": "ltx-2.5-22b"}
PUBLISHED = {
    # Tensors and parameters: transformer; connectors; projection; video VAE; audio VAE; vocoder (its buffers counted).
    "19B": ((3510, 18_876_174_592), (58, 708_940_800), (1, 722_534_400), 184, 102, 194),
    "2.3": ((4186, 18_988_838_144), (258, 2_016_166_400), (4, 770_707_456 + 385_353_728), 170, 102, 1227),
    "2.5": ((4091, 18_987_859_200), (258, 2_016_166_400), (4, 770_707_456 + 385_353_728), 170, 102, 1227),
}


def config_of(release):
    is_old = release == "19B"
    sections = {"vae": VIDEO_VAE_19B if is_old else VIDEO_VAE_23, "audio_vae": AUDIO_VAE}
    return released_config(NAMES[release]) | sections | {"vocoder": VOCODER_19B if is_old else VOCODER_23}


def count(shapes):
    return len(shapes), sum(prod(shape) for shape in shapes.values())


@pytest.fixture(scope="module")
def gemma():
    """A language model of the published size, without values."""
    with torch.device("meta"):
        return Gemma3TextModel(Gemma3TextConfig(hidden_size=3840, num_hidden_layers=48))


@pytest.fixture(scope="module")
def modules():
    """Our transformer and connectors of each release, without values."""
    with torch.device("meta"):
        return {
            release: (LTXTransformer.from_config(config["transformer"]), TextConnectors.from_config(config))
            for release in NAMES
            for config in [config_of(release)]
        }


def check_ours(modules, path):
    transformer, connectors = modules
    check_fits(transformer, path)
    check_fits(connectors, path, component=CONNECTORS)


@pytest.mark.parametrize("release", PUBLISHED)
def test_the_tables_here_have_the_published_sizes(release):
    transformer, connectors, projection, video, audio, vocoder = PUBLISHED[release]
    assert count(files.transformer(release)) == transformer
    assert count(files.connectors(release)) == connectors
    assert count(files.projection(release)) == projection
    assert [len(part) for part in (files.video_vae(release), files.audio_vae(), files.vocoder(release))] == [
        video,
        audio,
        vocoder,
    ]


@pytest.mark.parametrize("release", ["19B", "2.3"])
def test_every_part_of_a_one_file_checkpoint_fits(tmp_path, release, modules, gemma):
    path = files.write_hole(tmp_path / "ltx.safetensors", files.one_file(release), config_of(release))
    assert path.stat().st_size > 40e9
    check_ours(modules[release], path)
    load_feature_extractor(path, TextEncoder(gemma, tokenizer=None), "meta")
    load_video_codec(path, "meta")
    load_audio_codec(path, "meta")
    load_vocoder(path, "meta")


def test_every_part_of_the_split_pack_fits(tmp_path, modules, gemma):
    config = config_of("2.5")

    def write(name, shapes, *sections, **metadata):
        own = {key: value if key in sections else None for key, value in config.items()}
        return files.write_hole(tmp_path / name, shapes, own, **metadata)

    shapes = files.transformer("2.5") | files.connectors("2.5")
    source = '{"ltx_version":"2.5.0","gemma_version":"gemma4-12b-ltx-v1"}'
    path = write(
        "transformer.safetensors",
        files.prefixed("model.diffusion_model.", shapes),
        "transformer",
        model_version="2.5.0",
        gemma_source_checkpoint=source,
    )
    check_ours(modules["2.5"], path)
    packed = write("gemma.safetensors", files.projection("2.5"))
    encoder = TextEncoder(gemma, tokenizer=None, version="gemma4-12b-ltx-v1", projection_path=packed)
    load_feature_extractor(path, encoder, "meta")
    load_video_codec(write("vae-conv.safetensors", files.video_vae("2.5"), "vae"), "meta")
    # The published tables do not specify the prefix of the audio file's names.
    with_prefix = files.prefixed("audio_vae.", files.audio_vae()) | files.prefixed("vocoder.", files.vocoder("2.5"))
    for name, shapes in (("one", with_prefix), ("bare", files.audio_vae() | files.vocoder("2.5"))):
        audio = write(f"audio-{name}.safetensors", shapes, "audio_vae", "vocoder")
        load_audio_codec(audio, "meta")
        load_vocoder(audio, "meta")


def quantized_file(path, form, blocks):
    """A 2.3 file in which every linear layer of some blocks is quantized: 34 per block give the published counts."""
    shapes, dtypes = {}, {}
    for name, shape in files.prefixed("model.diffusion_model.", files.transformer("2.3")).items():
        parts = name.split(".")
        module = name.removesuffix(".weight")
        is_linear = len(shape) == 2 and name.endswith(".weight") and "norm" not in parts[-2]
        if not (is_linear and "transformer_blocks" in parts and int(parts[3]) in blocks):
            shapes[name] = shape
            continue
        scalars = [f"{module}.input_scale", f"{module}.{'weight_scale' if form == 'fp8' else 'weight_scale_2'}"]
        shapes |= dict.fromkeys(scalars, ())
        dtypes |= dict.fromkeys(scalars, "F32")
        shapes[name], dtypes[name] = (shape, "F8_E4M3") if form == "fp8" else ((shape[0], shape[1] // 2), "U8")
        if form == "nvfp4":
            scale = f"{module}.weight_scale"
            shapes[scale], dtypes[scale] = (-(-shape[0] // 128) * 128, shape[1] // 16), "F8_E4M3"
    layers = {name.removesuffix(".weight"): {"format": "nvfp4"} for name, dtype in dtypes.items() if dtype == "U8"}
    quantization = {"_quantization_metadata": files.json.dumps({"layers": layers})} if layers else {}
    return files.write_hole(path, shapes, config_of("2.3"), dtypes, **quantization)


@pytest.mark.parametrize(("form", "blocks"), [("fp8", range(2, 46)), ("fp8", range(3, 46)), ("nvfp4", range(2, 46))])
def test_a_quantized_release_is_accepted_as_a_frozen_base_and_refused_for_full_training(
    tmp_path, form, blocks, modules
):
    metadata = read_metadata(quantized_file(tmp_path / "quantized.safetensors", form, blocks))
    scales = sum(name.endswith(("weight_scale", "input_scale")) for name in metadata.tensors)
    assert scales == {44: 2992, 43: 2924}[len(blocks)]  # of the distilled and of the dev fp8 file
    assert quantized_forms(metadata) == {form: 34 * len(blocks)}
    check_fits(modules["2.3"][0], metadata.path)
    with pytest.raises(ValueError, match=f"{34 * len(blocks)} {form} weights"):
        refuse_quantized(metadata)
