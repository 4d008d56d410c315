"""Files that are never half there, and reading those that grow."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from stca_jax.errors import UserError


def cache_dir() -> pathlib.Path:
    """Where files are kept that can be made again: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "stca_jax"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one step once the block has ended.

    A reader never sees half a file; after an error, a kill or a power loss the old one is there.
    """
    # Renaming is atomic only within one file system. The process id keeps two writers apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the objects of a file of JSON lines; null is None.

    Args:
      path: One that does not exist has none, and a last line without its newline, which is still
        being written, is left out.

    Raises:
      UserError: a line is not a JSON object; names it.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is {line[:40]!r}, expected a JSON object: remove the line"
            )
        rows.append(row)
    return rows


def refuse_scheme(what: str, path: str | os.PathLike[str]) -> None:
    """Refuses addresses of other file systems, which would be taken for names of local folders.

    Raises:
      UserError: the path is one, such as "gs://bucket/folder".
    """
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", os.fspath(path)):
        raise UserError(
            f"{what} {os.fspath(path)!r} is not a local path, and {scheme[0]}/… is not read "
            "or written directly: mount the bucket or share as a folder, or copy it to a local disk"
        )


def local_path(what: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """The file or folder that a user named, on this machine; ~ is a home folder.

    Raises:
      UserError: it is an address, empty, or in the home folder of a user who is not there.
    """
    text = os.fspath(path)
    refuse_scheme(what, text)
    if not text:
        raise UserError(
            f"{what} is empty, as where a variable of a shell is not set; . is the current folder"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{what} {text!r}: no such user; write ./{text} if that is a name"
        ) from None
