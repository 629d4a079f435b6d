"""Watches whether all ranks move on, and names the one that does not.

A rank that hangs (a lost file system, a stuck driver, a stopped process) leaves all others waiting in their next
collective, where none of them can say for whom. So a thread of each rank publishes in the job's store where its rank
is, and rank 0's compares:

- a rank whose thread has stopped publishing does not answer: stopped, swapped out, or its node is gone;
- a rank at an earlier position than the others is the one that they wait for.

A phase may take hours on all ranks together, and only a collective knows that it waits for too long: the process
group's time-out (`job.timeout_s`) ends the run, and the thread writes every rank's Python stack to `stacks/` before.
But NCCL, which ends the process from a thread of its own, waits a minute first, and is not known to succeed whatever
the device does. So rank 0, and then every rank, ends itself where another rank has been silent for longer than the
time-out while rank 0 was in one place, and so do the others where rank 0 is. That needs a store that answers, and is
not done before training, nor while files are exported, which waits for nobody.
"""

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ltx_titan.common.ranks import StalledError

logger = logging.getLogger(__name__)

# In the order of a step.
_PHASES = ("loading", "training", "validating", "saving", "exporting")
_PATIENCE_S = 60.0
_GRACE_S = 30.0
"""For a collective's own time-out, after which an error is raised, or NCCL's flight recorder written."""
_WRITING_S = 15.0
"""For files of a process that ends: their file system may be what hangs."""
_ASLEEP_S = 10.0
_TIMED_OUT = ("timed out", "timeout")
# In place of the count of a rank that has ended.
_LEFT = -1


class _Position(NamedTuple):
    """Position of a rank in the run."""

    step: int
    phase: int

    def __str__(self) -> str:
        return f"{_PHASES[self.phase]}, step {self.step}"


