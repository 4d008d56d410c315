"""Input: requests per second and core, bytes on disk, fill, and memory, against two common layouts.

    python -m experiments.benchmarks.input --json=input.jsonl

Logs: Complete Journey; synthetic users with Zipf-like lengths up to 10,000; synthetic requests of
10,000 earlier events each.  Layouts of the same requests:

    rows="request"       one record per user; requests packed into rows of fixed length
    rows="user"          the same records; requests of a user share the tokens of their windows
    padded               one history per request, in a row as long as the longest history
    per impression       one history per candidate, in such a row

Each measurement runs in its own process, on one core, for a few seconds after the first batch.
Copies of histories are written for a sample of requests only; bytes are per request.  The last two
layouts read and batch through the same code as the first two, so that only the layout differs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags

from data.base import UserData, UserDatasetBuilder
from data.preparation import default_data_dir, prepare
from data.synthetic_interests.generator import GeneratorConfig
from data.synthetic_interests.synthetic_interests_dataset_builder import (
    Builder as SyntheticInterests,
)
from data.synthetic_interests.synthetic_interests_dataset_builder import SyntheticInterestsConfig
from stca_jax.batch import RequestBatch
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.length import FixedLength
from stca_jax.input.pipeline import (
    Assembler,
    Fill,
    InputConfig,
    epoch_fill,
    make_input,
    select_requests,
)
from stca_jax.input.planning import BatchPlan, Planner, Position
from stca_jax.input.records import UserRecord

_DATA_DIR = flags.DEFINE_string("data_dir", str(default_data_dir()), "Prepared datasets.")
_LOGS = flags.DEFINE_multi_enum("log", None, ["complete_journey", "zipf", "10k"], "Default: all.")
_SAMPLE = flags.DEFINE_integer("sample", 100, "Requests whose histories are copied.", 1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time of each measurement.", 0.1)
_JSON = flags.DEFINE_string("json", None, "File to append one JSON object per line to.")


@dataclasses.dataclass(frozen=True)
class Log:
    """A dataset and the shape of its rows.

    Attributes:
      length: Most recent events that a request reads.
      row_length: L of packed rows.
      rows_per_batch: G of packed batches.
      min_history: Requests with fewer earlier events are left out.
      generator: Of synthetic users; None is Complete Journey.
    """

    length: int
    row_length: int
    rows_per_batch: int
    min_history: int = 0
    generator: GeneratorConfig | None = None


LOGS = {
    "complete_journey": Log(4_096, 4_096, 16),
    "zipf": Log(10_000, 16_384, 8, generator=GeneratorConfig(300, 64, 10_000)),
    "10k": Log(
        10_000, 20_000, 8, min_history=10_000,
        generator=GeneratorConfig(24, 20_000, 20_000, events_per_request=64),
    ),
}  # fmt: skip


class HistoryCopies(UserDatasetBuilder):
    """One record for each request or impression, with a copy of its history."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: RequestDataset, config: InputConfig, *, per_impression: bool,
                 data_dir: pathlib.Path):  # fmt: skip
        self._source = source
        self._requests = select_requests(source.index, config)
        self._length = config.length.longest
        self._per_impression = per_impression
        super().__init__(data_dir=data_dir)

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Those of the source."""
        schema = self._source.schema
        return {n: getattr(schema, n) for n in ("history", "target", "request", "tasks")}

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """One shard."""
        size = (
            int(self._requests.num_targets.sum()) if self._per_impression else len(self._requests)
        )
        return UserData(self._source.schema, 0, 0, 0, size, shards=[self._copies])

    def _copies(self) -> Iterator[UserRecord]:
        count = itertools.count()
        for record_index, k in zip(self._requests.record, self._requests.position, strict=True):
            record = self._source.record(int(record_index))
            first, last = record.target_offset[k : k + 2]
            bounds = [(t, t + 1) for t in range(first, last)]
            for a, b in bounds if self._per_impression else [(first, last)]:
                yield _cut(record, k, a, b, self._length, next(count))


def _cut(record: UserRecord, k: int, a: int, b: int, length: int, number: int) -> UserRecord:
    """Request k with its targets [a, b) and its history, as a record of its own."""
    end = record.history_end[k]
    events, request, targets = slice(max(0, end - length), end), slice(k, k + 1), slice(a, b)
    return UserRecord(
        user_id=number,
        event_time=record.event_time[events],
        history={n: v[events] for n, v in record.history.items()},
        request_id=np.array([number]),
        request_time=record.request_time[request],
        request_split=record.request_split[request],
        history_end=np.array([len(record.event_time[events])]),
        target_offset=np.array([0, b - a]),
        request={n: v[request] for n, v in record.request.items()},
        target={n: v[targets] for n, v in record.target.items()},
        label=record.label[targets],
    )


def one_request_per_row(
    dataset: RequestDataset, config: InputConfig
) -> Iterator[tuple[RequestBatch, Fill]]:
    """Batches without packing."""
    planner = Planner(dataset.index, config)
    assembler = Assembler(dataset, planner, slice(None))
    for epoch in itertools.count():
        units = planner.units(epoch)
        for first in range(0, len(units.tokens), config.rows_per_batch):
            last = min(first + config.rows_per_batch, len(units.tokens))
            rows = [[unit] for unit in range(first, last)]
            yield assembler(BatchPlan(units, rows, Position()))[:2]


def measure(
    folder: pathlib.Path, config: InputConfig, packed: bool, seconds: float
) -> dict[str, float]:
    """Targets and processor time of the batches made in so many seconds, and the peak memory."""
    dataset = RequestDataset(folder)
    batches: Iterator[Any] = (
        make_input(dataset, config) if packed else one_request_per_row(dataset, config)
    )
    next(batches)
    targets, stop, start = 0, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < stop:
        targets += next(batches)[1].targets
    busy = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"targets_per_s": targets / busy, "rss_mib": peak}


def measure_reading(folder: pathlib.Path, seconds: float) -> dict[str, float]:
    """Records read and decoded per second, in random order."""
    dataset = RequestDataset(folder)
    order = np.random.default_rng(0).integers(0, len(dataset), 100_000).tolist()
    read, stop, start = 0, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < stop:
        dataset.record(order[read])
        read += 1
    return {"records_per_s": read / (time.process_time() - start)}


def run_alone(function: Any, *arguments: Any) -> dict[str, float]:
    """Calls it in a fresh process, so that peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def size_on_disk(folder: pathlib.Path) -> int:
    """Bytes of the record files."""
    return sum(file.stat().st_size for file in folder.glob("*array_record*"))


