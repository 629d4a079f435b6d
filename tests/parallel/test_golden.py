"""The reference's outputs and gradients, under tensor and context parallelism."""

import pytest
import torch

from ltx_titan.config import Degrees
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import Mesh, build_mesh
from ltx_titan.parallel.tokens import shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel
from tests.golden_cases import Case, assert_close_to_max, case_names, load_case
from tests.model.golden_transformer import build_inputs, build_transformer, weighted_sum
from tests.parallel.harness import whole
from tests.processes import run_ranks


def _compare(degrees: Degrees) -> None:
    mesh = build_mesh("cpu", degrees)
    compared = 0
    for name in case_names("transformer_forward"):
        case = load_case(name)
        heads = case.entry["config"]["transformer"]["num_attention_heads"]
        if heads % (degrees.tp * degrees.cp) or (degrees.cp > 1 and case.entry["model"] == "audio_only"):
            continue
        model = _build(case, mesh)
        for variant in case.entry["variants"]:
            _compare_variant(case, variant, model)
            model.zero_grad()
            compared += 1
    assert compared > 1


def _build(case: Case, mesh: Mesh) -> LTXTransformer:
    model = build_transformer(case)
    layout = shard_tokens(model, mesh)
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model, mesh, layout)
    apply_context_parallel(model, layout)
    if mesh.fsdp.size() > 1:
        apply_fsdp(model, model.transformer_blocks, mesh.fsdp, torch.float32)
    return model


def _compare_variant(case: Case, variant: str, model: LTXTransformer) -> None:
    outputs = model(*build_inputs(case, variant))
    for stream, output in zip(("video", "audio"), outputs, strict=True):
        expected = case.tensors.get(f"output.{variant}.{stream}")
        assert (output is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(output, expected, **case.entry["tolerance"]["output"])
    if "loss" not in case.entry["variants"][variant]:
        return
    weighted_sum(case, variant, *outputs).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    bound = case.entry["tolerance"]["grad"]["rtol_to_max"]
    for name, expected in case.under("grad.weight.").items():
        assert_close_to_max(gradients[name], expected, bound, name)
    norms = torch.stack([gradients[name].norm() for name in case.entry["grad_weight_norm_names"]])
    assert_close_to_max(norms, case.tensors["grad.weight_norms"], bound, "gradient norms of all weights")


@pytest.mark.distributed
@pytest.mark.parametrize("degrees", [Degrees(tp=2), Degrees(cp=2), Degrees(tp=2, cp=2)], ids=str)
def test_sharded_transformer_equals_the_reference(degrees):
    run_ranks(_compare, degrees.cp * degrees.tp, degrees)
