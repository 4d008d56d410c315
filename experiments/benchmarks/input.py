"""Input: requests per second and core, bytes on disk, fill, and memory, against two common layouts.

    python -m stca_jax.experiments.benchmarks.input --json=input.jsonl

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
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from stca_jax.batch import RequestBatch
from stca_jax.data.base import UserDatasetBuilder
from stca_jax.data.preparation import prepare
from stca_jax.data.synthetic_interests.generator import GeneratorConfig
from stca_jax.data.synthetic_interests.synthetic_interests_dataset_builder import (
    Builder as SyntheticInterests,
)
from stca_jax.data.synthetic_interests.synthetic_interests_dataset_builder import (
    SyntheticInterestsConfig,
)
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks.history_copies import HistoryCopies
from stca_jax.files import cache_dir
from stca_jax.input.assembly import Assembler, Fill
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.length import FixedLength
from stca_jax.input.pipeline import epoch_fill, make_input
from stca_jax.input.planning import BatchPlan, InputConfig, Planner, Position, select_requests

_LOGS = flags.DEFINE_multi_enum(
    "log", None, ["complete_journey", "zipf", "10k"], "Logs to measure; by default all."
)
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
      split: Whose requests are read.
      min_history: Requests with fewer earlier events are left out.
      generator: Of synthetic users; None is Complete Journey.
    """

    length: int
    row_length: int
    rows_per_batch: int
    split: str = "train"
    min_history: int = 0
    generator: GeneratorConfig | None = None


LOGS = {
    "complete_journey": Log(4_096, 4_096, 16),
    "zipf": Log(
        10_000, 32_768, 8,
        generator=GeneratorConfig(num_users=300, min_events=64, max_events=10_000),
    ),
    "10k": Log(
        10_000, 21_000, 8, split="test", min_history=10_000,
        generator=GeneratorConfig(num_users=200, min_events=10_500, max_events=10_500),
    ),
}  # fmt: skip


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
    return {"targets_per_s": targets / busy, "rss_mib": peak_memory()}


def peak_memory() -> float:
    """MiB of resident memory that this process had at most.

    `getrusage` would count what its parent had when it started this process.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


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
    """One line for each layout of a log."""
    log = LOGS[name]
    folder = prepare_log(name, log, data_dir)
    dataset = RequestDataset(folder)
    config = InputConfig(
        length=FixedLength(log.length), row_length=log.row_length, targets_per_row=10**6,
        rows_per_batch=log.rows_per_batch, split=log.split, min_history=log.min_history,
        num_threads=0,
    )  # fmt: skip
    requests = select_requests(dataset.index, config)
    reading = run_alone(measure_reading, folder, _SECONDS.value)
    lines = []

    def add(layout: str, config: InputConfig, where: pathlib.Path, fill: Fill, stored: int) -> None:
        packed = where == folder
        measured = run_alone(measure, where, config, packed, _SECONDS.value)
        line = {
            "benchmark": "input", "log": name, "layout": layout, "row_length": config.row_length,
            "targets_per_row": config.targets_per_row,
            "requests_per_s": measured["targets_per_s"] / requests.num_targets.mean(),
            "bytes_per_request": size_on_disk(where) / stored,
            **fill.metrics(), **measured, **reading,
        }  # fmt: skip
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})

    by_user = dataclasses.replace(config, rows="user", targets_per_chunk=64)
    for packing in (config, by_user):
        packing = with_matching_slots(dataset, packing)
        add(
            f"rows={packing.rows}",
            packing,
            folder,
            epoch_fill(dataset, packing),
            len(dataset.index),
        )

    longest = int(np.minimum(requests.history_end, log.length).max())
    sample = dataclasses.replace(config, max_requests=_SAMPLE.value)
    num_copied = len(select_requests(dataset.index, sample))
    # A batch has as many token slots as in the packed layouts.
    rows_per_batch = max(1, log.rows_per_batch * log.row_length // longest)
    for layout, per_impression in (("padded", False), ("per impression", True)):
        copies = HistoryCopies(
            dataset, sample, per_impression=per_impression, data_dir=scratch / name / layout
        )
        padding = dataclasses.replace(
            config, length=FixedLength(longest), row_length=longest, min_history=0,
            targets_per_row=1 if per_impression else int(requests.num_targets.max()),
            rows_per_batch=rows_per_batch,
        )  # fmt: skip
        add(layout, padding, build(copies), unpacked_fill(requests, padding), num_copied)
    return lines


def with_matching_slots(dataset: RequestDataset, config: InputConfig) -> InputConfig:
    """The config with about 8 % more target slots than go with a row's tokens."""
    fill = epoch_fill(dataset, config)
    slots = 1.08 * config.row_length * fill.targets / fill.tokens
    return dataclasses.replace(config, targets_per_row=16 * max(1, round(slots / 16)))


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
    return build(builder)


def build(builder: UserDatasetBuilder) -> pathlib.Path:
    """The folder of the builder's dataset, prepared if it is not there yet."""
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def main() -> None:
    """Runs the logs and prints a table for each."""
    data_dir = pathlib.Path(launch.DATA_DIR.value or cache_dir())
    for name in _LOGS.value or LOGS:
        with tempfile.TemporaryDirectory() as scratch:
            lines = benchmark(name, data_dir, pathlib.Path(scratch))
        print_table(name, lines)
        if _JSON.value:
            with open(_JSON.value, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    if _JSON.value:
        print(f"results are in {_JSON.value}")


def print_table(name: str, lines: Sequence[dict[str, Any]]) -> None:
    """Prints each layout beside the last one, a history per impression."""
    last = lines[-1]
    print(f"\n{name}: {last['records_per_s']:,.0f} user records read per second and core")
    print(f"{'layout':16}{'requests/s':>11}{'':8}{'KB/request':>11}{'':8}"
          f"{'token fill':>11}{'target fill':>12}{'RSS MiB':>9}")  # fmt: skip
    for line in lines:
        speed = line["requests_per_s"] / last["requests_per_s"]
        size = last["bytes_per_request"] / line["bytes_per_request"]
        print(f"{line['layout']:16}{line['requests_per_s']:11,.0f}{speed:7.1f}x"
              f"{line['bytes_per_request'] / 1e3:11,.2f}{f'1/{size:.0f}':>8}"
              f"{line['token_fill']:11.1%}{line['target_fill']:12.1%}"
              f"{line['rss_mib']:9,.0f}")  # fmt: skip


if __name__ == "__main__":
    launch.run(main)
