"""Training on although samples are damaged: `data.on_bad_sample = "skip"`.

A damaged sample is replaced by the next one of its shape in the dataset's order. That depends on the files alone, so
all ranks that read the sample replace it alike, batches keep their shapes and their order, and a resumed run makes the
same choice. A disk that cannot be read is not a damaged sample: another rank may be able to read it, so it ends the
job.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ltx_titan.common.files import json_text
from ltx_titan.data.dataset import Sample, ShapeKey
from ltx_titan.data.layout import UnreadableError

logger = logging.getLogger(__name__)

LOG_NAME = "skipped_samples.jsonl"
_TOLERATED = 0.01


class _Dataset(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def shape_key(self, index: int) -> ShapeKey: ...

    def load(self, index: int) -> Sample: ...

    def peek(self, index: int) -> Sample: ...


class SkippingDataset:
    """A dataset whose damaged samples are replaced; everything else is that of the dataset."""

    def __init__(self, dataset: _Dataset, folder: Path) -> None:
        """Wraps a dataset.

        Args:
            dataset: reads samples.
            folder: folder of the log, in which every rank names what it replaced.
        """
        self._dataset = dataset
        self._log = folder / LOG_NAME
        self._lock = threading.Lock()
        self._damaged: dict[int, str] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of the dataset, damaged samples included: the order of data does not depend on what is damaged."""
        return self._dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Relative path of a sample, for messages."""
        return self._dataset.name(index)

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes of a sample."""
        return self._dataset.shape_key(index)

    def load(self, index: int) -> Sample:
        """Reads a sample, or the next one of its shape that can be read.

        Raises:
            ValueError: there is none, or too many samples are damaged; or the disk cannot be read.
        """
        sample = self._try(index)
        if sample is not None:
            return sample
        for other in self._others(index):
            sample = self._try(other)
            if sample is not None:
                self._write(index, other)
                return sample
        raise ValueError(f"{self._damaged[index]} No other sample of its shape can be read in its place.")

    def peek(self, index: int) -> Sample:
        """Reads a sample as the dataset's `peek`, or the next one of its shape that can be read.

        Raises:
            ValueError: there is none, or the disk cannot be read.
        """
        try:
            return self._dataset.peek(index)
        except UnreadableError:
            raise
        except ValueError:
            for other in self._others(index):
                with suppress(ValueError):
                    return self._dataset.peek(other)
            raise

    def _try(self, index: int) -> Sample | None:
        if index in self._damaged:
            return None
        try:
            return self._dataset.load(index)
        except UnreadableError:
            raise
        except ValueError as error:
            self._count(index, str(error))
            return None

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            self._damaged[index] = reason
            count = len(self._damaged)
        if count > tolerated(len(self)):
            raise ValueError(
                f'{count} of {len(self)} samples are damaged, more than data.on_bad_sample = "skip" replaces '
                f"({tolerated(len(self))}); the last: {reason}"
            )

    def _others(self, index: int) -> Iterator[int]:
        key = self.shape_key(index)
        for offset in range(1, len(self)):
            other = (index + offset) % len(self)
            if self.shape_key(other) == key:
                yield other

    def _write(self, index: int, other: int) -> None:
        entry = {"sample": self.name(index), "replaced_by": self.name(other), "reason": self._damaged[index]}
        logger.warning("skipped %(sample)s, trained on %(replaced_by)s instead: %(reason)s", entry)
        line = json_text({"rank": os.environ.get("RANK", "0"), **entry}) + "\n"
        # Appended in one write, so that lines of several ranks do not mix.
        with self._lock, self._log.open("a", encoding="utf-8") as file:
            file.write(line)


def tolerated(num_samples: int) -> int:
    """Number of damaged samples that are replaced: 1 %, at least one."""
    return max(1, int(num_samples * _TOLERATED))
