"""Writing files that are never half there."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from stca_jax.errors import UserError


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


def refuse_scheme(what: str, path: str | os.PathLike[str]) -> None:
    """Refuses addresses of other file systems, which would be taken for names of local folders.

    Raises:
      UserError: the path is one, such as "gs://bucket/folder".
    """
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", os.fspath(path)):
        raise UserError(
            f"{what} is {os.fspath(path)}: {scheme[0]}/… is not read or written directly; copy it to "
            "a local disk, or mount it as a folder"
        )
