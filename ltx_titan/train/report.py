"""Figures of the steps since the last log line: reduced over the ranks, then logged by rank 0."""

import logging
from math import isfinite

import torch
import torch.distributed as dist

from ltx_titan.common.titan import peak_flops
from ltx_titan.metrics import MetricsLogger, StepGuard, StepMetrics, Sums, peak_memory_gib, reset_peak_memory
from ltx_titan.metrics.heartbeat import Heartbeat
from ltx_titan.parallel import peer_memory
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.train.step import GradNorms

logger = logging.getLogger("ltx_titan")


class StepReport:
    """Logs the steps of a run; every rank creates one.

    Args:
        mesh: of the job.
        device: of this rank.
        guard: judges steps; None if none is skipped.
        heartbeat: informed of each logged step.
    """

    def __init__(self, mesh: Mesh, device: torch.device, guard: StepGuard | None, heartbeat: Heartbeat) -> None:
        self.idle_steps = 0
        """Steps of this run, as far as logged, in which no sample had a token to generate."""
        self._mesh = mesh
        self._device = device
        self._guard = guard
        self._heartbeat = heartbeat
        self._peak_flops = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else None)

    def log(
        self,
        log: MetricsLogger,
        step: int,
        sums: Sums,
        grad_norms: GradNorms | None,
        *,
        elapsed_s: float,
        lr: float,
        graph_bytes: int,
        extra: dict[str, float],
    ) -> str | None:
        """Reduces over ranks and logs; waits for the device.

        Args:
            log: of the run.
            step: the newest.
            sums: of the steps since the last call.
            grad_norms: of the newest step; None if they are not known or it was skipped.
            elapsed_s: time of these steps.
            lr: learning rate of the newest step.
            graph_bytes: peak memory while recording CUDA graphs, which the allocator's own figure omits.
            extra: further figures by TensorBoard tag.

        Returns:
            The loss and the gradient norm if one of them is not finite, otherwise None.
        """
        # One collective and one copy to the host for all figures.
        means = sums.means(self._mesh.sum_over_samples(sums.flat()).tolist())
        tflops = means.tflop / dist.get_world_size() / elapsed_s
        norm, figures = None, {}
        if grad_norms is not None:
            norm = grad_norms[0].item()
            figures = {f"optim/grad_norm_{stream}": value.item() for stream, value in sorted(grad_norms[1].items())}
        figures |= means.by_sigma | means.parts | extra
        if means.idle_steps:
            figures["data/idle_steps"] = means.idle_steps
            self._count_idle(step, means.idle_steps)
        if self._guard is not None and self._guard.total:
            figures["optim/skipped_steps"] = self._guard.total
        log.log(
            StepMetrics(
                step=step,
                loss=means.loss,
                loss_video=means.video,
                loss_audio=means.audio,
                grad_norm=norm,
                lr=lr,
                step_time_s=elapsed_s / sums.taken,
                tokens_per_s=means.tokens / elapsed_s,
                tflops_per_gpu=tflops,
                mfu=None if self._peak_flops is None else tflops * 1e12 / self._peak_flops,
                peak_mem_gib=self._peak_memory(graph_bytes, sums.loss),
                extra=figures,
            )
        )
        self._heartbeat.step(step, means.loss)
        # The norm is of the last step; without a step in the sums all were skipped, as the records in skipped/ say.
        if sums.steps and not (means.is_finite and isfinite(norm or 0.0)):
            return f"loss {means.loss}, gradient norm {norm}"
        return None

    def _peak_memory(self, graph_bytes: int, like: torch.Tensor) -> float | None:
        peak_memory = peak_memory_gib(self._device)
        if peak_memory is None:
            return None
        peak = like.new_tensor(max(peak_memory, graph_bytes / 1024**3) + peer_memory.held_bytes() / 1024**3)
        # The fullest rank decides whether a job fits.
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        reset_peak_memory(self._device)
        return peak.item()

    def _count_idle(self, step: int, steps: int) -> None:
        """Counts steps without a token to generate, and warns of the first one; the total is logged at the end."""
        if self.idle_steps == 0:
            logger.warning(
                "step %d, or one since the last log line: no sample had a token to generate (clips without the "
                "generated stream, or covered by conditions), so nothing was learned; metrics.jsonl counts such steps "
                "as data/idle_steps",
                step,
            )
        self.idle_steps += steps
