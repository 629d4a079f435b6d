"""The split of a training step, on a small hand-made trace and on a real step of a miniature job."""

import json

import pytest

from ltx_titan.benchmarks.step import table
from ltx_titan.benchmarks.step_trace import split_step
from ltx_titan.cli import main
from tests.jobs import write_job
from tests.processes import run_ranks


def kernel(name: str, start: float, ms: float, correlation: int = 0, cat: str = "kernel") -> dict:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start * 1e3,
        "dur": ms * 1e3,
        "args": {"correlation": correlation},
    }


def host(name: str, start: float, ms: float, cat: str = "cuda_runtime", correlation: int | None = None) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start * 1e3, "dur": ms * 1e3, "args": args}


TRACE = [
    # Forward: a matmul, attention, one of our kernels; weights are gathered beside the matmul.
    kernel("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", 0, 4),
    kernel("ncclDevKernel_AllGather_RING_LL", 1, 2),
    kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 4, 3),
    kernel("_residual_norm_forward_kernel", 7, 1),
    # Backward: attention's gradient, the matmul again, gradients of weights; the last reduce-scatter is exposed.
    kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", 10, 6),
    kernel("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", 16, 4),
    kernel("_residual_norm_forward_kernel", 20, 1),
    kernel("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", 21, 4),
    kernel("triton_red_fused__scaled_dot_product_cudnn_attention_backward_sum_4", 25, 1),
    kernel("void at::native::(anonymous namespace)::chunk_cat_cuda_kernel<float, c10::BFloat16>", 26, 2),
    kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 27, 4),
    # The same template clips and updates: only the host's ranges tell them apart.
    kernel("void at::native::multi_tensor_apply_kernel<Binary>", 32, 1, correlation=1),
    kernel("void at::native::multi_tensor_apply_kernel<FusedAdamMath>", 33, 2, correlation=2),
    host("cudaGraphLaunch", 0, 0.1, correlation=0),
    host("cuLaunchKernelEx", 2.5, 0.01, cat="cuda_driver", correlation=1),
    host("cudaLaunchKernel", 4.5, 0.01, correlation=2),
    host("cudaStreamSynchronize", 5, 30),
    host("ltx_titan::clip", 2, 1, cat="user_annotation"),
    host("Optimizer.step#ShardedAdamW.step", 4, 1, cat="user_annotation"),
    {"ph": "M", "name": "process_name"},
]


def test_copies_between_gpus_and_their_barriers_are_a_class_of_their_own():
    found = split_step(
        [
            kernel("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", 0, 4),
            kernel("Memcpy PtoP (Device -> Device)", 1, 2, cat="gpu_memcpy"),
            kernel("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", 4, 1),
        ]
    )
    share = found.shares["peer copies"]
    assert (share.kernel_ms, share.exposed_ms, share.launches) == pytest.approx((3, 1, 2))


def test_a_step_is_split_by_class_and_by_what_is_exposed():
    found = split_step(TRACE)
    kernels = {kind: share.kernel_ms for kind, share in found.shares.items() if share.launches}
    assert kernels == pytest.approx(
        {
            "matmul": 12,
            "attention": 9,
            "fused kernels": 2,
            "elementwise": 1,
            "copies": 2,
            "NCCL": 6,
            "clipping": 1,
            "optimizer": 2,
        }
    )
    exposed = {kind: share.exposed_ms for kind, share in found.shares.items() if share.exposed_ms}
    # The all-gather runs beside a matmul; the reduce-scatter is hidden by the copies for one of its four.
    assert exposed == pytest.approx(kernels | {"NCCL": 3})
    assert found.busy_ms == pytest.approx(sum(exposed.values()))
    assert found.busy_ms == pytest.approx(35 - 2 - 1)  # the last kernel ends at 35 ms, and there are two gaps


def test_what_runs_again_in_the_backward_pass_is_recomputed():
    assert split_step(TRACE).recomputed_ms == pytest.approx(4 + 1)


def test_launches_are_counted_where_the_host_makes_them():
    assert split_step(TRACE).host_launches == 3


def test_the_table_adds_up_to_the_step():
    found = split_step(TRACE)
    row = {
        "split": {kind: vars(share) for kind, share in found.shares.items()},
        "recomputed_ms": found.recomputed_ms,
        "busy_ms": found.busy_ms,
        "host_launches": 3,
        "step_time_s": 0.040,
        "steps_timed": 7,
        "mfu": 0.5,
    }
    lines = table(row).splitlines()
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if "%" in line and "MFU" not in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert any("host and gaps" in line and "8.00" in line for line in lines)


def test_a_real_step_is_profiled(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__local_batch_size=2)
    out = tmp_path / "row.jsonl"
    command = ["bench", "step", str(job), "--steps", "3", "--out", str(out), "--data.num_workers=0"]
    assert run_ranks(main, 1, command) == [0]
    row = json.loads(out.read_text())
    assert row["steps_timed"] == 1
    assert len(row["losses"]) == 2
    assert row["busy_ms"] == 0
    assert row["step_time_s"] > 0
