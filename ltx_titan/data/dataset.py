"""A folder of prepared samples: lists them, reads their shapes, and reads one at a time.

A sample exists if every source folder has it at the same relative path, in a `.pt` file or in a shard; the two give
the same samples in the same order. Shapes are read before training, because the batch plan needs them.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ltx_titan.common.ranks import rank_and_size
from ltx_titan.data.cache import READER_THREADS, SampleFile, ShapeIndex
from ltx_titan.data.fingerprints import excluded_samples
from ltx_titan.data.layout import Fields, Kind, read_sample
from ltx_titan.data.shards import list_shards, read_shard_sample, shard_shapes
from ltx_titan.data.stale import describe, stale_samples
from ltx_titan.model.transformer import Modalities

logger = logging.getLogger(__name__)

Sample = dict[str, Fields]
"""Source -> field -> value, for one sample."""
ShapeKey = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(source, field, shape) of all fields of a sample; samples of equal keys can share a batch."""

PRIMARY = "latents"
_KINDS: dict[str, Kind] = {"conditions": "text", "video_latents": "video", "audio_latents": "audio"}
_EXAMPLES = 3


class _Location(NamedTuple):
    """Location of a sample of one source folder: a `.pt` file, or `key` in a shard."""

    file: SampleFile
    key: str | None = None

    def relative_path(self, folder: str) -> str:
        """The sample's path below its source folder, ending in `.pt` in a shard as well."""
        return self.key if self.key is not None else self.file.name.removeprefix(f"{folder}/")


def resolve_root(path: str | Path, option: str = "data.root") -> Path:
    """Returns the data root of a path: its `.precomputed` child if that exists, else the path itself.

    Args:
        path: data root, or the folder with the data root `.precomputed`.
        option: job key or option that the path is the value of, for the message.

    Raises:
        ValueError: the folder does not exist.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{option} = {str(path)!r}: expected a folder, found none; correct the path.")
    child = root / ".precomputed"
    return child if child.is_dir() else root


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one sample as the transformer meets them, references included; 0 for an absent stream."""

    video_tokens: int
    audio_tokens: int
    text_tokens: int


