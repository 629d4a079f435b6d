"""Where a step's figures go: `metrics.jsonl` for programs, TensorBoard and W&B for eyes, one line for the console.

Only rank 0 writes. Every JSON line has the same keys, null where the device cannot tell or the value is not a number,
and is flushed at once, so that the file is right up to the last logged step of a job that was killed. A resumed job
first drops what was logged after the checkpoint it resumes from.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from ltx_titan.metrics.console import Console
from ltx_titan.metrics.wandb import end_wandb

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

_TAGS = {
    "loss": "loss/total",
    "loss_video": "loss/video",
    "loss_audio": "loss/audio",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "step_time_s": "perf/step_time_s",
    "tokens_per_s": "perf/tokens_per_s",
    "tflops_per_gpu": "perf/tflops_per_gpu",
    "mfu": "perf/mfu",
    "peak_mem_gib": "mem/peak_gib",
}


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one optimizer step, reduced over ranks and micro-batches.

    Attributes:
        step: counted from 1.
        loss: mean over the samples of the global batch.
        loss_video: the video stream's part, None where it is not trained.
        loss_audio: the audio stream's.
        grad_norm: before clipping.
        lr: of the step.
        step_time_s: mean over the steps since the last logged one.
        tokens_per_s: over all ranks.
        tflops_per_gpu: useful operations, see `flops`.
        mfu: share of the device's peak, 0 to 1.
        peak_mem_gib: largest over ranks.
        extra: further scalars by TensorBoard tag, such as "loss/video_sigma_0.25-0.50"; in the JSON line under these
            names.
    """

    step: int
    loss: float | None = None
    loss_video: float | None = None
    loss_audio: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    peak_mem_gib: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


class MetricsLogger:
    """Writes `metrics.jsonl` and `tensorboard/` under the dump folder, and the console lines.

    Args:
        dump_folder: the job's folder.
        total_steps: where the job ends, for progress and time left.
        resumed_step: the step of the checkpoint that training goes on from, 0 for a fresh start. Later lines of an
            earlier run are dropped, and later points hidden in TensorBoard.
        is_writer: False on all ranks but 0: every method then does nothing.
        tensorboard: whether to write TensorBoard files.
        wandb: run of Weights & Biases, ended by `close`; None without one.
    """

    def __init__(
        self,
        dump_folder: str | Path,
        *,
        total_steps: int,
        resumed_step: int = 0,
        is_writer: bool = True,
        tensorboard: bool = True,
        wandb: "Run | None" = None,
    ) -> None:
        self.tensorboard: SummaryWriter | None = None
        self.wandb = wandb
        self._file = self._console = None
        if not is_writer:
            return
        folder = Path(dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        drop_later_lines(path, resumed_step)
        self._file = path.open("a")
        self._console = Console(total_steps, resumed_step)
        if tensorboard:
            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=resumed_step + 1)

    def log(self, metrics: StepMetrics) -> None:
        """Records a step. Values that are not finite become null, with a warning that names them."""
        if self._file is None:
            return
        values = asdict(metrics)
        values |= values.pop("extra")
        broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if broken:
            described = ", ".join(f"{name} = {values[name]}" for name in broken)
            logger.warning("Step %d: %s. Logged as null.", metrics.step, described)
            values |= dict.fromkeys(broken)
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        shown = {_TAGS.get(name, name): value for name, value in values.items() if name != "step" and value is not None}
        self.show(shown, metrics.step)
        self._console.step(metrics)

    def show(self, scalars: Mapping[str, float], step: int) -> None:
        """Adds scalars to TensorBoard and W&B alone: `metrics.jsonl` has no line for step 0, before training."""
        if self.tensorboard is not None:
            for tag, value in scalars.items():
                self.tensorboard.add_scalar(tag, value, step)
        if self.wandb is not None and scalars:
            self.wandb.log({**scalars, "step": step})

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._file is not None:
            self._file.close()
            self._console.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            end_wandb(self.wandb)
        self._file = self._console = self.tensorboard = self.wandb = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a killed job left unfinished is passed over.

    Raises:
        ValueError: another line is not a JSON object with a step.
    """
    path = Path(path)
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with 'step', found {line[:80]!r}."
            ) from error
        records.append(record)
    return records


def drop_later_lines(path: Path, step: int) -> None:
    """Rewrites a `metrics.jsonl` without what follows `step` and without an unfinished last line, if it exists."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)
