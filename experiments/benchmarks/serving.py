r"""What serving costs on one core, against a floor measured in the same run; and its exactness.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python -m stca_jax.experiments.benchmarks.serving --workdir=DIR [--max_history=10240]
        [--requests=10000] [--seconds=3] [--load_seconds=600 --loads=0.7] [--output=DIR]

Exports the run twice, cached and uncached, and times, for a user of --max_history events drawn at
random: scoring 1, 100 and 1,000 candidates, NumPy in and probabilities out, uncached as well; an
append; and encoding a whole history. The floor is the attention's and the target side's products at
the peak rate of products, and one exponential for each target, event, head and layer at its own
rate, both measured here. Times are CPU time of this process, the fastest repetition.

With --load_seconds, a server of its own is started twice, and asked over HTTP: the first and the
second score of every user, what HTTP adds to a score, and an open-loop load of Zipf's users, with
appends among the scores, for shares (--loads) of the load that saturates it, so many seconds each.
2,048 candidates are the shape of MLPerf's DLRMv3, whose bound is 80 ms at p99.

With --output, the tables are written there as CSV, and latency against load as a figure.

With --requests, so many test requests are replayed over HTTP in time order, their users' events
appended in between, and every probability is compared with the evaluation's, for both exact caches:
`serving_replay`.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.evaluation.evaluator import request_logits
from stca_jax.evaluation.report.charts import Chart, Line
from stca_jax.evaluation.report.drawing import draw as draw_chart
from stca_jax.evaluation.tables import format_table, write_table
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks.serving_load import LoadTest, draw, run_load_test
from stca_jax.experiments.benchmarks.serving_replay import replay_over_http
from stca_jax.experiments.benchmarks.timing import Rates, measure_rates, time_interleaved
from stca_jax.export.folder import ExportOptions, export_checkpoint
from stca_jax.export.replay import replay
from stca_jax.input.dataset import RequestDataset
from stca_jax.schema import SECONDS_PER_DAY
from stca_jax.serving import Events, Scorer, ScoreRequest, ServingModel
from stca_jax.serving.threads import compute_with_one_thread
from stca_jax.workdir import checkpoint_step, load_workdir_config, restore_for_evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_STEP = flags.DEFINE_string("step", "best", "best, last, or the step of a checkpoint.")
_MAX_HISTORY = flags.DEFINE_integer("max_history", 10_240, "Events of a user.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 0, "Compare so many requests.", lower_bound=0)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long to time each line.")
_LOAD_SECONDS = flags.DEFINE_float("load_seconds", 0.0, "How long to offer each load.")
_LOADS = flags.DEFINE_list("loads", "0.1,0.3,0.5,0.7,0.9", "Shares of the saturating load.")
_LOAD_TARGETS = flags.DEFINE_list("load_targets", "100,1000,2048", "Candidates of a score.")
_USERS = flags.DEFINE_integer("users", 20, "Users of the load test.", lower_bound=1)
_SERVER = flags.DEFINE_list("server", [], "Options of its server, such as --workers=2.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for tables and figures.")
_TARGETS = (1, 100, 1_000)
_CACHES = ("keys_values", "tokens", "int8")
_BYTES = 512 << 20


def main() -> None:
    """Prints the tables."""
    compute_with_one_thread()
    workdir = launch.local_path("workdir", _WORKDIR.value)
    config = load_workdir_config(workdir)
    step = checkpoint_step(workdir, _STEP.value)
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    with tempfile.TemporaryDirectory() as directory:
        folders = {}
        for name in ("cached", "uncached"):
            folders[name] = pathlib.Path(directory) / name
            options = ExportOptions(_MAX_HISTORY.value, name == "uncached")
            export_checkpoint(config, dataset, workdir, step, folders[name], options)
        if _SECONDS.value:
            print_table("times", times(config, folders))
        if _LOAD_SECONDS.value:
            print_load_test(folders["cached"], pathlib.Path(directory))
        if _REQUESTS.value:
            path = pathlib.Path(directory)
            print_differences(config, dataset, workdir, step, folders["cached"], path)


def print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows, and writes them to --output."""
    print(format_table(rows))
    if _OUTPUT.value:
        directory = launch.local_path("output", _OUTPUT.value)
        directory.mkdir(parents=True, exist_ok=True)
        write_table(directory / f"{name}.csv", rows)


