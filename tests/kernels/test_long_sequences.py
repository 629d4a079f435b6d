"""The compiled block on a GPU at more than 8,192 tokens.

From rows >= 2 x width on, torch 2.11's Inductor fuses sums over rows into other reductions, and can give the gradient
of a [B, 1, D] input the shape [D].
"""

import pytest
import torch

from ltx_titan.benchmarks.block_models import our_model
from tests.kernels.comparison import DEVICE
from tests.shapes import TINY_23

pytestmark = pytest.mark.runs_on("gpu")

TOKENS = 8_448
WIDTH_512 = TINY_23 | {
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "cross_attention_dim": 512,
    "audio_num_attention_heads": 8,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 256,
}


@pytest.mark.parametrize("timesteps", [1, 2])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_gradients_equal_eager_ones(backend, timesteps):
    gradients = []
    for is_compiled in (True, False):
        model = our_model(backend, WIDTH_512, 1, TOKENS, timesteps, DEVICE)
        with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
            model.step(1)
        gradients.append([parameter.grad for parameter in model.parameters()])
    # Both are bfloat16, rounded in different places: a few dozen roundings of 2 ** -9 each, at random. A gradient far
    # below the others (of a bias that a norm takes out again) is nothing but rounding.
    floor = 1e-3 * max(eager.abs().max().item() for eager in gradients[1])
    for compiled, eager in zip(*gradients, strict=True):
        difference, largest = (compiled - eager).abs().max().item(), eager.abs().max().item()
        assert difference <= 0.05 * max(largest, floor), f"gradient of shape {tuple(eager.shape)}"
