"""Prepares a generated log of interactions: time, memory and disk, with or without kills.

python -m stca_jax.experiments.benchmarks.preparation --events=100_000_000 --folder=DIR [--kills=3]
    [--json=FILE]

Users' histories have Zipf-like lengths up to 10,000.  Every event is an impression, eight to a
request, with one label.  A killed preparation (SIGKILL) is started again until it is done.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from tqdm import tqdm

from stca_jax.experiments import launch

_EVENTS = flags.DEFINE_string("events", "1_000_000", "Events of the log.")
_FOLDER = flags.DEFINE_string("folder", None, "Where log and dataset go.", required=True)
_KILLS = flags.DEFINE_integer("kills", 0, "How often to kill the preparation, evenly in time.")
_KILL_SECONDS = flags.DEFINE_float("kill_seconds", 30.0, "Seconds to the next kill.")
_JSON = flags.DEFINE_string("json", None, "File to append the result to.")
_ROWS_PER_FILE = 2_000_000
_PER_REQUEST = 8
_LONGEST = 10_000


def main() -> None:
    """Generates the log if it is not there, prepares it, prints one JSON line."""
    num_events = int(_EVENTS.value.replace("_", ""))
    folder = launch.local_path("folder", _FOLDER.value)
    log, data_dir = folder / f"log-{num_events}", folder / "prepared"
    if not log.exists():
        write_log(log, num_events)
    shutil.rmtree(data_dir, ignore_errors=True)
    started = time.perf_counter()
    for _ in range(_KILLS.value):
        process = start(log, data_dir)
        try:
            process.wait(_KILL_SECONDS.value)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if status := start(log, data_dir).wait():
        sys.exit(f"the preparation failed with status {status}")
    (prepared,) = data_dir.glob("interaction_log/benchmark/*/")
    result = {
        "benchmark": "preparation",
        "events": num_events,
        "kills": _KILLS.value,
        "seconds": round(time.perf_counter() - started, 1),
        # Linux counts in KiB, and keeps the largest of all child processes.
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "log_mb": _megabytes(log.glob("*.parquet")),
        "record_mb": _megabytes(prepared.glob("*array_record*")),
        "left_behind": sorted(p.name for p in prepared.parent.iterdir() if p != prepared),
    }
    print(json.dumps(result))
    if _JSON.value:
        with open(_JSON.value, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"results are in {_JSON.value}")


def start(log: pathlib.Path, data_dir: pathlib.Path) -> subprocess.Popen:
    """The preparation, as a user runs it."""
    options = {"dataset": "interaction_log", "name": "benchmark", "log": log,
               "data_dir": data_dir, "labels": "click", "request_id": "request_id",
               "history_features": "action"}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "stca_jax.experiments.prepare", *arguments],
        stdout=subprocess.DEVNULL,
    )


def write_log(folder: pathlib.Path, num_events: int) -> None:
    """Writes Parquet files in order of time, as a service would."""
    rng = np.random.default_rng(0)
    lengths = zipf_lengths(rng, num_events)
    num_items = max(100, num_events // 50)
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_requests = num_events // _PER_REQUEST
    request_user = rng.permutation(np.repeat(np.arange(len(lengths)), -(-lengths // _PER_REQUEST)))[
        :num_requests
    ]
    per_file = _ROWS_PER_FILE // _PER_REQUEST
    for i in tqdm(range(0, num_requests, per_file), desc="Generating", unit="file", disable=None):
        request = np.repeat(np.arange(i, min(i + per_file, num_requests)), _PER_REQUEST)
        size = len(request)
        item = (num_items * rng.random(size) ** 3).astype(np.int64)
        table = {
            "user_id": request_user[request] * 7 + 3,
            "item_id": item * 11 + 5,
            "timestamp": 1_700_000_000_000 + request * (8_640_000_000 // num_requests),
            "request_id": request,
            "action": pa.array(rng.choice(["view", "like", "share"], size, p=[0.8, 0.15, 0.05])),
            "click": (rng.random(size) < 0.1 + 0.2 * (item % 3 == 0)).astype(np.int8),
        }
        pq.write_table(pa.table(table), unfinished / f"{i // per_file:05d}.parquet")
    unfinished.rename(folder)


def zipf_lengths(rng: np.random.Generator, num_events: int) -> np.ndarray:
    """Lengths from 8 to 10,000, of density 1 / length, that add up to more than `num_events`."""
    mean = (_LONGEST - _PER_REQUEST) / np.log(_LONGEST / _PER_REQUEST)
    size = int(1.1 * num_events / mean) + 10
    return np.exp(rng.uniform(np.log(_PER_REQUEST), np.log(_LONGEST), size)).astype(np.int64)


def _megabytes(paths) -> float:
    return round(sum(p.stat().st_size for p in paths) / 1e6, 1)


if __name__ == "__main__":
    launch.run(main, when_interrupted="the log is kept if it was whole; the same command goes on")
