"""Prepares a log on one machine, in steps that a restart does not repeat.

    staging/
      parts/00003/       shard-00017.parquet …   events of one part of the log, by shard
                         rejected.csv summary.json
      shards/            00017.parquet           events of one shard, sorted, each once
                         00017.sorted            its statistics: it is whole
                         00017.counts            its requests; values that occur in training
                         00017.targets           of some shards: how popular targets are
      stream/            time …                  all events by time, and by item: `event_stream`
      records/           00017.array_record      (written by data.base)

A part or a shard that has its last file is whole.  Memory holds some blocks of rows, or a shard.
"""

from __future__ import annotations

import collections
import csv
import functools
import json
import operator
import pathlib
import pickle
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stca_jax.data import request_building as rb
from stca_jax.data.interaction_log.coverage import check_features, check_side_tables
from stca_jax.data.interaction_log.event_stream import EventStream
from stca_jax.data.interaction_log.events import (
    DUPLICATE,
    LogSource,
    group_events,
    read_events,
    read_side_table,
)
from stca_jax.data.interaction_log.labels import check_classes, check_values
from stca_jax.data.interaction_log.odd_rows import PartSummary, check_events, check_rows
from stca_jax.data.interaction_log.plan import Plan, make_plan
from stca_jax.data.interaction_log.records import find_targets
from stca_jax.data.interaction_log.requests import Shard
from stca_jax.data.interaction_log.statistics import (
    ShardStatistics,
    ValueCounts,
    add_up,
    check_splits,
    format_profile,
    split_times,
)
from stca_jax.data.popularity import Counts, count_targets, describe
from stca_jax.data.running import Runner
from stca_jax.errors import UserError
from stca_jax.files import replacing, write_json

_SAMPLED_SHARDS = 8
_VERSION = 3  # of these files: change it where a restart must not go on with those of before
_BUFFERED_BYTES = 256 << 20  # of events of a part, before they go to their shards


