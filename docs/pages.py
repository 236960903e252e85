"""What `make docs` does to the pages before mkdocs builds them.

Pages are written to be read in the repository. The site gets the README as its front page, the changelog and the
guide for contributors, and what is linked but no page of the site (scripts, folders) is named without a link.
Docstrings name things in reStructuredText, as Python's own do; the site wants Markdown.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages too, by the name that they have in the site."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
PUBLIC = re.compile(r"``(snows_hf\.\w+)``")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        target = OUTSIDE.get(target.removeprefix("../"), target)
        return f"[{text}]({target}{anchor})" if files.get_file_from_path(target) else text

    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return LINK.sub(link, markdown)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = PUBLIC.sub(r"[`\1`][\1]", ROLE.sub(r"``\1``", obj.docstring.value))
