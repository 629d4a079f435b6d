"""Windows: the spans of a long clip that become samples, each as long as the clip's bucket."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

_STRIDE = re.compile(r"(\d+)|(\d+(?:\.\d+)?)s")


@dataclass(frozen=True)
class WindowRule:
    """Choice of windows; by default one, from the start of the clip.

    Attributes:
        count: number of windows at most, evenly spread over all that there are; None for all.
        is_random: one window at a start that differs between clips, the same in every run.
        stride: distance between starts in frames; None for the length of a window, or for one frame if random.
        stride_s: the distance in seconds instead.
    """

    count: int | None = 1
    is_random: bool = False
    stride: int | None = None
    stride_s: Fraction | None = None

    @property
    def is_first(self) -> bool:
        """Whether the only window is the start of the clip."""
        return self.count == 1 and not self.is_random

    def starts(self, frames: int, length: int, fps: Fraction, key: Path) -> list[int]:
        """First frame of each window of a clip, ascending.

        Args:
            frames: of the clip, at least `length`.
            length: frames of a window.
            fps: frames per second.
            key: path of the clip's sample, which a random start depends on.
        """
        found = range(0, frames - length + 1, self._stride(length, fps))
        if self.is_random:
            # From a hash of the key, as the random crop: independent of other clips. Salted, so that the two differ.
            digest = hashlib.blake2b(os.fsencode(key.as_posix()), digest_size=8, person=b"window").digest()
            return [found[int.from_bytes(digest) % len(found)]]
        if self.count is None or self.count >= len(found):
            return list(found)
        if self.count == 1:
            return [0]
        # The first and the last one are among them.
        return [found[round(i * (len(found) - 1) / (self.count - 1))] for i in range(self.count)]

    def _stride(self, length: int, fps: Fraction) -> int:
        if self.stride_s is not None:
            return max(1, round(self.stride_s * fps))
        return self.stride or (1 if self.is_random else length)


FIRST_WINDOW = WindowRule()


def frames_used(starts: Sequence[int], length: int) -> int:
    """Number of frames in at least one window of `length` frames; the starts ascend."""
    return length + sum(min(length, later - earlier) for earlier, later in pairwise(starts))


def parse_windows(windows: str, stride: str | None) -> WindowRule:
    """Parses `--windows` (`all`, `random` or a number) and `--window-stride` (`48` frames or `2.5s`).

    Raises:
        ValueError: one has another form, or a stride is given for a single window.
    """
    count = int(windows) if windows.isdecimal() and len(windows) < 10 else 0
    if windows not in ("all", "random") and count < 1:
        raise ValueError(f"--windows = {windows!r}: expected all, random, or a number of 1 or more")
    rule = WindowRule(None if windows == "all" else count or 1, windows == "random")
    if stride is None:
        return rule
    if rule.is_first:
        raise ValueError(
            f"--window-stride = {stride!r}: a single window from the start has none; add --windows all, random or "
            "2 and more"
        )
    match = _STRIDE.fullmatch(stride)
    frames, seconds = (int(match[1] or 0), Fraction(match[2] or 0)) if match else (0, Fraction(0))
    if not frames and not seconds:
        raise ValueError(f"--window-stride = {stride!r}: expected frames, as 48, or seconds, as 2.5s, above 0")
    return WindowRule(rule.count, rule.is_random, frames or None, seconds or None)
