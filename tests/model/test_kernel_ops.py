import os
import subprocess
import sys

import pytest
import torch

from ltx_titan.model.attention import Attention, SoftmaxAttention
from ltx_titan.model.kernel_ops import select_operators
from ltx_titan.model.ops import HeadShare
from ltx_titan.model.rope import Rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_cpu_uses_plain_pytorch(backend):
    assert select_operators(backend, CPU).name == "torch"


def test_the_model_runs_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ltx_titan.model import LTXTransformer\n"
        "from ltx_titan.model.kernel_ops import select_operators\n"
        "operators = select_operators('auto', torch.device('cpu'))\n"
        "x = torch.randn(1, 3, 8)\n"
        "r, h = operators.gated_residual_norm(x, x, None, [None], None, 1e-6)\n"
        "print(operators.name, r.shape == h.shape == x.shape)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["torch", "True"], run.stderr


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_the_gpus_they_were_measured_on():
    device = torch.device("cuda")
    expected = "triton" if torch.cuda.get_device_capability(device)[0] == 9 else "torch"
    assert select_operators("auto", device).name == expected


def test_kernels_that_cannot_run_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"kernels\.backend = 'triton', but .* Use 'auto' or 'torch'"):
        select_operators("triton", CPU)


def test_the_attention_backend_is_the_first_that_takes_the_inputs_also_when_compiled():
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    backends = torch.nn.attention.SDPBackend
    core = SoftmaxAttention((backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION, backends.MATH))
    expected = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
    for run in (core, torch.compile(core, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(run(q, k, v, None), expected, rtol=1e-5, atol=1e-6)


def test_shares_of_the_heads_make_the_whole_attention():
    # Two ranks in one process. Each norms its heads with the sum of squares over both and rotates them by their own
    # cosines and sines; the outputs of the row-wise last projection add up.
    torch.manual_seed(0)
    heads, head_dim, width, tokens = 4, 6, 24, 5
    whole = Attention(width, width, heads, head_dim, gated=True, eps=1e-6, rope_interleaved=False)
    torch.nn.init.normal_(whole.q_norm.weight)
    x = torch.randn(2, tokens, width)
    angles = torch.randn(2, heads, tokens, head_dim // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    totals = [whole.to_q(x).square().sum(-1), whole.to_k(x).square().sum(-1)]
    total = torch.zeros_like(whole(x))
    for rank in range(2):
        part = Attention(width, width, heads, head_dim, gated=True, eps=1e-6, rope_interleaved=False)
        own = slice(rank * width // 2, (rank + 1) * width // 2)
        for name in ("to_q", "to_k", "to_v"):
            linear = getattr(whole, name)
            getattr(part, name).weight, getattr(part, name).bias = (
                torch.nn.Parameter(linear.weight[own]),
                torch.nn.Parameter(linear.bias[own]),
            )
        gates = slice(rank * heads // 2, (rank + 1) * heads // 2)
        part.to_gate_logits.weight = torch.nn.Parameter(whole.to_gate_logits.weight[gates])
        part.to_gate_logits.bias = torch.nn.Parameter(whole.to_gate_logits.bias[gates])
        part.q_norm.weight = torch.nn.Parameter(whole.q_norm.weight[own])
        part.k_norm.weight = torch.nn.Parameter(whole.k_norm.weight[own])
        part.to_out[0].weight = torch.nn.Parameter(whole.to_out[0].weight[:, own])
        part.to_out[0].bias = torch.nn.Parameter(whole.to_out[0].bias / 2)
        summed = iter(totals)
        part.share = HeadShare(rank * heads // 2, width, lambda local, summed=summed: next(summed))
        total = total + part(x, q_rotation=rotation, k_rotation=rotation)
    torch.testing.assert_close(total, whole(x, q_rotation=rotation, k_rotation=rotation), rtol=1e-5, atol=1e-6)
