import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ltx_titan.benchmarks.block_models import AUDIO_TOKENS, TEXT_TOKENS, our_model
from ltx_titan.common.titan import peak_flops
from ltx_titan.model import TransformerConfig
from ltx_titan.model.flops import layer_flops, outside_flops, training_flops
from ltx_titan.weights import released_config
from tests.golden_cases import load_case
from tests.shapes import TINY_23

LTX23 = TransformerConfig.from_metadata(released_config("ltx-2.3-22b")["transformer"])
TOKENS = {"video_tokens": 4032, "audio_tokens": 126, "text_tokens": 1024}


@pytest.mark.parametrize(
    ("video_tokens", "linear", "attention", "layer", "model"),
    [
        # TFLOP of the measured peers' layers, counted by FlopCounterMode there.
        (1536, 2.79, 0.21, 3.00, 144),
        (4032, 6.82, 1.03, 7.85, 377),
        (8064, 13.32, 3.66, 16.98, 815),
        (16128, 26.33, 13.70, 40.03, 1921),
    ],
)
def test_layer_of_ltx23_equals_the_published_table(video_tokens, linear, attention, layer, model):
    tokens = TOKENS | {"video_tokens": video_tokens}
    flops = layer_flops(LTX23, **tokens)
    assert round(flops.linear / 1e12, 2) == linear
    assert round(flops.attention / 1e12, 2) == attention
    assert round(flops.total / 1e12, 2) == layer
    assert round(48 * flops.total / 1e12) == model


@pytest.mark.parametrize("case", ["av_22b", "av_19b"])
def test_linear_terms_equal_a_count_over_the_model_s_weights(case):
    golden = load_case(case)
    weights = golden.under("weight.transformer_blocks.0.")
    video, audio, text = 7, 5, 3
    on_video = ("attn1", "attn2.to_q", "attn2.to_out", "attn2.to_gate", "ff.")
    on_video += ("audio_to_video_attn.to_q", "audio_to_video_attn.to_out", "audio_to_video_attn.to_gate")
    on_video += ("video_to_audio_attn.to_k", "video_to_audio_attn.to_v")
    on_audio = ("audio_attn1", "audio_attn2.to_q", "audio_attn2.to_out", "audio_attn2.to_gate", "audio_ff.")
    on_audio += ("video_to_audio_attn.to_q", "video_to_audio_attn.to_out", "video_to_audio_attn.to_gate")
    on_audio += ("audio_to_video_attn.to_k", "audio_to_video_attn.to_v")
    on_text = ("attn2.to_k", "attn2.to_v", "audio_attn2.to_k", "audio_attn2.to_v")

    acts_on = ((on_video, video), (on_audio, audio), (on_text, text))
    counted = 0
    for name, weight in weights.items():
        if not name.endswith(".weight") or weight.dim() != 2:
            continue
        tokens = [number for prefixes, number in acts_on if name.startswith(prefixes)]
        assert len(tokens) == 1, name
        counted += 6 * weight.numel() * tokens[0]

    config = TransformerConfig.from_metadata(golden.entry["config"]["transformer"])
    flops = layer_flops(config, video_tokens=video, audio_tokens=audio, text_tokens=text)
    assert flops.linear == counted


def test_attention_term_equals_a_flop_counter():
    """Unequal query and key lengths, forward and backward, in the plain formula for two matrix products."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (6, 10, 10))
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(-1, -2)).softmax(-1) @ v).sum().backward()
    assert counter.get_total_flops() == 12 * 6 * 10 * 16


@pytest.mark.parametrize("trains", [True, False])
def test_outside_terms_equal_a_flop_counter(trains):
    config = {
        "num_attention_heads": 1,
        "audio_num_attention_heads": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 8,
        "in_channels": 3,
        "out_channels": 5,
        "caption_channels": 6,
    }
    patchify, out, caption_1, caption_2 = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(6, 8), nn.Linear(8, 8)
    adapter = nn.Parameter(torch.ones(8))
    for module in (patchify, out, caption_1, caption_2):
        module.requires_grad_(trains)
    with FlopCounterMode(display=False) as counter:
        context = caption_2(torch.nn.functional.gelu(caption_1(torch.randn(1, 4, 6)))).sum()
        (out(patchify(torch.randn(1, 7, 3)) * adapter) + context).sum().backward()
    trained = "full" if trains else "lora"
    architecture = TransformerConfig.from_metadata(config)
    flops = outside_flops(architecture, video_tokens=7, audio_tokens=0, text_tokens=4, trained=trained)
    assert counter.get_total_flops() == flops.total


def test_absent_stream_takes_its_terms_and_the_cross_modal_ones_away():
    v, heads = 4096, 32
    flops = layer_flops(LTX23, video_tokens=100, audio_tokens=0, text_tokens=10)
    assert flops.linear == 6 * (100 * (14 * v**2 + 2 * heads * v) + 10 * 2 * v**2)
    assert flops.attention == 12 * (100**2 + 100 * 10) * v
    both = layer_flops(LTX23, video_tokens=100, audio_tokens=20, text_tokens=10)
    audio = layer_flops(LTX23, video_tokens=0, audio_tokens=20, text_tokens=10)
    assert both.total > flops.total + audio.total


def test_step_is_layers_and_the_rest_times_the_batch():
    layer, outside = layer_flops(LTX23, **TOKENS), outside_flops(LTX23, **TOKENS)
    assert training_flops(LTX23, **TOKENS, batch=3) == 3 * (48 * layer.total + outside.total)
    assert training_flops(LTX23, **TOKENS, num_layers=0) == outside.total


def test_frozen_weights_cost_no_weight_gradient():
    full, lora = layer_flops(LTX23, **TOKENS), layer_flops(LTX23, **TOKENS, trained="lora")
    assert lora.linear == full.linear * 4 / 6
    assert lora.attention == full.attention


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), (None, None), ("NVIDIA GeForce RTX 4090", None)],
)
def test_peak_is_known_or_none(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_a_layer_equals_a_flop_counter_over_the_whole_block():
    model = our_model("torch", TINY_23, layers=2, tokens=24, timesteps=2, device=torch.device("cpu"))
    counted = {}
    for layers in (1, 2):
        # As two matmuls each way: flash attention's backward multiplies once more, which is not useful work.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.step(layers)
        counted[layers] = counter.get_total_flops()
    tokens = {"video_tokens": 24, "audio_tokens": AUDIO_TOKENS, "text_tokens": TEXT_TOKENS}
    assert counted[2] - counted[1] == layer_flops(TransformerConfig.from_metadata(TINY_23), **tokens).total