class PrecomputedDataset:
    """The samples below a data root."""

    def __init__(
        self, root: str | Path, sources: Mapping[str, str], option: str = "data.root", *, skip_damaged: bool = False
    ) -> None:
        """Finds the samples and their shapes.

        Args:
            root: data root, or the folder with the data root `.precomputed`.
            sources: folders to read, each with its key in a batch; `conditions` is one of them.
            option: job key of the root, for messages.
            skip_damaged: whether samples whose shapes cannot be read are skipped with a warning. Those whose shapes are
                known from before stay in the order; reading them fails.

        Raises:
            ValueError: a folder is missing or empty, no sample is in all of them, or a file cannot be used.
        """
        self.root = resolve_root(root, option)
        self.sources = dict(sources)
        # Filled while listing the samples of a shard: its header has both.
        self._shard_shapes: dict[_Location, dict[str, tuple[int, ...]]] = {}
        self.num_dropped = 0
        """Number of samples that were skipped because their shapes are unknown."""
        self._samples = self._match()
        self._warn_of_changes()
        self._keys = self._read_keys(skip_damaged)
        # Independent of the path of the root and of sharding: a moved or packed dataset keeps its order.
        # Relative paths and shapes, so that a dataset that was moved or packed into shards resumes in the same order.
        # Not contents: reading them would take as long as an epoch.
        self.fingerprint = fingerprint_of(
            f"{[location.relative_path(folder) for folder, location in sample.items()]}\0{key}"
            for sample, key in zip(self._samples, self._keys, strict=True)
        )

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """Relative path of a sample, for messages."""
        primary = PRIMARY if PRIMARY in self.sources else next(iter(self.sources))
        return self._samples[index][primary].relative_path(primary)

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes of a sample; those of equal keys can share a batch."""
        return self._keys[index]

    def load(self, index: int) -> Sample:
        """Reads one sample: source -> field -> tensor or number, without a batch dim.

        Raises:
            ValueError: a file is broken; with its name.
        """
        sample = {
            self.sources[folder]: self._read(folder, location) for folder, location in self._samples[index].items()
        }
        self._check_shapes(index, sample)
        self._check_masks(index, sample)
        return sample

    def peek(self, index: int) -> Sample:
        """Reads the sources of a sample whose values, and not only shapes, decide whether it can be trained on: masks,
        and latents that may be a placeholder.

        Raises:
            ValueError: a file is broken; with its name.
        """
        wanted = {source for source, field, _ in self._keys[index] if field in ("mask", "present")}
        locations = self._samples[index].items()
        return {
            self.sources[folder]: self._read(folder, location)
            for folder, location in locations
            if self.sources[folder] in wanted
        }

    def _read(self, folder: str, location: _Location) -> Fields:
        path, kind = self.root / location.file.name, self._kind(folder)
        return read_sample(path, kind) if location.key is None else read_shard_sample(path, location.key, kind)

    def _kind(self, folder: str) -> Kind | None:
        # References and masks are stored under names that the job chooses; None accepts either stream.
        return _KINDS.get(self.sources[folder])

    def _check_shapes(self, index: int, sample: Sample) -> None:
        # The plan made batches of equal shapes: a file that was replaced since would not stack with its batch.
        if (found := shape_key_of(sample)) != self._keys[index]:
            changed = sorted({source for source, _, _ in set(found) ^ set(self._keys[index])})
            raise ValueError(
                f"{self.root}: {self.name(index)}: expected the shapes of when the run started, found others in "
                f"{changed}; a dataset must not change during a run; start the run again."
            )

    def _check_masks(self, index: int, sample: Sample) -> None:
        tokens = {source: count for source, count in token_counts(self._keys[index]).items() if source in _KINDS}
        for source, fields in sample.items():
            # Only the count is checked: a mask may have any shape, and whether it is the video's or the audio's depends
            # on the job's conditions.
            mask = fields.get("mask")
            if isinstance(mask, Tensor) and mask.numel() not in tokens.values():
                raise ValueError(
                    f"{self.root / source / self.name(index)}: mask: expected one element per token ({tokens}), "
                    f"found {mask.numel()} (shape {list(mask.shape)}); prepare the mask for this clip's size."
                )

    def _match(self) -> list[dict[str, _Location]]:
        """Samples that every source has, sorted by the primary source's paths."""
        folders = {folder: self._scan(folder) for folder in self.sources}
        primary = PRIMARY if PRIMARY in folders else next(iter(folders))
        # Decided by the folders alone, which all ranks read alike, and not by sources that one of them may not see.
        excluded = {path for folder in folders for path in excluded_samples(self.root / folder)}
        kept = []
        missing: dict[str, list[str]] = {folder: [] for folder in folders}
        # Sorted, because the order of `os.walk` depends on the file system and the batch plan depends on this one.
        for path in sorted(folders[primary].keys() - excluded):
            names = {folder: _paired(path, folder, primary, files) for folder, files in folders.items()}
            lacking = [folder for folder, name in names.items() if name is None]
            for folder in lacking:
                missing[folder].append(path)
            if not lacking:
                kept.append({folder: folders[folder][name] for folder, name in names.items() if name is not None})
        for folder, paths in missing.items():
            if paths:
                logger.warning(
                    "%s: %d of %d samples lack a file in %s and are skipped: %s%s",
                    self.root,
                    len(paths),
                    len(folders[primary]),
                    folder,
                    ", ".join(paths[:_EXAMPLES]),
                    ", ..." if len(paths) > _EXAMPLES else "",
                )
        if not kept and excluded:
            raise ValueError(
                f"{self.root}: expected samples with the same relative path in every folder, found none, and "
                f"{len(excluded)} that are kept out, since their rows were removed or their sources changed; run "
                f"process-dataset again."
            )
        if not kept:
            counts = ", ".join(f"{folder}/: {len(files)} files" for folder, files in folders.items())
            examples = "; ".join(f"{folder}/{min(files)}" for folder, files in folders.items())
            raise ValueError(
                f"{self.root}: expected samples with the same relative path in every folder, found none ({counts}; for "
                f"example {examples}); prepare the folders from the same metadata file."
            )
        return kept

    def _warn_of_changes(self) -> None:
        """Names samples that are kept out, and those whose sources changed since they were made."""
        # Once for all ranks: it asks for every source file.
        if rank_and_size()[0] != 0:
            return
        for note, keys in stale_samples(self.root, self.sources).items():
            remedy = "" if "kept out" in note else "; run process-dataset again"
            logger.warning("%s: %d %s%s", self.root, len(keys), describe(note, keys), remedy)

    def _scan(self, folder: str) -> dict[str, _Location]:
        """All samples of a source folder, by path relative to it."""
        base = self.root / folder
        if not base.is_dir():
            present = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
            raise ValueError(
                f"{self.root}: expected the folder {folder!r} (for {self.sources[folder]}), found only {present}; "
                "prepare it, or correct the folder's name in the job."
            )
        # Shards first: a `.pt` file of the same path is newer and overrides the shard's sample.
        samples = self._scan_shards(folder)
        # Folders of a dataset may be links to other disks.
        for parent, _, names in os.walk(base, followlinks=True):
            for name in names:
                if name.endswith(".pt"):
                    path = Path(parent, name)
                    samples[path.relative_to(base).as_posix()] = _Location(self._file(path))
        if not samples:
            raise ValueError(f"{base}: expected .pt files or shards, found none; run the preprocessing for it.")
        return samples

    def _scan_shards(self, folder: str) -> dict[str, _Location]:
        paths = list_shards(self.root / folder)
        with ThreadPoolExecutor(max_workers=READER_THREADS) as pool:
            headers = list(pool.map(lambda path: shard_shapes(path, self._kind(folder)), paths))
        samples = {}
        for path, header in zip(paths, headers, strict=True):
            file = self._file(path)
            for key, shapes in header.items():
                samples[key] = _Location(file, key)
                self._shard_shapes[samples[key]] = shapes
        return samples

    def _file(self, path: Path) -> SampleFile:
        # Size and time identify the version of a file, for an index that opens only changed files.
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); a link to nothing? Restore the file, or remove it."
            ) from error
        return SampleFile(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime_ns)

    def _read_keys(self, skip_damaged: bool) -> list[ShapeKey]:
        locations = [(folder, location) for sample in self._samples for folder, location in sample.items()]
        # A shard's header has the shapes of all of its samples; the index is for `.pt` files.
        alone = {location.file: self._kind(folder) for folder, location in locations if location.key is None}
        damaged: dict[SampleFile, str] | None = {} if skip_damaged else None
        shapes = ShapeIndex(self.root).shapes(alone, damaged)
        if damaged:
            self._drop_unknown(shapes, damaged)

        def shapes_of(location: _Location) -> dict[str, tuple[int, ...]]:
            return shapes[location.file] if location.key is None else self._shard_shapes[location]

        return [
            tuple(
                (self.sources[folder], field, shape)
                for folder, location in sample.items()
                for field, shape in sorted(shapes_of(location).items())
            )
            for sample in self._samples
        ]

    def _drop_unknown(self, shapes: Mapping[SampleFile, object], damaged: Mapping[SampleFile, str]) -> None:
        """Removes the samples with a damaged file of unknown shapes."""
        kept = []
        for sample in self._samples:
            unknown = [place.file for place in sample.values() if place.key is None and place.file not in shapes]
            if unknown:
                logger.warning("skipped a sample whose shapes are unknown: %s", damaged[unknown[0]])
            else:
                kept.append(sample)
        self.num_dropped = len(self._samples) - len(kept)
        self._samples = kept