class Staging:
    """A log's events, sorted by user into shards that fit into memory.

    Attributes:
      source: The log.
      folder: Where everything lies; of this log and config only.
      statistics: Of each shard; None for one without events.
      total: Of all.
      read: What was read of the log's files.
      reasons: How many rows were left out, by reason.
      times: Where validation and test begin, Unix seconds.
      counts: How often each value of each column occurs in training events.
      side_tables: "items" and "users", where there are.
      coverage: Of each feature and side table, what of it reaches the model.
      warnings: What people should know before they train.
    """

    def __init__(self, source: LogSource, folder: pathlib.Path, run: Runner):
        """Sorts the log, or what is left to do of it.

        Args:
          source: The log.
          folder: Created if missing.
          run: Runs the steps.

        Raises:
          UserError: a file is damaged, no row can be used or too many are odd, or a split has no
            requests.
        """
        self.source, self.folder = source, folder / f"{source.fingerprint[:16]}-{_VERSION}"
        self._rejected = folder.parent / "rejected_rows.csv"
        for other in folder.glob("*"):  # of the log as it was, or was described, before
            if other != self.folder:
                shutil.rmtree(other)
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        try:
            self._sort(run)
            self._check()
            self._count(run)
        except UserError:
            self.discard()
            raise

    def _sort(self, run: Runner) -> None:
        source = self.source
        num_parts, num_shards = len(source.log.parts), source.log.num_shards
        run("Reading the log", self.read_part, num_parts)
        self._gather_rejected(self._rejected)
        self.read = self._add_up_parts()
        check_values(source, self.read.reasons)
        check_rows(source, self.read, self._rejected)
        run("Sorting by user", self.sort_shard, num_shards)
        shards = [_unpickle(self._shard_file(i, "sorted")) for i in range(num_shards)]
        self.statistics: list[ShardStatistics | None] = [statistics for _, statistics in shards]
        self.total = add_up([s for s in self.statistics if s is not None])
        duplicates = sum(number for number, _ in shards)
        self.reasons = self.read.reasons + collections.Counter({DUPLICATE: duplicates})
        check_events(source, duplicates, self.total.log_length)
        self.times = split_times(source, self.total)
        run("Counting values", self.count_values, num_shards)
        self.counts = self._add_up_counts()
        self.total = add_up([s for s in self.statistics if s is not None])

    def _check(self) -> None:
        """Looks for what cannot be meant, and gathers what the profile says of it."""
        source = self.source
        self.warnings = [
            *check_splits(source, self.total, self.times),
            *check_classes(source, self.total, self.counts),
        ]
        self.coverage = check_features(source, self.counts)
        self.side_tables = {
            what: read_side_table(source, what)
            for what in ("items", "users")
            if getattr(source, what) is not None
        }
        lines, warnings = check_side_tables(source, self.counts, self.side_tables)
        self.coverage += lines
        self.warnings += warnings

    def _count(self, run: Runner) -> None:
        """What targets are sampled by, and how they are distributed."""
        self.stream = self._make_stream()
        if self.stream is not None:
            run("Ordering events by time", self.order_events, 1)
            run("Ordering events by value", self.order_by_value, len(self.stream.fields))
        run("Counting targets", self.count_targets, len(self._sampled))

    def discard(self) -> None:
        """Removes the sorted log; rejected rows stay, if there are any."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        if self._rejected.exists():
            with open(self._rejected, "rb") as file:
                is_empty = not file.readline() or not file.readline()
            if is_empty:
                self._rejected.unlink()

    def shard(self, index: int) -> Shard:
        """Reads a shard's events."""
        table = pq.read_table(self._shard_file(index, "parquet"))
        return Shard(table.combine_chunks(), self.source.config, self.times)

    def user_ids(self) -> pa.Array:
        """Every user of the log, in the order of the records."""
        files = (self._shard_file(i, "parquet") for i in self._shards)
        columns = (pq.read_table(file, columns=["user"]) for file in files)
        return pa.concat_arrays([c["user"].combine_chunks().unique() for c in columns])

    @functools.cached_property
    def plan(self) -> Plan:
        """What the records need."""
        return make_plan(
            self.source,
            self.statistics,
            self.counts,
            self.side_tables,
            self.total.first_time,
            self.times,
            self.stream,
        )

    def profile(self) -> str:
        """The log in numbers, for people."""
        num_items = len(self.counts.columns["item"])
        text = format_profile(
            self.source, self.read, self.total, self.reasons, num_items, self.times
        )
        lines = [*self._popularity(), *self.coverage]
        features = [f"{name}: {line}" for name, line in lines]
        return "\n".join([text, *features, *(f"warning: {warning}" for warning in self.warnings)])

    def read_part(self, index: int) -> None:
        """Splits the events of a part by shard."""
        folder = self._part_folder(index)
        if folder.exists():
            return
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        summary, part = PartSummary(), self.source.log.parts[index]
        buffered = _ShardBuffer(unfinished)
        with open(unfinished / "rejected.csv", "w", newline="") as file:
            rejected = csv.writer(file, lineterminator="\n")
            rejected.writerow(["reason", "file", "row", "content"])
            for events in read_events(self.source, part):
                summary.add(events, part.file)
                buffered.add(events.table, events.shard)
                rejected.writerows(events.rejected)
        buffered.flush()
        write_json(unfinished / "summary.json", summary.to_dict())
        unfinished.rename(folder)

    def sort_shard(self, index: int) -> None:
        """Gathers a shard's events from all parts, and counts them."""
        done = self._shard_file(index, "sorted")
        pieces = sorted((self.folder / "parts").glob(f"*/shard-{index:05d}-*.parquet"))
        if not done.exists():
            duplicates, statistics = 0, None
            if pieces:
                tables = [pq.read_table(piece) for piece in pieces]
                temporary = self.folder / f"temporary-{index:05d}"
                events = group_events(tables, temporary)
                shutil.rmtree(temporary, ignore_errors=True)
                pq.write_table(events, self._shard_file(index, "parquet"))
                duplicates = sum(map(len, tables)) - len(events)
                statistics = ShardStatistics.of(Shard(events, self.source.config))
            _pickle(done, (duplicates, statistics))
        for piece in pieces:  # its events are in the shard now
            piece.unlink()

    def count_values(self, index: int) -> None:
        """Counts a shard's requests, and the values of its training events."""
        path, statistics = self._shard_file(index, "counts"), self.statistics[index]
        if statistics is not None and not path.exists():
            shard = self.shard(index)
            _pickle(path, (ValueCounts.of(shard, self.times), statistics.with_requests(shard)))

    def order_events(self, _: int) -> None:
        """Puts the events of all shards in the order of time."""
        assert self.stream is not None
        shards = [self._shard_file(i, "parquet") for i in self._shards]
        self.stream.write_by_time(shards, self.plan.items)

    def order_by_value(self, index: int) -> None:
        """Puts them in the order of a field."""
        assert self.stream is not None
        items = np.arange(len(self.plan.items))
        field = self.stream.fields[index]
        self.stream.write_by_value(field, self.plan.trend_values(items)[field])

    def count_targets(self, index: int) -> None:
        """Counts some shard's targets by label and popularity."""
        shard = self._sampled[index]
        path = self._shard_file(shard, "targets")
        if path.exists():
            return
        plan, events = self.plan, self.shard(shard)
        targets, label = find_targets(plan, events)
        split = rb.time_split(events.requests.time, plan.validation_start, plan.test_start)
        found = count_targets(split[targets.request], label, plan.item_count[targets.item])
        write_json(path, [[*key, number] for key, number in sorted(found.items())])

    def _popularity(self) -> list[tuple[str, str]]:
        counts: Counts = collections.Counter()
        for shard in self._sampled:
            for *key, number in _read_json(self._shard_file(shard, "targets")):
                counts[tuple(key)] += number
        return describe(counts, self.source.config.feature_names["tasks"])

    def _make_stream(self) -> EventStream | None:
        config = self.source.config
        if not config.trend_windows and (config.labels or config.sampling == "training"):
            return None
        return EventStream(
            self.folder / "stream",
            config.trends_of if config.trend_windows else (),
            tuple(c.name for c in config.feature_columns["label"]),
            self.total.num_events,
        )

    @property
    def _shards(self) -> list[int]:
        """Those that have events."""
        return [i for i, found in enumerate(self.statistics) if found is not None]

    @property
    def _sampled(self) -> list[int]:
        """Shards enough to know how popular targets are."""
        return self._shards[:: -(-len(self._shards) // _SAMPLED_SHARDS)]

    def _add_up_counts(self) -> ValueCounts:
        """Of all shards; keeps the statistics that were counted with them."""
        total: ValueCounts | None = None
        for i in (i for i, s in enumerate(self.statistics) if s is not None):
            counts, self.statistics[i] = _unpickle(self._shard_file(i, "counts"))
            total = counts if total is None else total + counts
        assert total is not None
        return total

    def _add_up_parts(self) -> PartSummary:
        parts = range(len(self.source.log.parts))
        read = (_read_json(self._part_folder(i) / "summary.json") for i in parts)
        return functools.reduce(operator.add, map(PartSummary.from_dict, read))

    def _gather_rejected(self, path: pathlib.Path) -> None:
        """Puts the rejected rows of all parts into one CSV file."""
        with open(path, "wb") as output:
            for index in range(len(self.source.log.parts)):
                with open(self._part_folder(index) / "rejected.csv", "rb") as part:
                    header = part.readline()
                    if not index:
                        output.write(header)
                    shutil.copyfileobj(part, output)

    def _part_folder(self, index: int) -> pathlib.Path:
        return self.folder / "parts" / f"{index:05d}"

    def _shard_file(self, index: int, suffix: str) -> pathlib.Path:
        return self.folder / "shards" / f"{index:05d}.{suffix}"


class _ShardBuffer:
    """Events on their way into shards: few files, and none of them open for long."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._tables: dict[int, list[pa.Table]] = {}
        self._bytes, self._num_flushed = 0, 0

    def add(self, table: pa.Table, shard: np.ndarray) -> None:
        """Adds events, and the shard of each."""
        if not len(table):
            return
        order = np.argsort(shard, kind="stable")
        table, shard = table.take(pa.array(order)).combine_chunks(), shard[order]
        begins = np.flatnonzero(np.diff(shard, prepend=-1))
        for begin, end in zip(begins, [*begins[1:], len(shard)], strict=True):
            pieces = self._tables.setdefault(int(shard[begin]), [])
            pieces.append(table.slice(begin, end - begin))
        self._bytes += table.nbytes
        if self._bytes > _BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is buffered: shard-SHARD-TIME.parquet."""
        for shard, pieces in self._tables.items():
            file = self._folder / f"shard-{shard:05d}-{self._num_flushed:05d}.parquet"
            pq.write_table(pa.concat_tables(pieces), file)
        self._num_flushed += 1
        self._tables, self._bytes = {}, 0


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def _pickle(path: pathlib.Path, value: Any) -> None:
    """Writes a file of this preparation's own, which may be large, whole or not at all."""
    with replacing(path) as file:
        pickle.dump(value, file)


def _unpickle(path: pathlib.Path) -> Any:
    return pickle.loads(path.read_bytes())
