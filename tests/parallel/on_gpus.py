"""Parallel, compiled, kernel-backed gradients on real GPUs against float32 on one of them.

    torchrun --nproc-per-node 2 -m tests.parallel.on_gpus [--out FILE.json] [--budget SECONDS]
    torchrun --nproc-per-node 2 -m tests.parallel.on_gpus --heads 2      # tries the program out on a CPU

The gloo tests prove the plan in float32, where ranks and one process must agree to 1e-5. What they cannot see is what
NCCL, Inductor's GPU code and the Triton kernels make of it in bfloat16. Here each case's gradients are compared, tensor
by tensor, with float32 gradients of the plain model on one GPU, and its error with that of the plain model in bfloat16:
the same roundings in another order may be somewhat larger, a missing sum over ranks is not somewhat larger.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from ltx_titan.benchmarks.measure import environment
from ltx_titan.benchmarks.precision import make_inputs, relative_error
from ltx_titan.conditioning import FlexibleStrategy, ModelInputs
from ltx_titan.config import Degrees
from ltx_titan.model import LTXTransformer
from ltx_titan.model.float8_linear import FLOAT8_MULTIPLE
from ltx_titan.model.init import init_random_
from ltx_titan.model.kernel_ops import select_operators
from ltx_titan.parallel.activation_checkpoint import apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.float8 import apply_float8
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import build_mesh, init_distributed
from ltx_titan.parallel.parallelize import apply_compile
from ltx_titan.parallel.tokens import shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel
from ltx_titan.weights import released_config
from tests.parallel.harness import named, whole

_LATENT = (5, 11, 17)  # 935 tokens: divides by nothing

# Errors may be this many times those of the plain model in bfloat16, and float8's this large: 6 % a factor at worst.
_MORE = 1.5
_FLOAT8_ERROR = 0.25


@dataclass(frozen=True)
class Case:
    """One way of computing the same gradients."""

    name: str
    degrees: Degrees
    backend: str = "triton"
    compiled: bool = False
    recompute: str = "none"
    float8: str = "none"


FSDP, TP, CP = Degrees(dp_shard=2), Degrees(tp=2), Degrees(cp=2)
CASES = [
    Case("tp2 compiled", TP, compiled=True),
    Case("cp2 compiled", CP, compiled=True),
    Case("fsdp2 compiled float8", FSDP, compiled=True, float8="tensorwise"),
    Case("fsdp2 compiled native float8", FSDP, compiled=True, float8="native"),
    Case("tp2 eager", TP),
    Case("cp2 eager", CP),
    Case("fsdp2 eager", FSDP),
    Case("fsdp2 compiled selective", FSDP, compiled=True, recompute="selective"),
    Case("tp2 compiled full, torch operators", TP, "torch", compiled=True, recompute="full"),
]


def gradients(model: nn.Module, strategy: FlexibleStrategy, inputs: ModelInputs, share: float = 1.0) -> dict:
    """Loss and whole gradients by official name; `share` is this rank's part of the mean over samples."""
    loss = strategy.loss(*model(inputs.video, inputs.audio), inputs).total
    (loss * share).backward()
    return {"loss": loss.item(), **{name: whole(p.grad) for name, p in named(model) if p.grad is not None}}


