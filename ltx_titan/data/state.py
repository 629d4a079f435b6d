"""Where a run is in its data: a count of samples, which stays meaningful when the mesh or the batch changes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class DataPosition:
    """Position after a step, as kept in a checkpoint.

    Attributes:
        samples_seen: samples of all global batches so far.
        global_batch_size: of the run that wrote it.
        fingerprint: of its data set.
    """

    samples_seen: int
    global_batch_size: int
    fingerprint: str

    def to_dict(self) -> dict[str, int | str]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(int(values["samples_seen"]), int(values["global_batch_size"]), str(values["fingerprint"]))


def resume_step(position: DataPosition, *, global_batch_size: int, fingerprint: str) -> tuple[int, list[str]]:
    """The global batch to go on with, and what a user should know about it.

    With the batch size of before it is exactly the next one. With another it is rounded down: up to a batch of
    samples is counted again rather than left out.

    Args:
        position: from the checkpoint.
        global_batch_size: of the job now.
        fingerprint: of the data set now.

    Returns:
        number of the next global batch in the plan (not the optimizer step, which the checkpoint knows), and one line
        per change; none where the order goes on as in an unbroken run.
    """
    batch, rest = divmod(position.samples_seen, global_batch_size)
    notes = []
    if global_batch_size != position.global_batch_size:
        again = f"; {rest} of them are counted again" if rest else ""
        notes.append(
            f"training.global_batch_size changed from {position.global_batch_size} to {global_batch_size}: after "
            f"{position.samples_seen} samples the data goes on with global batch {batch} of a new order{again}"
        )
    if fingerprint != position.fingerprint:
        notes.append(
            f"the data set changed (fingerprint {position.fingerprint[:8]} -> {fingerprint[:8]}): its samples come "
            "in a new order, and some that were seen may come again early"
        )
    return batch, notes
