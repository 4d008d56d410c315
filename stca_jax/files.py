"""Writing files that are never half there."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO


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
