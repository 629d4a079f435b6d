"""Rows of a table to one row for each window of their clips.

The first window has the name of its clip, a later one that of its first frame: `a.pt`, `a.w000089.pt`. A sample is
therefore specified by its name and the options of its folder: another choice of windows makes only those that are new,
and samples of windows that are no longer chosen are treated as those of removed rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ltx_titan.common.files import name_problem
from ltx_titan.common.ranks import Ranks
from ltx_titan.data.fingerprints import FingerprintFile
from ltx_titan.encode.clips import ClipRules, plan_clip, read_header
from ltx_titan.media import frames_at_rate, is_image
from ltx_titan.tables.samples import SampleRow, SampleTable, split_window_key, window_key


def with_windows(table: SampleTable, rules: ClipRules, root: Path, ranks: Ranks) -> SampleTable:
    """Expands every row to the windows that the rules choose; each process reads its share of the headers.

    A clip that is gone or cannot be read keeps the windows that are stored, so that their samples are treated as those
    of any other such clip; without any, its row stays and is reported as every file that cannot be used.

    Args:
        table: dataset table with videos.
        rules: rules by which clips are brought to a shape, with the choice of windows.
        root: root of the prepared data.
        ranks: processes of the run.
    """
    share = [(row.key, _planned_starts(row, rules)) for row in table.samples[ranks.rank :: ranks.world_size]]
    planned = dict(item for items in ranks.gather(share) for item in items)
    stored = _stored_starts(table.samples, root)
    return _expanded(table, {key: starts or stored.get(key, [0]) for key, starts in planned.items()})


def with_stored_windows(table: SampleTable, root: Path) -> SampleTable:
    """Expands rows to the windows whose latents are stored: for captions, which are encoded without their clips."""
    return _expanded(table, _stored_starts(table.samples, root))


def _planned_starts(row: SampleRow, rules: ClipRules) -> list[int]:
    """First frames of the windows of a row; empty if its file cannot be used."""
    assert row.video is not None
    try:
        header = read_header(row.video)
        clip = plan_clip(row.video, rules, header)
    except (ValueError, OSError):
        # The stage of videos will report it.
        return []
    frames = frames_at_rate(header, None if is_image(row.video) else rules.fps)
    return rules.windows.starts(frames, clip.bucket.frames, clip.fps, row.key)


def _stored_starts(rows: Sequence[SampleRow], root: Path) -> dict[Path, list[int]]:
    """First frames of the windows of each row with latents."""
    entries = FingerprintFile(root / "latents").entries
    keys = {row.key.as_posix() for row in rows}
    starts: dict[Path, list[int]] = {}
    for key in sorted(key for key, entry in entries.items() if entry.state != "orphan"):
        # A clip may be named as the window of another one.
        clip, start = (key, 0) if key in keys else split_window_key(key)
        if clip in keys:
            starts.setdefault(Path(clip), []).append(start)
    return starts


def _expanded(table: SampleTable, starts: Mapping[Path, Sequence[int]]) -> SampleTable:
    """A table with one row for each window; windows with the name of another row's sample are rejected."""
    taken = {row.key for row in table.samples}
    taken |= {folder for key in taken for folder in key.parents}
    samples, rejected = [], [*table.rejected]
    for row in table.samples:
        for start in starts.get(row.key, (0,)):
            window = replace(row, key=window_key(row.key, start), start=start)
            problem = name_problem(window.key)
            if start and window.key in taken:
                problem = f"its output {window.key} has the name of another row's; rename one of the two clips"
            if problem is None:
                samples.append(window)
            else:
                rejected.append((window.subject(row.media), problem))
    return replace(table, samples=tuple(samples), rejected=tuple(rejected))
