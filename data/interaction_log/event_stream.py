"""All events of a log in orders that shards do not have: by time, and by a field's value.

    stream/
      time.npy item.npy           every event in the order of time: Unix seconds, item's number
      positive_0.npy known_0.npy  of each task: how many of the first 0 … n had label 1, any label
      field_0/key.npy …           every event by a field's value and then by time; labels likewise
      00000.json …                a step is whole

What reads the files maps them into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stca_jax.data.external_sort import Rows, sort_rows
from stca_jax.data.interaction_log.encoders import positions
from stca_jax.files import write_json
from stca_jax.input.trends import ValueEvents, cumulative

_ROWS = 1 << 22  # read at once: looking up items costs as much for a few
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


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

    @property
    def num_steps(self) -> int:
        """Of `write`."""
        return 1 + len(self.fields)

    def write(
        self, step: int, shards: Sequence[pathlib.Path], items: pa.Array, columns: Mapping[str, Any]
    ) -> None:
        """Puts all events in one order, unless an earlier attempt has.

        Args:
          step: 0 for that of time, 1 … for that of a field.
          shards: Parquet files of events.
          items: Every item of the log; its number is its place.
          columns: Of each field but "item", each item's value.
        """
        done = self.folder / f"{step:05d}.json"
        if done.exists():
            return
        field = self.fields[step - 1] if step else ""
        folder = self._field_folder(field)
        folder.mkdir(parents=True, exist_ok=True)
        values = np.arange(len(items)) if field in ("", "item") else columns[field][: len(items)]
        blocks = functools.partial(self._blocks, shards, items, values, bool(step))
        rows = sort_rows(blocks, self.num_events, folder / "temporary")
        self._write_arrays(folder, bool(step), rows)
        write_json(done, {"events": self.num_events})

    @functools.cached_property
    def time(self) -> np.ndarray:
        """Of all events, ascending; uint32 Unix seconds, [n]."""
        return self._load("", "time")

    @functools.cached_property
    def item(self) -> np.ndarray:
        """Of each event in that order, its number, [n]."""
        return self._load("", "item")

    def label_counts(self, field: str = "") -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each task, how many of the first 0 … n events were positive, and were labelled."""
        tasks = range(len(self.labels))
        return (
            [self._load(field, f"positive_{k}") for k in tasks],
            [self._load(field, f"known_{k}") for k in tasks],
        )

    def by_value(self, field: str) -> ValueEvents:
        """The events in the order of a field."""
        return ValueEvents(self._load(field, "key"), *self.label_counts(field))

    def _field_folder(self, field: str) -> pathlib.Path:
        return self.folder / f"field_{self.fields.index(field)}" if field else self.folder

    def _load(self, field: str, name: str) -> np.ndarray:
        return np.load(self._field_folder(field) / f"{name}.npy", mmap_mode="r")

    def _blocks(
        self,
        shards: Sequence[pathlib.Path],
        items: pa.Array,
        values: np.ndarray,
        by_value: bool,
        every: int,
    ) -> Iterator[Rows]:
        """Time and value, or value and time, as one number, and labels as another."""
        columns = ["time", "item", *(f"label_{name}" for name in self.labels)]
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    some = batch.take(pa.array(np.arange(0, batch.num_rows, every)))
                    time = some["time"].to_numpy().astype(np.uint64)
                    item = positions(some["item"], items)
                    if (item < 0).any():
                        raise ValueError(f"{shard} has an item that is none of the log")
                    value = values[item].astype(np.uint64)
                    first, second = (value, time) if by_value else (time, value)
                    yield first << _HALF | second, self._code(some)

    def _code(self, events: pa.RecordBatch) -> np.ndarray:
        """The labels of each event, two bits for each task."""
        code = np.zeros(events.num_rows, np.uint64)
        for k, name in enumerate(self.labels):
            label = events[f"label_{name}"].fill_null(-1).to_numpy(zero_copy_only=False)
            code |= (label + 1).astype(np.uint64) << np.uint64(2 * k)
        return code

    def _write_arrays(
        self, folder: pathlib.Path, by_value: bool, sorted_rows: Iterator[Rows]
    ) -> None:
        size, tasks = self.num_events, range(len(self.labels))
        arrays = {"key": np.uint64} if by_value else {"time": np.uint32, "item": np.int32}
        counts = {f"{what}_{k}": 0 for what in ("positive", "known") for k in tasks}
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(_array_file(folder / f"{name}.npy", dtype, length))
                for name, dtype, length in (
                    *((name, dtype, size) for name, dtype in arrays.items()),
                    *((name, np.int32, size + 1) for name in counts),
                )
            }
            for name in counts:
                files[name].write(np.zeros(1, np.int32).data)
            rows = 0
            for key, code in sorted_rows:
                found = (
                    {"key": key}
                    if by_value
                    else {
                        "time": (key >> _HALF).astype(np.uint32),
                        "item": (key & _LOW).astype(np.int32),
                    }
                )
                for k in tasks:
                    label = code >> np.uint64(2 * k) & np.uint64(3)
                    for what, flags in (("positive", label == 2), ("known", label > 0)):
                        name = f"{what}_{k}"
                        found[name] = cumulative(flags)[1:] + np.int32(counts[name])
                        counts[name] += int(np.count_nonzero(flags))
                for name, values in found.items():
                    files[name].write(values.data)
                rows += len(key)
        if rows != size:
            raise ValueError(f"{folder}: {rows} events in the order wanted, {size} in the log")


def _array_file(path: pathlib.Path, dtype: Any, length: int) -> IO[bytes]:
    """An .npy file whose numbers are yet to be written; no mapping, whose pages count as memory."""
    file = open(path, "wb")  # noqa: SIM115
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file
