import pytest
import torch

from ltx_titan.model import LTXTransformer
from ltx_titan.model.kernel_ops import triton_operators
from ltx_titan.parallel.parallelize import apply_compile
from tests.golden_cases import assert_close_to_max, case_names, load_case
from tests.kernels.comparison import DEVICE
from tests.model.golden_transformer import build_inputs, build_transformer, weighted_sum

# The interpreter takes half a minute a case: only 2.3, which has everything. A GPU runs all of them, and the first
# compiled.
pytestmark = pytest.mark.runs_on("gpu", "interpreter")

CASES = [("av_22b", False)]
if DEVICE.type == "cuda":
    CASES = [("av_22b", True), *((name, False) for name in case_names("transformer_forward"))]


def _to_device(modality):
    fields = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in vars(modality).items()}
    return type(modality)(**fields)


@pytest.mark.parametrize(("name", "is_compiled"), CASES)
def test_outputs_and_gradients_equal_the_reference(name, is_compiled):
    case = load_case(name)
    reference = build_transformer(case)
    model = LTXTransformer.from_config(
        case.entry["config"]["transformer"], reference.modalities, operators=triton_operators()
    )
    model.load_state_dict(reference.state_dict())
    model.to(DEVICE)
    if is_compiled:
        apply_compile(model.transformer_blocks)
    video, audio, perturbations = build_inputs(case, "base")
    outputs = model(video and _to_device(video), audio and _to_device(audio), perturbations)
    outputs = [None if output is None else output.cpu() for output in outputs]
    for stream, output in zip(("video", "audio"), outputs, strict=True):
        if output is not None:
            expected = case.tensors[f"output.base.{stream}"]
            torch.testing.assert_close(output, expected, **case.entry["tolerance"]["output"])
    if "loss" not in case.entry["variants"]["base"]:
        return
    weighted_sum(case, "base", *outputs).backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    bound = case.entry["tolerance"]["grad"]["rtol_to_max"]
    for key, expected in case.under("grad.weight.").items():
        assert_close_to_max(gradients[key], expected, bound, key)
    norms = torch.stack([gradients[n].norm() for n in case.entry["grad_weight_norm_names"]])
    assert_close_to_max(norms, case.tensors["grad.weight_norms"], bound, "gradient norms of all weights")