def print_load_test(folder: pathlib.Path, directory: pathlib.Path) -> None:
    """The tables of `serving_load`, and latency against load as a figure."""
    test = LoadTest(
        num_users=_USERS.value,
        num_events=_MAX_HISTORY.value,
        shares=[float(share) for share in _LOADS.value],
        seconds=_LOAD_SECONDS.value,
        num_targets=[int(m) for m in _LOAD_TARGETS.value],
        options=_SERVER.value,
    )
    tables = run_load_test(folder, directory, test)
    for name, rows in tables.items():
        print_table(name, rows)
    for m in test.num_targets if _OUTPUT.value else ():
        draw_latency(m, [row for row in tables["loads"] if row["candidates"] == m])


def draw_latency(num_targets: int, rows: Sequence[dict[str, Any]]) -> None:
    """Quantiles of latency against load, in --output."""
    rates = [row["offered (1/s)"] for row in rows]
    quantiles = ("p50", "p99", "p99.9")
    chart = Chart(
        name=f"latency_{num_targets}",
        title=f"Latency of {num_targets:,} candidates, {_MAX_HISTORY.value:,} events",
        caption="",
        x_label="offered load (requests/s)",
        y_label="ms",
        lines=[Line(q, rates, [row[f"{q} (ms)"] for row in rows]) for q in quantiles],
        from_zero=True,
    )
    figure = draw_chart(chart)
    for suffix in ("png", "svg"):
        path = launch.local_path("output", str(_OUTPUT.value)) / f"{chart.name}.{suffix}"
        figure.savefig(path, dpi=160, facecolor="white")


def times(config: ExperimentConfig, folders: dict[str, pathlib.Path]) -> list[dict[str, Any]]:
    """Times and bytes of each cache, and the floor."""
    rng = np.random.default_rng(0)
    rates = measure_rates(jnp.float32, config.model.sequence.width, clock=time.process_time)
    each = 1e9 / rates.exponentials
    print(f"products {rates.flops / 1e9:.0f} GFLOP/s, exponentials {each:.2f} ns")
    floors = {m: floor(config, m, rates) for m in _TARGETS}
    rows = []
    uncached: dict[int, float] = {}
    for cache in ("uncached", *_CACHES):
        folder = folders["uncached" if cache == "uncached" else "cached"]
        model = ServingModel.load(folder, cache=cache)
        scorer = Scorer(model, max_bytes=_BYTES, encoded=True)
        now = model.info.time_origin + 100_000_000
        scorer.append("user", draw_events(model, rng, _MAX_HISTORY.value, now))
        requests = {
            m: ScoreRequest("user", draw(model, rng, "target", m), one(model, rng), now)
            for m in _TARGETS
        }
        steps: dict[str, Any] = {
            str(m): functools.partial(_score, scorer, request) for m, request in requests.items()
        }
        steps["1"]()  # the user is encoded when first asked for
        if cache != "uncached":
            steps |= update_steps(scorer, draw_events(model, rng, 1, now), now)
        timed = time_interleaved(steps, seconds=_SECONDS.value, clock=time.process_time)
        found = {name: timing.best * 1e3 for name, timing in timed.items()}
        if cache == "uncached":
            uncached = {m: found[str(m)] for m in _TARGETS}
        row: dict[str, Any] = {"cache": cache}
        for m in _TARGETS:
            row |= {f"{m} (ms)": round(found[str(m)], 2), "/floor": None}
            row[f"{m} /floor"] = round(found[str(m)] / floors[m], 2)
            row[f"{m} uncached/"] = round(uncached[m] / found[str(m)], 1)
        del row["/floor"]
        for name in ("append", "encode"):
            row[f"{name} (ms)"] = round(found[name], 3) if name in found else None
        row["MB"] = round(scorer.cached[1] / 1e6, 1)
        rows.append(row)
    return rows


