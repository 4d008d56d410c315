"""MkDocs hook: where links to files beside the docs lead."""

import pathlib
import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links to files beside the docs lead to the repository, or to nowhere if it has no address."""
    del files
    folder = pathlib.PurePosixPath("docs", page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        text, link = match.groups()
        if not config.repo_url:
            return text
        path = posixpath.normpath(folder / link)
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return _LINK.sub(outside, markdown)
