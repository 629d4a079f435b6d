"""MkDocs hooks: README.md as the first page, and links that hold on the site as in the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# [text](path#anchor) of a file; addresses and anchors of the same page are no files.
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md as the first page; its links are relative to docs/ then."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_indented(readme.replace("](docs/", "]("))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to README.md at the first page, and replaces those to files that are no pages by their text."""
    folder = posixpath.dirname(page.file.src_uri)

    def resolve(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["path"]))
        if files.get_file_from_path(path) is not None:
            return link[0]
        # Links of README.md are relative to the folder above.
        path = path if page.file.src_uri == "index.md" else path.removeprefix("../")
        if path == "README.md":
            return f"[{link['text']}]({posixpath.relpath('index.md', folder or '.')}{link['anchor'] or ''})"
        # MkDocs warns of those that do not exist.
        return link["text"] if (ROOT / path).exists() else link[0]

    return LINK.sub(resolve, markdown)


def _indented(markdown: str) -> str:
    """Indents what belongs to the items of numbered lists by four columns, as Python-Markdown requires, not three."""
    lines, is_item = [], False
    for line in markdown.split("\n"):
        if line and not line.startswith(" "):
            is_item = re.match(r"\d+\. ", line) is not None
        lines.append(f" {line}" if is_item and line.startswith("   ") else line)
    return "\n".join(lines)