def benchmark(name: str, data_dir: pathlib.Path, scratch: pathlib.Path) -> list[dict[str, Any]]:
    """One line for each layout."""
    log = LOGS[name]
    folder = prepare_log(name, log, data_dir)
    dataset = RequestDataset(folder)
    base = InputConfig(
        length=FixedLength(log.length), row_length=log.row_length, targets_per_row=10**6,
        rows_per_batch=log.rows_per_batch, min_history=log.min_history, num_threads=0,
    )  # fmt: skip
    requests = select_requests(dataset.index, base)
    mean_targets = requests.num_targets.mean()
    lines = []

    def add(layout: str, config: InputConfig, where: pathlib.Path, fill: Fill, stored: int) -> None:
        packed = layout.startswith("rows=")
        measured = run_alone(measure, where, config, packed, _SECONDS.value)
        line = {
            "benchmark": "input", "log": name, "layout": layout, "row_length": config.row_length,
            "targets_per_row": config.targets_per_row,
            "requests_per_s": measured["targets_per_s"] / mean_targets,
            "bytes_per_request": size_on_disk(where) / stored,
            **fill.metrics(), **measured,
        }  # fmt: skip
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})

    for rows in ("request", "user"):
        config = with_matching_slots(dataset, dataclasses.replace(base, rows=rows))
        add(f"rows={rows}", config, folder, epoch_fill(dataset, config), len(dataset.index))

    longest = int(np.minimum(requests.history_end, log.length).max())
    sample = dataclasses.replace(base, max_requests=_SAMPLE.value)
    copied = select_requests(dataset.index, sample)
    for layout, per_impression in (("padded", False), ("per impression", True)):
        builder = HistoryCopies(
            dataset, sample, per_impression=per_impression, data_dir=scratch / name / layout
        )
        builder.download_and_prepare()
        slots = 1 if per_impression else int(requests.num_targets.max())
        # As many token slots to a batch as the packed layouts have.
        size = max(1, log.rows_per_batch * log.row_length // longest)
        config = dataclasses.replace(
            base, row_length=longest, targets_per_row=slots, rows_per_batch=size, min_history=0
        )
        add(layout, config, builder.data_path, unpacked_fill(requests, config), len(copied))
    return lines


def with_matching_slots(dataset: RequestDataset, config: InputConfig) -> InputConfig:
    """The config with 8 % more target slots than fit the row's tokens on average."""
    fill = epoch_fill(dataset, config)
    slots = 1.08 * config.row_length * fill.targets / fill.tokens
    return dataclasses.replace(config, targets_per_row=max(8, round(slots)))


def unpacked_fill(requests: Any, config: InputConfig) -> Fill:
    """Fill of one request, or one impression, per row."""
    tokens = np.minimum(requests.history_end, config.row_length)
    copies = -(-requests.num_targets // config.targets_per_row)
    rows = int(copies.sum())
    return Fill(
        rows=rows, tokens=int((tokens * copies).sum()), targets=int(requests.num_targets.sum()),
        requests=rows, max_rows=rows, max_tokens=rows * config.row_length,
        max_targets=rows * config.targets_per_row,
    )  # fmt: skip


def prepare_log(name: str, log: Log, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the dataset, prepared on first use."""
    if log.generator is None:
        return prepare(name, data_dir)
    builder = SyntheticInterests(
        data_dir=data_dir,
        config=SyntheticInterestsConfig(name=f"benchmark_{name}", generator=log.generator),
    )
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def main(argv: Sequence[str]) -> None:
    """Runs the logs and prints a table for each."""
    del argv
    data_dir = pathlib.Path(_DATA_DIR.value)
    for name in _LOGS.value or LOGS:
        with tempfile.TemporaryDirectory() as scratch:
            lines = benchmark(name, data_dir, pathlib.Path(scratch))
            reading = run_alone(
                measure_reading, prepare_log(name, LOGS[name], data_dir), _SECONDS.value
            )
        print(f"\n{name}: {reading['records_per_s']:,.0f} user records read per second and core")
        print(f"{'layout':16}{'requests/s':>12}{'vs last':>9}{'token fill':>12}{'target fill':>13}"
              f"{'KB/request':>12}{'vs last':>9}{'RSS MiB':>9}")  # fmt: skip
        last = lines[-1]
        for line in lines:
            speed = line["requests_per_s"] / last["requests_per_s"]
            size = last["bytes_per_request"] / line["bytes_per_request"]
            print(f"{line['layout']:16}{line['requests_per_s']:12,.0f}{speed:8.1f}x"
                  f"{line['token_fill']:12.1%}{line['target_fill']:13.1%}"
                  f"{line['bytes_per_request'] / 1e3:12,.2f}{size:8.1f}x"
                  f"{line['rss_mib']:9,.0f}")  # fmt: skip
            line |= {"records_per_s": round(reading["records_per_s"]), "cores": os.cpu_count()}
        if _JSON.value:
            with open(_JSON.value, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    app.run(main)