def build(case: Case, config: dict, weights: dict[str, Tensor], device: torch.device) -> LTXTransformer:
    """The parallel model with the given weights, in bfloat16 over float32 shards."""
    mesh, tp, on_cpu = build_mesh(device.type, case.degrees), case.degrees.tp, device.type == "cpu"
    with torch.device("meta"):
        operators = select_operators("torch" if on_cpu else case.backend, device)
        model = LTXTransformer.from_config(config, operators=operators)
    is_float8 = case.float8 != "none"
    if is_float8:
        apply_float8(model, case.float8, emulate=on_cpu, tp=tp)
    if tp * case.degrees.cp > 1 or is_float8:
        layout = shard_tokens(model, mesh, multiple=FLOAT8_MULTIPLE if is_float8 else 1)
        if tp > 1:
            apply_tensor_parallel(model, mesh, layout)
        apply_context_parallel(model, layout)
    if case.recompute == "selective":
        apply_selective_checkpointing(model.transformer_blocks, tp=tp)
    if case.compiled:
        apply_compile(model.transformer_blocks)
    if case.recompute == "full":
        apply_full_checkpointing(model.transformer_blocks)
    apply_fsdp(model, model.transformer_blocks, mesh.fsdp, torch.bfloat16)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in named(model):
            p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))
    return model


def errors(actual: dict, exact: dict) -> dict[str, float]:
    """Relative L2 error of each gradient that is more than rounding."""
    tensors = {name: g for name, g in exact.items() if name != "loss"}
    largest = max(g.norm().item() for g in tensors.values())
    return {n: relative_error(actual[n], g) for n, g in tensors.items() if g.norm().item() > 1e-4 * largest}


def main() -> int:
    """Runs all cases and prints their errors; returns the number of those outside the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--heads", type=int, default=16, help="width; float8 and kernels want 16 and more")
    parser.add_argument("--operators", choices=["torch", "triton"], help="instead of each case's own")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further case starts")
    arguments = parser.parse_args()
    device, begun = init_distributed(), time.monotonic()
    torch.set_float32_matmul_precision("highest")
    config = {
        **released_config("ltx-2.3-22b")["transformer"],
        "num_layers": 2,
        "num_attention_heads": arguments.heads,
        "cross_attention_dim": arguments.heads * 128,
        "audio_num_attention_heads": arguments.heads,
        "audio_cross_attention_dim": arguments.heads * 64,
    }
    with torch.device(device):
        model = LTXTransformer.from_config(config)
    init_random_(model, seed=0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy, inputs = make_inputs(device, config, *_LATENT)
    exact = gradients(model, strategy, inputs)
    model.zero_grad(set_to_none=True)
    plain = errors(gradients(model.to(torch.bfloat16), strategy, inputs), exact)
    del model
    middle, worst = _summary(plain)
    rows = [{"case": "plain bfloat16", "median": middle, "worst": worst, "passed": True}]
    for case in CASES:
        case = replace(case, backend=arguments.operators or case.backend)
        late = torch.tensor(float(time.monotonic() - begun > arguments.budget), device=device)
        dist.all_reduce(late)
        if late > 0:
            rows.append({"case": case.name, "skipped": "budget used up", "passed": False})
            continue
        torch.compiler.reset()
        started = time.monotonic()
        # Every data-parallel rank has the same sample here, so each counts for its share.
        found = gradients(build(case, config, weights, device), strategy, inputs, 1 / case.degrees.dp)
        all_errors = errors(found, exact)
        middle, worst = _summary(all_errors)
        if case.float8 == "none":
            passed = all(e <= _MORE * max(plain[n], _summary(plain)[0]) for n, e in all_errors.items())
        else:
            passed = worst <= _FLOAT8_ERROR
        rows.append(
            {
                "case": case.name,
                "median": middle,
                "worst": worst,
                "worst_tensor": max(all_errors, key=all_errors.get),
                "loss_error": abs(found["loss"] / exact["loss"] - 1),
                "passed": passed,
                "seconds": time.monotonic() - started,
            }
        )
        if dist.get_rank() == 0:
            print(json.dumps(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        print(json.dumps(rows[0]))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps({**environment(device), "rows": rows}, indent=1))
    dist.destroy_process_group()
    return sum(not row["passed"] for row in rows)


def _summary(values: dict[str, float]) -> tuple[float, float]:
    ordered = sorted(values.values())
    return ordered[len(ordered) // 2], ordered[-1]


if __name__ == "__main__":
    sys.exit(min(main(), 1))
