"""All events of a log in orders that shards do not have: by time, and by a field's value.

    stream/
      time item label_0 …         every event in the order of time: Unix seconds, item's number, and
                                  of each task 0 for no label, 1 for label 0, 2 for label 1
      second events               every second that has events, and how many there were before it
      positive_0 known_0 …        of each task: how many of them had label 1, any label
      field_0/key positive_0 …    every event by a field's value and then by time; labels likewise
      00000.json …                an order is whole

The files hold numbers and nothing else.  What reads them maps them into memory.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stca_jax.data.external_sort import sort_numbers
from stca_jax.data.interaction_log.encoders import positions
from stca_jax.files import write_json
from stca_jax.input.mapped import MappedArray, map_file, release
from stca_jax.input.trends import ValueEvents, cumulative

_ROWS = 1 << 22  # read at once: looking up items costs as much for a few
_TIME_BITS, _LABEL_BITS = 32, 2

_Events = tuple[np.ndarray, np.ndarray, list[np.ndarray]]
"""What some events are sorted by first, what by then, and labels of some tasks as 0, 1 or 2."""


@dataclasses.dataclass(frozen=True)
class EventStream:
    """The events of a log; small enough to send to workers.

    Attributes:
      folder: Where they lie.
      fields: Of which there are trends.
      labels: Names of the tasks.
      num_events: Events.
    """

    folder: pathlib.Path
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    num_events: int

    def write_by_time(self, shards: Sequence[pathlib.Path], items: pa.Array) -> None:
        """Puts all events in the order of time and then of items, unless an earlier attempt has.

        Args:
          shards: Parquet files of events.
          items: Every item of the log; its number is its place.
        """
        done = self.folder / "00000.json"
        if done.exists():
            return
        bits = _bits(len(items))
        for tasks in self._task_groups(bits):
            events = self._read(shards, items, tasks)
            last = -1
            with _Files(self.folder) as files:
                for time, item, labels in self._sort(events, bits, tasks, self.folder):
                    begins = np.flatnonzero(np.diff(time.astype(np.int64), prepend=last))
                    if not tasks.start:
                        files.write("time", time.astype(np.uint32))
                        files.write("item", item.astype(np.int32))
                        files.write("second", time[begins].astype(np.uint32))
                        files.count("events", np.ones(len(time), bool), begins)
                    for k, label in zip(tasks, labels, strict=True):
                        files.write(f"label_{k}", label.astype(np.uint8))
                        files.count_labels(k, label, begins)
                    last = int(time[-1])
        write_json(done, {"events": self.num_events})

    def write_by_value(self, field: str, values: np.ndarray) -> None:
        """Puts all events in the order of a field and then of time, unless an earlier attempt has.

        Args:
          field: Which; the order of time is there.
          values: Of each item.
        """
        done = self.folder / f"{1 + self.fields.index(field):05d}.json"
        if done.exists():
            return
        folder = self._field_folder(field)
        folder.mkdir(parents=True, exist_ok=True)
        for tasks in self._task_groups(_bits(int(values.max(initial=0)) + 1)):
            events = self._read_by_time(values, tasks)
            with _Files(folder) as files:
                for value, time, labels in self._sort(events, _TIME_BITS, tasks, folder):
                    if not tasks.start:
                        files.write("key", value << np.uint64(_TIME_BITS) | time)
                    for k, label in zip(tasks, labels, strict=True):
                        files.count_labels(k, label, slice(None))
        write_json(done, {"events": self.num_events})

    @functools.cached_property
    def time(self) -> MappedArray:
        """Of all events, ascending; uint32 Unix seconds, [n]."""
        return self._load("", "time", np.uint32)

    @functools.cached_property
    def item(self) -> MappedArray:
        """Of each event in that order, its number, [n]."""
        return self._load("", "item", np.int32)

    @property
    def totals(self) -> tuple[MappedArray, MappedArray, list[MappedArray], list[MappedArray]]:
        """Of all events by second: `time`, `events`, `positive` and `known` of `Trends`."""
        seconds, events = self._load("", "second", np.uint32), self._load("", "events", np.int32)
        return seconds, events, *self._label_counts("")

    def by_value(self, field: str) -> ValueEvents:
        """The events in the order of a field."""
        return ValueEvents(self._load(field, "key", np.uint64), *self._label_counts(field))

    def _task_groups(self, bits: int) -> Iterator[range]:
        """Tasks, as many at a time as fit into 64 bits beside a time and so many bits."""
        at_once = (64 - _TIME_BITS - bits) // _LABEL_BITS
        for begin in range(0, max(len(self.labels), 1), at_once):
            yield range(begin, min(begin + at_once, len(self.labels)))

    def _read(
        self, shards: Sequence[pathlib.Path], items: pa.Array, tasks: range
    ) -> Iterator[_Events]:
        """Times and items of all events, by shard."""
        columns = ["time", "item", *(f"label_{self.labels[k]}" for k in tasks)]
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    item = positions(batch["item"], items)
                    if (item < 0).any():
                        raise ValueError(f"{shard} has an item that is none of the log")
                    labels = [batch[name].fill_null(-1) for name in columns[2:]]
                    labels = [label.to_numpy(zero_copy_only=False) + 1 for label in labels]
                    yield batch["time"].to_numpy(), item, labels

    def _read_by_time(self, values: np.ndarray, tasks: range) -> Iterator[_Events]:
        """Values and times of all events, by time."""
        labels = [self._load("", f"label_{k}", np.uint8) for k in tasks]
        for begin in range(0, self.num_events, _ROWS):
            some = slice(begin, begin + _ROWS)
            yield values[self.item[some]], self.time[some], [label[some] for label in labels]
            for array in (self.time, self.item, *labels):
                release(array)

    def _sort(
        self, events: Iterable[_Events], bits: int, tasks: range, folder: pathlib.Path
    ) -> Iterator[_Events]:
        """All events in order, some at a time.

        Args:
          events: In any order.
          bits: That hold what they are sorted by then.
          tasks: Whose labels they have, by which they are sorted at last.
          folder: Where there is place.
        """
        numbers = (_pack(*some, bits) for some in events)
        size = 0
        for some in sort_numbers(numbers, self.num_events, folder / "temporary"):
            size += len(some)
            if len(some):
                yield _unpack(some, bits, len(tasks))
        if size != self.num_events:
            raise ValueError(f"{folder}: {size} events in order, {self.num_events} in the log")

    def _label_counts(self, field: str) -> tuple[list[MappedArray], list[MappedArray]]:
        """Of each task, how many events before a place were positive, and were labelled."""
        tasks = range(len(self.labels))
        return (
            [self._load(field, f"positive_{k}", np.int32) for k in tasks],
            [self._load(field, f"known_{k}", np.int32) for k in tasks],
        )

    def _field_folder(self, field: str) -> pathlib.Path:
        return self.folder / f"field_{self.fields.index(field)}" if field else self.folder

    def _load(self, field: str, name: str, dtype: Any) -> MappedArray:
        return map_file(self._field_folder(field) / name, dtype)


def _bits(size: int) -> int:
    """That hold each number below the size."""
    return max(size - 1, 1).bit_length()


def _pack(
    first: np.ndarray, second: np.ndarray, labels: Sequence[np.ndarray], bits: int
) -> np.ndarray:
    """One number for each event."""
    numbers = first.astype(np.uint64) << np.uint64(bits)
    numbers |= second.astype(np.uint64)
    for label in labels:
        numbers <<= np.uint64(_LABEL_BITS)
        numbers |= label.astype(np.uint64)
    return numbers


def _unpack(numbers: np.ndarray, bits: int, num_labels: int) -> _Events:
    """The inverse."""
    labels = list[np.ndarray]()
    for _ in range(num_labels):
        labels.insert(0, (numbers & np.uint64((1 << _LABEL_BITS) - 1)).astype(np.uint8))
        numbers = numbers >> np.uint64(_LABEL_BITS)
    return numbers >> np.uint64(bits), numbers & np.uint64((1 << bits) - 1), labels


class _Files:
    """Files of numbers that are written piece by piece; no mapping, whose pages count as memory."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._totals: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends each file of counts with that of all events."""
        for name, total in self._totals.items():
            self.write(name, np.array([total], np.int32))
        for file in self._files.values():
            file.close()

    def write(self, name: str, numbers: np.ndarray) -> None:
        """Appends numbers to a file."""
        if name not in self._files:
            self._files[name] = open(self._folder / name, "wb")  # noqa: SIM115
        self._files[name].write(np.ascontiguousarray(numbers).data)

    def count(self, name: str, flags: np.ndarray, places: np.ndarray | slice) -> None:
        """Appends how many events before some places of a block have a flag."""
        before = cumulative(flags) + np.int32(self._totals.get(name, 0))
        self.write(name, before[:-1][places])
        self._totals[name] = int(before[-1])

    def count_labels(self, task: int, label: np.ndarray, places: np.ndarray | slice) -> None:
        """Likewise, label 1 and any label of a task."""
        self.count(f"positive_{task}", label == 2, places)
        self.count(f"known_{task}", label > 0, places)
