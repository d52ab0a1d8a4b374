"""What mkdocs is told beside mkdocs.yml: Markdown outside of docs/ becomes pages, links follow.

In the repository links lead from file to file. On the site those to Markdown lead to its page; other
files (sources, configs) are not on the site, so their links become plain text. A link to what doesn't
exist is warned of, which ends a strict build.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "configs/README.md": "configs.md",
    "results/README.md": "results.md",
    "surgery/demo_clip/README.md": "demo_clip.md",
}
"""File of the repository -> its page; all of docs/ are pages already."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead each link to its page."""
    sources = {target: source for source, target in PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [site_links(markdown[end : code.start()], source, uri), code[0]]
        end = code.end()
    return "".join([*parts, site_links(markdown[end:], source, uri)])


def site_links(text: str, source: str, uri: str) -> str:
    """Text of a file, its links as they are on the site.

    Args:
        text: Markdown without blocks of code.
        source: the file, seen from the root of the repository.
        uri: its page, seen from the root of the site.
    """

    def lead(link: re.Match[str]) -> str:
        picture, words, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if not (ROOT / path).exists():
            log.warning("%s: a link to %s, which does not exist", source, target)
        found = PAGES.get(path) or (path[len("docs/") :] if path.startswith("docs/") else None)
        if found is None:
            return words
        return f"{picture}[{words}]({os.path.relpath(found, os.path.dirname(uri))}{anchor})"

    return _LINK.sub(lead, text)
