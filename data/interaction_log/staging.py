"""Prepares a log on one machine, in steps that a restart does not repeat.

    staging/
      parts/00003/       shard-00017.parquet …   events of one part of the log, by shard
                         rejected.csv reasons.json
      shards/            00017.parquet           events of one shard, sorted, each once
                         00017.json              its statistics: it is whole
                         00017.counts            how often each value occurs in training
      records/           00017.array_record      (written by data.base)

A part or a shard that has its last file is whole.  Memory holds a block of rows, or a shard.
"""

from __future__ import annotations

import collections
import contextlib
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

from stca_jax.data.interaction_log.events import DUPLICATE, LogSource, group_events, read_events
from stca_jax.data.interaction_log.records import Plan, make_plan
from stca_jax.data.interaction_log.requests import Shard
from stca_jax.data.interaction_log.statistics import (
    ShardStatistics,
    ValueCounts,
    add_up,
    format_profile,
    split_times,
)
from stca_jax.data.running import Runner
from stca_jax.files import write_json


class Staging:
    """A log's events, sorted by user into shards that fit into memory.

    Attributes:
      source: The log.
      folder: Where everything lies; of this log and config only.
      statistics: Of each shard; None for one without events.
      total: Of all.
      reasons: How many rows were left out, by reason.
      times: Where validation and test begin, Unix seconds.
      counts: How often each value of each column occurs in training events.
    """

    def __init__(self, source: LogSource, folder: pathlib.Path, run: Runner):
        """Sorts the log, or what is left to do of it.

        Args:
          source: The log.
          folder: Created if missing.
          run: Runs the steps.

        Raises:
          UserError: a file is damaged, no row can be used, or a split has no requests.
        """
        self.source, self.folder = source, folder / source.fingerprint[:16]
        num_parts, num_shards = len(source.log.parts), source.log.num_shards
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        run("Reading the log", self.read_part, num_parts)
        self._gather_rejected(folder.parent / "rejected_rows.csv")
        run("Sorting by user", self.sort_shard, num_shards)
        described = [_read_json(self._shard_file(i, "json")) for i in range(num_shards)]
        self.statistics = [
            d["statistics"] and ShardStatistics.from_dict(d["statistics"]) for d in described
        ]
        self.total = add_up([s for s in self.statistics if s is not None])
        self.reasons = self._count_reasons(sum(d["duplicates"] for d in described))
        self.times = split_times(source, self.total)
        run("Counting values", self.count_values, num_shards)
        self.counts = self._add_up_counts()

    def shard(self, index: int) -> Shard:
        """Reads a shard's events."""
        table = pq.read_table(self._shard_file(index, "parquet"))
        return Shard(table.combine_chunks(), self.source.config)

    def plan(self) -> Plan:
        """Fits what the records need."""
        return make_plan(
            self.source, self.statistics, self.counts, self.total.first_time, self.times
        )

    def profile(self) -> str:
        """The log in numbers, for people."""
        num_items = len(self.counts.columns["item"])
        return format_profile(self.source, self.total, self.reasons, num_items, self.times)

    def read_part(self, index: int) -> None:
        """Splits the events of a part by shard."""
        folder = self._part_folder(index)
        if folder.exists():
            return
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        reasons: collections.Counter[str] = collections.Counter()
        with contextlib.ExitStack() as files:
            writers: dict[int, pq.ParquetWriter] = {}
            rejected = csv.writer(files.enter_context(open(unfinished / "rejected.csv", "w")))
            rejected.writerow(["reason", "file", "row", "content"])
            for events in read_events(self.source, self.source.log.parts[index]):
                for shard in np.unique(events.shard):
                    if shard not in writers:
                        file = unfinished / f"shard-{shard:05d}.parquet"
                        writer = pq.ParquetWriter(file, events.table.schema)
                        writers[shard] = files.enter_context(writer)
                    writers[shard].write_table(events.table.filter(pa.array(events.shard == shard)))
                rejected.writerows(events.rejected)
                reasons += events.reasons
        write_json(unfinished / "reasons.json", reasons)
        unfinished.rename(folder)

    def sort_shard(self, index: int) -> None:
        """Gathers a shard's events from all parts, and counts them."""
        done = self._shard_file(index, "json")
        pieces = sorted((self.folder / "parts").glob(f"*/shard-{index:05d}.parquet"))
        if not done.exists():
            duplicates, statistics = 0, None
            if pieces:
                tables = [pq.read_table(piece) for piece in pieces]
                events = group_events(tables, self.folder / f"temporary-{index:05d}")
                pq.write_table(events, self._shard_file(index, "parquet"))
                duplicates = sum(map(len, tables)) - len(events)
                statistics = ShardStatistics.of(Shard(events, self.source.config)).to_dict()
            write_json(done, {"duplicates": duplicates, "statistics": statistics})
        for piece in pieces:  # its events are in the shard now
            piece.unlink()

    def count_values(self, index: int) -> None:
        """Counts the values of a shard's training events."""
        path = self._shard_file(index, "counts")
        if self.statistics[index] is not None and not path.exists():
            unfinished = path.with_suffix(".unfinished")
            counts = ValueCounts.of(self.shard(index), self.times[0])
            unfinished.write_bytes(pickle.dumps(counts))
            unfinished.rename(path)

    def _add_up_counts(self) -> ValueCounts:
        full = (i for i, s in enumerate(self.statistics) if s is not None)
        counts = (pickle.loads(self._shard_file(i, "counts").read_bytes()) for i in full)
        return functools.reduce(operator.add, counts)

    def _count_reasons(self, duplicates: int) -> collections.Counter[str]:
        parts = range(len(self.source.log.parts))
        reasons = [_read_json(self._part_folder(i) / "reasons.json") for i in parts]
        total: collections.Counter[str] = sum(
            map(collections.Counter, reasons), collections.Counter()
        )
        return total + collections.Counter({DUPLICATE: duplicates})

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


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())
