"""All events of a log in orders that shards do not have: by time, and by a field's value.

    stream/
      time.npy item.npy           every event in the order of time: Unix seconds, item's number
      positive_0.npy known_0.npy  of each task: how many of the first 0 … n had label 1, any label
      field_0/key.npy …           every event by a field's value and then by time; labels likewise
      00000.json …                a step is whole

DuckDB sorts, on disk where memory does not do; what reads the files maps them into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stca_jax.data.interaction_log.events import connect
from stca_jax.files import write_json
from stca_jax.input.trends import ValueEvents, cumulative

_ROWS = 1 << 20


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
        table = pa.table({"id": items, "value": pa.array(values, pa.uint64())})
        by = "time, value" if not step else "value, time"
        labels = [f"label_{k}" for k in range(len(self.labels))]
        with connect(folder / "temporary") as connection:
            connection.register("items", table)
            connection.register("events", _read_in_turn(shards, self.labels))
            read = ["e.time::UBIGINT AS time", "i.value AS value", *labels]
            found = connection.sql(
                f"SELECT {', '.join(read)} FROM events e JOIN items i ON e.item = i.id "
                f"ORDER BY {', '.join([by, *labels])}"
            )
            batches = found.to_arrow_reader(_ROWS)
            self._write_arrays(folder, bool(step), batches)
        shutil.rmtree(folder / "temporary", ignore_errors=True)
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

    def _write_arrays(self, folder: pathlib.Path, by_value: bool, batches: Any) -> None:
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
            for batch in batches:
                time, value = batch["time"].to_numpy(), batch["value"].to_numpy()
                found = (
                    {"key": value << np.uint64(32) | time}
                    if by_value
                    else {"time": time.astype(np.uint32), "item": value.astype(np.int32)}
                )
                for k in tasks:
                    label = batch[f"label_{k}"].fill_null(-1).to_numpy(zero_copy_only=False)
                    for what, flags in (("positive", label == 1), ("known", label >= 0)):
                        name = f"{what}_{k}"
                        found[name] = cumulative(flags)[1:] + np.int32(counts[name])
                        counts[name] += int(np.count_nonzero(flags))
                for name, values in found.items():
                    files[name].write(values.data)
                rows += batch.num_rows
        if rows != size:
            raise ValueError(f"{folder}: {rows} events in the order wanted, {size} in the log")


def _array_file(path: pathlib.Path, dtype: Any, length: int) -> IO[bytes]:
    """An .npy file whose numbers are yet to be written; no mapping, whose pages count as memory."""
    file = open(path, "wb")  # noqa: SIM115
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _read_in_turn(shards: Sequence[pathlib.Path], labels: Sequence[str]) -> pa.RecordBatchReader:
    """The events' time, item and label_0 …; DuckDB would open as many files as it has threads."""
    columns = ["time", "item", *(f"label_{name}" for name in labels)]
    types = pq.read_schema(shards[0])
    names = ["time", "item", *(f"label_{k}" for k in range(len(labels)))]
    schema = pa.schema([(n, types.field(c).type) for n, c in zip(names, columns, strict=True)])

    def batches() -> Iterator[pa.RecordBatch]:
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield pa.RecordBatch.from_arrays(
                        [batch[column] for column in columns], schema=schema
                    )

    return pa.RecordBatchReader.from_batches(schema, batches())
