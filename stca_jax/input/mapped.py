"""Numbers in files that are mapped into memory: read where they are used, and let go of after."""

from __future__ import annotations

import mmap
import os
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike


class MappedArray(np.memmap):
    """A file's numbers, to read.  Pickled, they travel as the file's path, which is mapped again.

    What is computed from them, or is only a part of them, travels as the numbers themselves.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """The path, if this is the whole file as it was mapped."""
        if isinstance(self.base, mmap.mmap):
            return map_file, (os.fspath(self.filename), self.dtype)
        return np.array(self).__reduce_ex__(protocol)


def map_file(path: str | os.PathLike[str], dtype: DTypeLike) -> MappedArray:
    """All numbers of a file, which holds nothing else; [n].

    Raises:
      OSError: the file is not there.
      ValueError: the file is empty.
    """
    return MappedArray(path, dtype, mode="r")


def release(array: np.ndarray) -> None:
    """Lets go of a mapped file's pages, which count as this process's memory once they are read."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
