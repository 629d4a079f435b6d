import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors, TransformerConfig
from ltx_titan.model.flops import training_flops
from ltx_titan.weights import released_config
from tests.golden_cases import load_case
from tests.model.golden_transformer import build_inputs

# Tensors and parameters of the transformer, then of both connectors, then of the text projection.
RELEASED = {
    "ltx-2-19b": ((3510, 18_876_174_592), (58, 2 * 354_470_400), 722_534_400),
    "ltx-2.3-22b": ((4186, 18_988_838_144), (258, 1_612_546_304 + 403_620_096), 770_707_456 + 385_353_728),
    "ltx-2.5-22b": ((4091, 18_987_859_200), (258, 1_612_546_304 + 403_620_096), 770_707_456 + 385_353_728),
}


def count(module):
    parameters = list(module.parameters())
    return len(parameters), sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_published_tensors(name):
    config = released_config(name)
    transformer, connectors, projection = RELEASED[name]
    with torch.device("meta"):
        assert count(LTXTransformer.from_config(config["transformer"])) == transformer
        assert count(TextConnectors.from_config(config)) == connectors
        extractor = FeatureExtractor.from_config(config, {"hidden_size": 3840, "num_hidden_layers": 48})
        assert count(extractor)[1] == projection


@pytest.mark.parametrize(("modalities", "parameters"), [("video", 13_124_316_288), ("audio", 3_286_408_320)])
def test_one_stream_of_a_released_model_has_its_published_size(modalities, parameters):
    with torch.device("meta"):
        model = LTXTransformer.from_config(released_config("ltx-2.3-22b")["transformer"], modalities)
    assert count(model)[1] == parameters


def test_names_and_shapes_of_a_released_block():
    with torch.device("meta"):
        model = LTXTransformer.from_config(released_config("ltx-2.3-22b")["transformer"])
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    block = "transformer_blocks.47."
    assert shapes[f"{block}audio_to_video_attn.to_out.0.weight"] == (4096, 2048)
    assert shapes[f"{block}video_to_audio_attn.to_gate_logits.weight"] == (32, 2048)
    assert shapes[f"{block}ff.net.0.proj.weight"] == (16384, 4096)
    assert shapes[f"{block}attn2.q_norm.weight"] == (4096,)
    assert shapes[f"{block}scale_shift_table_a2v_ca_audio"] == (5, 2048)
    assert shapes["av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight"] == (4096, 256)
    assert shapes["prompt_adaln_single.linear.weight"] == (8192, 4096)


def test_the_flop_formula_equals_a_count_of_the_blocks():
    # Blocks alone, as the formula counts nothing for AdaLN: the difference of one and two layers of the model.
    case = load_case("av_22b")
    config = case.entry["config"]["transformer"]
    video, audio, _ = build_inputs(case, "base")
    same_text = audio.context[:, :1].expand(-1, video.context.shape[1], -1)  # the formula has one text length
    audio = dataclasses.replace(audio, context=same_text, context_mask=video.context_mask)
    counted = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = LTXTransformer.from_config({**config, "num_layers": layers})
            inputs = [_to_meta(stream) for stream in (video, audio)]
        with FlopCounterMode(display=False) as counter:
            outputs = model(*inputs)
            sum(output.sum() for output in outputs).backward()
        counted.append(counter.get_total_flops())
    tokens = {
        "video_tokens": video.latent.shape[1],
        "audio_tokens": audio.latent.shape[1],
        "text_tokens": video.context.shape[1],
    }
    architecture = TransformerConfig.from_metadata(config)
    stated = [training_flops(architecture, **tokens, batch=video.latent.shape[0], num_layers=n) for n in (1, 2)]
    assert counted[1] - counted[0] == pytest.approx(stated[1] - stated[0], rel=1e-12)


def _to_meta(stream):
    values = {name: value for name, value in vars(stream).items() if not name.startswith(("timestep_", "coordinate_"))}
    moved = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    batch, tokens = moved["latent"].shape[:2]
    axes = moved["positions"].shape[1]
    # On the meta device nothing can be searched, so say which timesteps and coordinates there are.
    return type(stream)(
        **moved,
        timestep_values=torch.empty(batch, 1, device="meta"),
        timestep_index=torch.empty(batch, tokens, dtype=torch.int64, device="meta"),
        coordinate_values=tuple(torch.empty(4, device="meta") for _ in range(axes)),
        coordinate_index=torch.empty(batch, axes, tokens, dtype=torch.int64, device="meta"),
    )