def shape_key_of(sample: Sample) -> ShapeKey:
    """Shape key of a sample in memory."""
    return tuple(
        (source, field, tuple(value.shape) if isinstance(value, Tensor) else ())
        for source, fields in sample.items()
        for field, value in sorted(fields.items())
    )


def fingerprint_of(samples: Iterable[str]) -> str:
    """Hashes what identifies each sample, in order: the identity of a dataset, which its batch plan depends on."""
    digest = hashlib.sha256()
    for sample in samples:
        # Names need not be UTF-8.
        digest.update(f"{sample}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def token_counts(key: ShapeKey) -> dict[str, int]:
    """Tokens of each stream of a sample, references included: frames x height x width of a video, steps of audio."""
    counts = {}
    for source, field, shape in key:
        if field == "latents":
            # Video [128, F', H', W'] has a token per latent voxel, audio [8, T, 16] one per time step.
            counts[source] = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1]
    return counts


def stream_tokens(key: ShapeKey, modalities: Modalities) -> TokenCounts:
    """Counts the tokens of a sample by stream."""
    counts = token_counts(key)
    audio = sum(count for name, count in counts.items() if "audio" in name)
    video = sum(counts.values()) - audio
    text = max(shape[0] for owner, name, shape in key if owner == "conditions" and name == "video_prompt_embeds")
    return TokenCounts(0 if modalities == "audio" else video, 0 if modalities == "video" else audio, text)


def stores_text_features(key: ShapeKey) -> bool:
    """Whether a sample holds text features, which still need the text connectors, and not finished contexts."""
    return any(name == "prompt_attention_mask" for _, name, _ in key)


def _paired(path: str, folder: str, primary: str, files: Mapping[str, _Location]) -> str | None:
    """Finds the sample of `folder` for the primary's `path`; an older layout has `condition_X` for `latent_X`."""
    if path in files:
        return path
    if folder == "conditions" and primary == PRIMARY and "/" not in path and path.startswith("latent_"):
        older = "condition_" + path.removeprefix("latent_")
        return older if older in files else None
    return None