class Watch:
    """This rank's part of the watch; every rank creates one after joining.

    Args:
        store: of the job.
        folder: for the stacks; made when needed.
        timeout_s: time-out of the collectives.
        on_stall: called on rank 0, in the thread, with the step and the ranks that the others wait for.
        on_lost: called in the thread before it ends the process, with what is to be reported.
    """

    def __init__(
        self,
        store: dist.Store,
        folder: Path,
        timeout_s: float,
        *,
        on_stall: Callable[[int, str], None] | None = None,
        on_lost: Callable[[StalledError], None] | None = None,
    ) -> None:
        self.folder = folder
        self._timeout_s = timeout_s
        self._limit_s = timeout_s + min(_GRACE_S, timeout_s)
        self._on_stall, self._on_lost = on_stall, on_lost
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # Several positions and a decision must fit into a short time-out.
        self._poll_s = min(5.0, timeout_s / 20)
        self._patience_s = min(_PATIENCE_S, timeout_s / 2)
        self._position = _Position(0, 0)
        self._since = time.monotonic()
        self._beats = 0
        self._said = 0.0
        # Beats of each rank as last seen, and since when they have not changed.
        self._seen: dict[int, tuple[int, float]] = {}
        self._has_written = False
        self._is_training = False
        self._end = threading.Event()
        # A connection of its own: on a shared one the thread would wait behind the main thread's requests.
        self._store = store.clone()  # type: ignore[attr-defined] # the stubs lack it
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._size > 1:
            # Before the first collective: a rank that hangs in it must have been seen.
            self._publish()
            self._thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Notes where this rank is; only reads a clock."""
        self._position, self._since = _Position(step, _PHASES.index(phase)), time.monotonic()
        self._said = 0.0

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises a `StalledError` in place of the time-out of a collective; ends the watch."""
        self._is_training = True
        try:
            yield
        except RuntimeError as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error
        else:
            self._stop()
            self._leave()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._poll_s + 1)

    def _explain(self, error: RuntimeError) -> RuntimeError:
        """The error that names the missing ranks, if it was a time-out; other errors as they are."""
        text = str(error).lower()
        if self._size == 1 or not any(words in text for words in _TIMED_OUT):
            return error
        self._write_stacks()
        try:
            self._store.set("watch/write", "1")
            # Two looks, so that a rank that does not answer shows.
            self._missing()
            time.sleep(4 * self._poll_s)
            missing = self._missing()
        except Exception:  # the store's host is gone, and with it the node of rank 0
            missing = "the node of rank 0, which does not answer"
        return StalledError(
            f"{self._position}: a collective timed out after {self._timeout_s:.0f} s (job.timeout_s), waiting for "
            f"{missing or 'a rank that is in the same place as all others'}. The Python stacks of the ranks that "
            f"answer are in {self.folder}."
        )

    def _run(self) -> None:
        started = time.monotonic()
        while not self._end.wait(self._poll_s):
            if time.monotonic() - started > self._poll_s + _ASLEEP_S:
                # This process was asleep, perhaps with its whole machine: what it knows of others is as old.
                self._seen.clear()
            try:
                self._beat()
            except Exception as error:  # the job ends, or its store is gone: the collectives will say so
                logger.debug("watch: %s", error)
                # A connection that broke stays broken.
                with contextlib.suppress(Exception):
                    self._store = self._store.clone()
            started = time.monotonic()

    def _beat(self) -> None:
        position, waited = self._publish(), time.monotonic() - self._since
        if not self._has_written and (waited > 0.8 * self._timeout_s or self._store.check(["watch/write"])):
            _in_time(self._write_stacks)
        if self._rank > 0:
            self._look([0])
            if self._store.check(["watch/end"]):
                self._end_process(self._store.get("watch/end").decode())
            self._end_if_lost(waited)
            return
        missing = self._missing()
        if waited > self._patience_s and waited > 2 * self._said and missing is not None:
            self._said = waited
            logger.warning("%s: waiting for %s, since %.0f s", position, missing, waited)
            if self._on_stall is not None:
                self._on_stall(position.step, f"waiting for {missing}")
        if waited > 0.8 * self._timeout_s and not self._store.check(["watch/write"]):
            self._store.set("watch/write", "1")
            logger.warning(
                "%s: no progress for %.0f s%s; job.timeout_s = %.0f. Stacks of all ranks that answer are in %s",
                position,
                waited,
                # Perhaps for the last time: NCCL's own watchdog ends a rank without asking.
                "" if missing is None else f", waiting for {missing}",
                self._timeout_s,
                self.folder,
            )
        self._end_if_lost(waited)

    def _end_if_lost(self, waited: float) -> None:
        """Ends this process if another rank that it looks at has been silent for too long, and it has waited as long.

        Without a rank the others end no more steps after the time-out. One that was silent for longer when this rank
        came here has only lost the store.
        """
        if not self._may_end() or waited < self._limit_s or self._position.phase == _PHASES.index("exporting"):
            return
        earliest = time.monotonic() - waited - self._timeout_s
        lost = [rank for rank in self._silent(self._limit_s) if self._seen[rank][1] > earliest]
        if not lost:
            return
        text = (
            f"{self._position}: {_ranks(lost)} has not answered for {self._limit_s:.0f} s, longer than job.timeout_s "
            f"({self._timeout_s:.0f} s). The Python stacks of the ranks that answer are in {self.folder}."
        )
        if self._rank == 0:
            with contextlib.suppress(Exception):
                self._store.set("watch/end", text)
        self._end_process(text)

    def _may_end(self) -> bool:
        return self._is_training and not self._end.is_set()

    def _end_process(self, text: str) -> None:
        if not self._may_end():
            return
        error = StalledError(text)
        try:
            _in_time(lambda: logger.error("%s", error) if self._on_lost is None else self._on_lost(error))
        finally:
            # Not an exception: the main thread waits in a library, perhaps for a device that waits for the lost rank.
            os._exit(1)

    def _leave(self) -> None:
        """Notes that this rank publishes nothing more because it has ended."""
        if self._size == 1:
            return
        try:
            self._store.set(f"watch/{self._rank}", json.dumps([_LEFT, *self._position]))
        except Exception as error:  # the store is gone, and with it whoever could ask
            logger.debug("watch: %s", error)

    def _publish(self) -> _Position:
        """Writes this rank's position, with a count that shows that it is alive, to the store; returns the position."""
        self._beats += 1
        position = self._position
        self._store.set(f"watch/{self._rank}", json.dumps([self._beats, *position]))
        return position

    def _look(self, ranks: Iterable[int]) -> dict[int, _Position]:
        """Positions of ranks, as far as they are known; notes which have published since the last look."""
        now, positions = time.monotonic(), {}
        for rank in ranks:
            beats = 0  # of a rank that has not even joined
            if self._store.check([f"watch/{rank}"]):
                beats, step, phase = json.loads(self._store.get(f"watch/{rank}"))
                positions[rank] = _Position(step, phase)
            last, since = self._seen.get(rank, (-1, now))
            self._seen[rank] = (beats, since if beats == last else now)
        return positions

    def _silent(self, seconds: float) -> list[int]:
        """Other ranks that have published nothing for so long, and have not left."""
        now = time.monotonic()
        return [
            rank
            # A copy: the main thread may look as well, to explain its error.
            for rank, (beats, since) in sorted(list(self._seen.items()))
            if rank != self._rank and beats != _LEFT and now - since > seconds
        ]

    def _missing(self) -> str | None:
        """The ranks that the others wait for, and why; None if all are in the same place."""
        positions = self._look(range(self._size))
        if silent := self._silent(3 * self._poll_s):
            seen = positions.get(silent[0], "never")
            return f"{_ranks(silent)}, which does not answer (last seen: {seen})"
        first = min(positions.values(), default=None)
        late = [rank for rank, position in positions.items() if position == first]
        if len(late) in (0, len(positions)):
            return None
        return f"{_ranks(late)}, which is still {first}"

    def _write_stacks(self) -> None:
        if self._has_written:
            return
        self._has_written = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self._rank}.txt").open("w") as file:
                file.write(f"rank {self._rank}, {self._position}, for {time.monotonic() - self._since:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.warning("%s: %s", self.folder, error.strerror or error)


def _in_time(work: Callable[[], object]) -> None:
    """Runs what may never return."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_WRITING_S)


def _ranks(ranks: list[int]) -> str:
    return "rank " + ", ".join(map(str, ranks))
