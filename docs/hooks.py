"""MkDocs hook: files of the repository that pages link to are pages of the site as well.

The site so has no link that leads nowhere, whether or not the repository has a public address.
"""

import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

_REPOSITORY = pathlib.Path(__file__).parents[1]
_FOLDER = "repository"  # of the site; pages of files lie below
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = "~~~~~~"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds a page for each file that a page links to, and for those that these link to in turn."""
    waiting = [_path_of(file.src_uri) for file in files.documentation_pages()]
    added: set[str] = set()
    while waiting:
        path = waiting.pop()
        for target in _targets(path):
            if not target.startswith("docs/") and target not in added:
                added.add(target)
                waiting.append(target)
    for path in sorted(added):
        files.append(File.generated(config, _page_of(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lets links to files of the repository lead to their pages."""
    del config, files
    source = page.file.src_uri
    path = _path_of(source)
    if path.endswith(".md"):
        return _LINK.sub(lambda match: _rewritten(match, path, source), markdown)
    return markdown


def _rewritten(match: re.Match[str], path: str, source: str) -> str:
    target = _resolve(path, match[1])
    is_within_docs = path.startswith("docs/") and target.startswith("docs/")
    if is_within_docs or not (_REPOSITORY / target).exists():
        return match[0]
    return f"]({posixpath.relpath(_page_of(target), posixpath.dirname(source))}{match[2] or ''})"


def _targets(path: str) -> Iterator[str]:
    """Files and folders that a file links to."""
    if (_REPOSITORY / path).is_dir():
        yield from (f"{path}/{name}" for name in _listed(path))
    elif path.endswith(".md"):
        for match in _LINK.finditer((_REPOSITORY / path).read_text()):
            target = _resolve(path, match[1])
            if (_REPOSITORY / target).exists():
                yield target


def _content(path: str) -> str:
    """The page of a file: rendered if it is a page, else as it is."""
    file = _REPOSITORY / path
    if path.endswith(".md"):
        return file.read_text()
    heading = f"# {path}\n\n"
    if file.is_dir():
        links = (f"- [{name}]({path.rpartition('/')[2]}/{name}.md)\n" for name in _listed(path))
        return heading + "".join(links)
    language = "python" if file.suffix == ".py" else "text"
    return f"{heading}{_FENCE}{language}\n{file.read_text()}\n{_FENCE}\n"


def _listed(folder: str) -> list[str]:
    """What a folder's page lists; of a notebook its script, which holds the same code."""
    return sorted(path.name for path in (_REPOSITORY / folder).glob("*.py"))


def _resolve(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _page_of(path: str) -> str:
    """The site's source file of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{_FOLDER}/{path}" + ("" if path.endswith(".md") else ".md")


def _path_of(source: str) -> str:
    """The inverse of `_page_of`."""
    if not source.startswith(f"{_FOLDER}/"):
        return f"docs/{source}"
    path = source.removeprefix(f"{_FOLDER}/")
    return path if (_REPOSITORY / path).exists() else path.removesuffix(".md")
