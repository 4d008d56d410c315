"""Keeps the records read last, so that a user who stands in many batches is decoded once."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from stca_jax.input.records import UserRecord

_MAX_BYTES = 256 * 2**20


class RecordCache:
    """The records used last, up to a number of bytes; several threads may ask."""

    def __init__(self, read: Callable[[int], UserRecord], max_bytes: int = _MAX_BYTES):
        """Keeps nothing yet.

        Args:
          read: Reads the i-th record.
          max_bytes: Of all records kept; a larger record is read each time.
        """
        self._read = read
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[int, UserRecord] = collections.OrderedDict()
        self._bytes = 0

    def record(self, i: int) -> UserRecord:
        """The i-th record; what `read` raises is passed on."""
        with self._lock:
            if (kept := self._kept.get(i)) is not None:
                self._kept.move_to_end(i)
                return kept
        record = self._read(i)  # other threads may read meanwhile
        with self._lock:
            size = _num_bytes(record)
            if i not in self._kept and size <= self._max_bytes:
                self._kept[i] = record
                self._bytes += size
                while self._bytes > self._max_bytes:
                    self._bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return record


def _num_bytes(record: UserRecord) -> int:
    columns = [
        record.event_time, record.request_id, record.request_time, record.request_split,
        record.history_end, record.target_offset, record.label, *record.history.values(),
        *record.request.values(), *record.target.values(),
    ]  # fmt: skip
    return sum(column.nbytes for column in columns)
