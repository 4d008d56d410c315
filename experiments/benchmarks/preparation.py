"""Prepares a generated log of interactions: time, memory and disk, with trends and with kills.

python -m stca_jax.experiments.benchmarks.preparation --events=100_000_000 --folder=DIR
    [--runs=plain --runs=trends --runs=killed] [--kills=2 --kill_steps=80] [--json=FILE]

Users' histories have Zipf-like lengths up to 10,000.  Every event is an impression, eight to a
request, with one label; the log spans 100 days.  Trends are the items', in four windows.  A killed
preparation (SIGKILL) is one with trends, started again until it is done; its files must be those
of the run that was not killed, if that is among the runs.

Exit status: 0, or 1 if a preparation fails or its files differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from tqdm import tqdm

from stca_jax.experiments import launch

_RUNS = ("plain", "trends", "killed")
_EVENTS = flags.DEFINE_string("events", "1_000_000", "Events of the log.")
_FOLDER = flags.DEFINE_string("folder", None, "Where log and dataset go.", required=True)
_RUNS_FLAG = flags.DEFINE_multi_enum("runs", ["plain"], _RUNS, "What to measure; repeatable.")
_WINDOWS = flags.DEFINE_string("windows", "1d,7d,28d,91d", "Of trends.")
_KILLS = flags.DEFINE_integer("kills", 2, "How often to kill a run that is to be killed.")
_KILL_STEPS = flags.DEFINE_integer("kill_steps", 2, "Steps that a start ends before its kill.")
_JSON = flags.DEFINE_string("json", None, "File to append the results to.")
_ROWS_PER_FILE = 2_000_000
_PER_REQUEST = 8
_LONGEST = 10_000
_POLL = 0.2  # seconds between looks at a running preparation


def main() -> None:
    """Generates the log if it is not there, prepares it, prints one JSON line per run."""
    num_events = int(_EVENTS.value.replace("_", ""))
    folder = launch.local_path("folder", _FOLDER.value)
    log = folder / f"log-{num_events}"
    if not log.exists():
        write_log(log, num_events)
    results: dict[str, dict[str, Any]] = {}
    for run in _RUNS_FLAG.value:
        results[run] = {"benchmark": "preparation", "run": run, "events": num_events}
        results[run] |= measure(run, log, folder / "prepared")
        print(json.dumps(results[run]), flush=True)
        if _JSON.value:
            with open(_JSON.value, "a") as file:
                file.write(json.dumps(results[run]) + "\n")
    if "plain" in results:
        for run in results:
            ratio = {k: results[run][k] / results["plain"][k] for k in _COMPARED}
            print(run, *(f"{k} x {v:.2f}" for k, v in ratio.items()))
    if {"trends", "killed"} <= results.keys():
        if results["trends"]["sha256"] != results["killed"]["sha256"]:
            sys.exit("the killed preparation has made other files")
        print("killed and not: the same files, byte for byte")


_COMPARED = ("cpu_seconds", "seconds", "peak_rss_gib", "peak_anonymous_gib")


@dataclasses.dataclass
class Usage:
    """What the processes of a run have used.

    Attributes:
      cpu_seconds: User and system time of all.
      peak_rss: The largest resident memory of any, with pages of mapped files, in KiB.
      peak_anonymous: Likewise, without them, as seen five times a second.
    """

    cpu_seconds: float = 0.0
    peak_rss: int = 0
    peak_anonymous: int = 0


def measure(run: str, log: pathlib.Path, data_dir: pathlib.Path) -> dict[str, Any]:
    """Prepares the log once, and says what it took and what came out."""
    shutil.rmtree(data_dir, ignore_errors=True)
    started, usage, killed_at = time.perf_counter(), Usage(), []
    for _ in range(_KILLS.value if run == "killed" else 0):
        if not attempt(run, log, data_dir, usage, _KILL_STEPS.value):
            killed_at.append(progress(data_dir))
    attempt(run, log, data_dir, usage)
    seconds = time.perf_counter() - started
    (prepared,) = data_dir.glob("interaction_log/benchmark/*/")
    return {
        "killed_at": killed_at,
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(usage.peak_rss / 2**20, 2),
        "peak_anonymous_gib": round(usage.peak_anonymous / 2**20, 2),
        "log_mb": _megabytes(log.glob("*.parquet")),
        "record_mb": _megabytes(prepared.glob("*array_record*")),
        "features_mb": _megabytes(prepared.glob("features/*")),
        "left_behind": sorted(p.name for p in prepared.parent.iterdir() if p != prepared),
        "sha256": digest(prepared),
    }


def attempt(
    run: str, log: pathlib.Path, data_dir: pathlib.Path, usage: Usage, steps: float = float("inf")
) -> bool:
    """Whether the preparation, as a user runs it, ended before it was killed after some steps."""
    options = {"dataset": "interaction_log", "name": "benchmark", "log": log,
               "data_dir": data_dir, "labels": "click", "request_id": "request_id",
               "history_features": "action"}  # fmt: skip
    if run != "plain":
        options["item_trends"] = _WINDOWS.value
    arguments = [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "stca_jax.experiments.prepare", *arguments],
        stdout=subprocess.DEVNULL,
    )
    status = pathlib.Path(f"/proc/{process.pid}/status")
    before = sum(progress(data_dir).values())
    while True:
        pid, ended, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        anonymous = [line for line in status.read_text().splitlines() if "RssAnon" in line]
        usage.peak_anonymous = max([usage.peak_anonymous, *(int(a.split()[1]) for a in anonymous)])
        if sum(progress(data_dir).values()) >= before + steps:
            process.kill()
        time.sleep(_POLL)
    process.returncode = code = os.waitstatus_to_exitcode(ended)
    usage.cpu_seconds += used.ru_utime + used.ru_stime
    usage.peak_rss = max(usage.peak_rss, used.ru_maxrss)  # Linux counts in KiB
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"the preparation failed with status {code}")
    return code == 0


def progress(data_dir: pathlib.Path) -> dict[str, int]:
    """How many steps of each kind are whole."""
    kinds = {"parts": "parts/[0-9]*", "shards": "shards/*.sorted", "counts": "shards/*.counts",
             "orders": "stream/*.json", "records": "records/*.json"}  # fmt: skip
    return {
        kind: len(list(data_dir.glob(f"interaction_log/benchmark/staging/*/{pattern}")))
        for kind, pattern in kinds.items()
    }


def digest(folder: pathlib.Path) -> str:
    """SHA-256 of all files below a folder, names and contents, but for the cache of requests."""
    total = hashlib.sha256()
    # The cache notes when the record files were written.
    files = {p for p in folder.rglob("*") if p.is_file()} - {folder / "request_index.npz"}
    for path in sorted(files):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


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
