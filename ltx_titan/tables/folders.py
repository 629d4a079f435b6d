"""Folders of clips: the media files in them, and the captions in text files beside these."""

import codecs
from collections.abc import Sequence
from pathlib import Path

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"})
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", *HEIF_SUFFIXES})
# Endings of reference files by kind. Datasets on disk use the British spelling.
REFERENCE_SUFFIXES = {"edges": "_edges", "gray": "_grey", "grey": "_grey", "blur": "_blur", "depth": "_depth"}
CAPTION_SUFFIX = ".txt"
# Longer marks first: that of UTF-32 starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 4096


def find_media(folder: Path, suffixes: frozenset[str], recursive: bool = True) -> list[Path]:
    """Media files of a folder with given suffixes, sorted by path.

    Hidden files and folders are skipped, and so are references (`a_edges.mp4`) of clips in the same folder (`a.mp4`).

    Raises:
        ValueError: the folder does not exist, or contains no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    found = [path for path in _visible(folder, recursive) if path.suffix.lower() in suffixes]
    if not found:
        kinds = ", ".join(sorted(suffixes))
        below = "" if recursive else "; add --recursive to search its subfolders"
        raise ValueError(f"{folder}: contains no media files ({kinds}){below}")
    # Only beside the clip it belongs to: a file that merely ends in `_edges` is a clip.
    names = {path.with_suffix("") for path in found}
    return sorted(path for path in found if not any(clip in names for clip in _clips_of(path)))


def captions_beside(folder: Path, files: Sequence[Path]) -> tuple[dict[Path, str], list[tuple[str, str]]]:
    """Captions in text files `NAME.txt` beside media files `NAME.*`, without the space around them.

    Args:
        folder: folder of the files; its subfolders are searched as well.
        files: media files below it.

    Returns:
        Captions by media file, empty ones included; and (item, reason) of text files that belong to none or cannot be
        read.
    """
    by_name: dict[Path, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.with_suffix(""), []).append(file)
    captions, problems = {}, []
    for text_file in sorted(path for path in _visible(folder, True) if path.suffix.lower() == CAPTION_SUFFIX):
        media = by_name.get(text_file.with_suffix(""))
        if media is None:
            problems.append((str(text_file), f"has no media file beside it, such as {text_file.stem}.mp4"))
            continue
        try:
            caption = read_text(text_file).strip()
        except ValueError as error:
            problems.append((str(text_file), str(error).removeprefix(f"{text_file}: ")))
            continue
        captions.update(dict.fromkeys(media, caption))
    return captions, problems


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8 (with or without a byte-order mark), or in UTF-16 or UTF-32 with one.

    Line breaks stay as they are.

    Raises:
        ValueError: the file has another encoding; the message has a command that converts it.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    sample = content[:_SAMPLE_BYTES]
    # ASCII in UTF-16 is valid UTF-8 with a NUL byte in every other position.
    if encoding == "utf-8-sig" and 4 * sample.count(0) > len(sample):
        name = "UTF-16LE" if sample[1::2].count(0) >= sample[::2].count(0) else "UTF-16BE"
        raise ValueError(f"{path}: not UTF-8, but {name} without a byte-order mark; {_conversion(path, name)}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise ValueError(f"{path}: damaged {encoding.upper()} ({error.reason} at byte {error.start})") from error
        # The decoder counts without the mark, which is of no matter for a line.
        line = content.count(b"\n", 0, error.start) + 1
        before, after = (
            content[: error.start].rsplit(b"\n", 1)[-1][-10:],
            content[error.start :].split(b"\n", 1)[0][:10],
        )
        word = (before + after).decode("cp1252", "replace")
        raise ValueError(
            f"{path}: not UTF-8: line {line} has the byte 0x{content[error.start]:02x}; in Windows-1252 it would read "
            f"{word!r}; if that is right, {_conversion(path, 'WINDOWS-1252')}"
        ) from error


def _conversion(path: Path, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}_utf8{path.suffix}"


def _visible(folder: Path, recursive: bool) -> list[Path]:
    return [
        path
        for path in (folder.rglob("*") if recursive else folder.iterdir())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _clips_of(path: Path) -> list[Path]:
    """Paths without suffix of the clips that a file is a reference of, judging by its name."""
    endings = set(REFERENCE_SUFFIXES.values())
    return [path.with_name(path.stem.removesuffix(ending)) for ending in endings if path.stem.endswith(ending)]