def _score(scorer: Scorer, request: ScoreRequest) -> None:
    scorer.probabilities(scorer.logits(request))


def update_steps(scorer: Scorer, event: Events, now: int) -> dict[str, Any]:
    """Appending an event to the cache, without the store, and encoding a whole history."""
    cache = scorer._pool.cache
    user = cache.find("user")
    assert user is not None
    columns = {n: v.astype(c.dtype) for (n, c), v in zip(
        user.window.columns.items(), event.columns.values(), strict=True)}  # fmt: skip
    history = {n: c.copy() for n, c in user.window.columns.items()}
    times, numbers = user.window.time.copy(), np.arange(user.window.size)
    sequence = [int(1e9)]

    def done() -> Any:
        return next(iter(cache._pool.values()))  # type: ignore[attr-defined]

    def append() -> Any:
        found = cache.find("user")
        assert found is not None
        sequence[0] += 1
        at = np.array([now - scorer.model.info.time_origin - 1])
        cache.append(found, columns, at, np.array(sequence), "user")
        return done()

    def encode() -> Any:
        cache.put("user", history, times, numbers).revision = user.revision
        return done()

    return {"append": append, "encode": encode}


def floor(config: ExperimentConfig, num_targets: int, rates: Rates) -> float:
    """Milliseconds that products and exponentials take at least."""
    sequence = config.model.sequence
    cost = sequence.cost(1_000_000)  # in the projected order
    pairs = num_targets * _MAX_HISTORY.value
    flops = cost.per_target * num_targets + cost.per_pair * pairs
    exponentials = pairs * getattr(sequence, "num_heads", 0) * cost.num_layers
    return 1e3 * rates.floor(flops, exponentials)


def one(model: ServingModel, rng: np.random.Generator) -> dict[str, Any]:
    """Random features of a request."""
    return {name: values[0] for name, values in draw(model, rng, "request", 1).items()}


def draw_events(model: ServingModel, rng: np.random.Generator, n: int, now: int) -> Events:
    """Random events of the last year."""
    time = np.sort(now - rng.integers(1, 365 * SECONDS_PER_DAY, n))
    return Events(time, draw(model, rng, "history", n))


def print_differences(
    config: ExperimentConfig,
    dataset: RequestDataset,
    workdir: pathlib.Path,
    step: int,
    folder: pathlib.Path,
    directory: pathlib.Path,
) -> None:
    """Replays requests over HTTP, with both exact caches."""
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    limits = {"length": _MAX_HISTORY.value, "max_requests": _REQUESTS.value}
    expected = dict(request_logits(program, state, dataset, config.input, split="test", **limits))
    replayed = list(replay(dataset, expected))
    options = [f"--compilation_cache={directory / 'compiled'}", f"--cache_bytes={_BYTES // 8}",
               "--deadline=60"]  # fmt: skip
    for cache in ("keys_values", "tokens"):
        histories = directory / f"{cache}.sqlite"
        of_cache = [f"--cache={cache}", *options]
        found = replay_over_http(folder, histories, of_cache, replayed, expected)
        counts = ", ".join(f"{number:,} {name}" for name, number in sorted(found.counts.items()))
        print(
            f"{cache}: {len(replayed):,} requests over HTTP, {found.num_probabilities:,} "
            f"probabilities within {found.probability:.1e} of the evaluation's, logits within "
            f"{found.logit:.1e}; {found.appended:,} events appended; {counts}"
        )


if __name__ == "__main__":
    launch.run(main)
