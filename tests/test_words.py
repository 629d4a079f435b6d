"""The words that docs/CONTRIBUTING.md replaces do not occur where a user or a reader can see them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "CONTRIBUTING.md"

# Phrases that are right in one file: what a caption says of a clip, and names that are not ours to choose.
ALLOWED = {
    ("ltx_titan/commands/captioning/text.py", "sounds"),
    ("ltx_titan/commands/captioning/text.py", "sound"),
    # `--kind grey` and the suffix of its files are part of the command's interface.
    ("ltx_titan/commands/compute_reference.py", "grey"),
    ("ltx_titan/tables/folders.py", "grey"),
}


def banned_phrases():
    """Phrases in backticks in the first column of the glossary."""
    rows = re.findall(r"^\| (.+?) \| .+ \|$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def visible_files():
    patterns = ("ltx_titan/**/*.py", "kernels/*.py", "train_configs/**/*", "docs/*.md", "docs/benchmarks/README.md")
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path != GLOSSARY]
    return [ROOT / "README.md", ROOT / "run_train.sh", *files]


def occurrences(phrase, text):
    """Line numbers of a phrase as whole words; parts of paths and identifiers do not count."""
    pattern = re.compile(rf"(?<![\w/.-]){re.escape(phrase)}(?![\w/-])", re.IGNORECASE)
    return [text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text)]


def test_the_glossary_is_read():
    phrases = banned_phrases()
    assert {"sound", "goes on", "stand-in", "colour"} <= set(phrases)
    assert occurrences("goes on", "It\ngoes on there") == [2]
    assert occurrences("sound", "read_sound soundtrack docs/sound.md") == []


@pytest.mark.parametrize("phrase", banned_phrases())
def test_words_that_the_glossary_replaces_do_not_occur(phrase):
    found = []
    for path in visible_files():
        name = path.relative_to(ROOT).as_posix()
        if (name, phrase) not in ALLOWED:
            found += [f"{name}:{line}" for line in occurrences(phrase, path.read_text(encoding="utf-8"))]
    assert not found, f"{phrase!r}: see the table in docs/CONTRIBUTING.md for the word to use in {', '.join(found)}"
