"""A server under load, from outside: its process, its users, and requests that come when they come.

Open loop: requests are sent at the times of a Poisson process whether or not earlier ones have been
answered, and latency counts from the time at which a request should have been sent. Users are drawn
by Zipf's law; among the scores are appends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from stca_jax.schema import SECONDS_PER_DAY
from stca_jax.serving import ServingModel
from stca_jax.serving.server.upstream import Upstream

_APPENDS = 0.2  # share of requests
_ZIPF = 1.1
_CALIBRATING = 8  # requests at once, to find what saturates the server
_QUANTILES = {"p50 (ms)": 50, "p99 (ms)": 99, "p99.9 (ms)": 99.9, "max (ms)": 100}
Ask = Callable[[], Awaitable[int]]  # -> status


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Random requests to a model.

    Attributes:
      model: Whose features are drawn.
      num_users: How many there are.
      num_targets: Candidates of a score.
    """

    model: ServingModel
    num_users: int
    num_targets: int

    @property
    def now(self) -> int:
        """Unix second that events lie before."""
        return self.model.info.time_origin + 100_000_000

    def events(self, rng: np.random.Generator, n: int) -> bytes:
        """The body of an append."""
        times = np.sort(self.now - rng.integers(1, 365 * SECONDS_PER_DAY, n))
        return to_json({"time": times, "features": draw(self.model, rng, "history", n)})

    def score(self, rng: np.random.Generator, num_targets: int | None = None) -> bytes:
        """The body of a score."""
        request = {n: v[0] for n, v in draw(self.model, rng, "request", 1).items()}
        targets = draw(self.model, rng, "target", num_targets or self.num_targets)
        return to_json({"targets": targets, "request": request, "time": self.now})

    def user(self, rng: np.random.Generator) -> int:
        """The rank of a user, by Zipf's law."""
        weights = np.arange(1, self.num_users + 1) ** -_ZIPF
        return int(rng.choice(self.num_users, p=weights / weights.sum()))


def draw(model: ServingModel, rng: np.random.Generator, level: str, n: int) -> dict[str, Any]:
    """Random features as trained; ids as frequent as ids of a log, by rank."""
    sizes = model.info.schema.vocabularies
    return {
        name: np.minimum(rng.zipf(1.2, n), sizes[name]) - 1 if name in sizes else rng.normal(size=n)
        for name in model.info.levels[level].names
    }


def to_json(value: Any) -> bytes:
    """A body, of arrays too."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class ServerProcess:
    """A server, until the context ends.

    Attributes:
      seconds_to_ready: From its start.
    """

    def __init__(self, model: pathlib.Path, histories: pathlib.Path, options: Sequence[str]):
        """Returns once it is ready."""
        started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stca_jax.serving", f"--model={model}", "--port=0",
             f"--histories={histories}", "--encoded", *options],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        port = 0
        for line in self._process.stderr:
            said: dict[str, Any] = (
                json.loads(line) if line.startswith("{") else {"message": line.strip()}
            )
            port = said.get("port", port)
            if said["message"] in ("ready", "all workers are ready"):
                break
        else:
            raise RuntimeError("the server did not start: see its log")
        self.seconds_to_ready = time.monotonic() - started
        self.connect = functools.partial(asyncio.open_connection, "127.0.0.1", port)

    @property
    def resident_megabytes(self) -> float:
        """Memory of the process."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1e3 if found else float("nan")

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Drains it, or kills it."""
        self.send_signal(number)
        self._process.communicate()


@contextlib.contextmanager
def server(
    model: pathlib.Path, histories: pathlib.Path, options: Sequence[str]
) -> Iterator[ServerProcess]:
    """A server process for some requests."""
    process = ServerProcess(model, histories, options)
    try:
        yield process
    finally:
        process.end()


async def fill(upstream: Upstream, traffic: Traffic, num_events: int) -> None:
    """Gives every user a history."""
    rng = np.random.default_rng(1)
    for user in range(traffic.num_users):
        body = traffic.events(rng, num_events)
        answer = await upstream.ask("POST", b"/v1/users/u%d/events" % user, (), body)
        assert answer.status == 200, answer.body


async def first_and_second(upstream: Upstream, traffic: Traffic) -> list[dict[str, Any]]:
    """Latency of users who are read from the store and encoded, and of the same ones cached."""
    rng = np.random.default_rng(2)
    rows = []
    for name in ("cold", "warm"):
        seconds = []
        for user in range(traffic.num_users):
            body = traffic.score(rng)
            began = time.monotonic()
            answer = await upstream.ask("POST", b"/v1/users/u%d/score" % user, (), body)
            seconds.append(time.monotonic() - began)
            assert answer.status == 200, answer.body
        rows.append({"users": name, "candidates": traffic.num_targets, **quantiles(seconds)})
    return rows


async def overhead(upstream: Upstream, traffic: Traffic, count: int) -> dict[str, Any]:
    """One score after the other: what a client waits beside the scorer's own time."""
    rng = np.random.default_rng(3)
    before = await _stage_seconds(upstream)
    seconds = []
    for _ in range(count):
        body = traffic.score(rng)
        began = time.monotonic()
        answer = await upstream.ask("POST", b"/v1/users/u0/score", (), body)
        seconds.append(time.monotonic() - began)
        assert answer.status == 200, answer.body
    after = await _stage_seconds(upstream)
    scoring = (after - before) / count
    row = {"candidates": traffic.num_targets, **quantiles(seconds)}
    return row | {"scoring, mean (ms)": 1e3 * scoring,
                  "overhead, mean (ms)": 1e3 * (float(np.mean(seconds)) - scoring)}  # fmt: skip


async def _stage_seconds(upstream: Upstream) -> float:
    text = (await upstream.ask("GET", b"/metrics")).body.decode()
    found = re.findall(r'stca_stage_seconds_sum\{[^}]*stage="score"[^}]*\} (\S+)', text)
    return sum(map(float, found))


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of latencies."""
    return {name: 1e3 * float(np.percentile(seconds, q)) for name, q in _QUANTILES.items()}


def _requests(upstream: Upstream, traffic: Traffic) -> Callable[[np.random.Generator], Ask]:
    rng = np.random.default_rng(4)
    # Drawn before: drawing must not slow the client down.
    scores = [traffic.score(rng) for _ in range(64)]
    appends = [traffic.events(rng, 1) for _ in range(64)]

    def draw(rng: np.random.Generator) -> Ask:
        user, k = traffic.user(rng), int(rng.integers(64))
        what, body = (b"events", appends[k]) if rng.random() < _APPENDS else (b"score", scores[k])

        async def ask() -> int:
            path = b"/v1/users/u%d/%s" % (user, what)
            return (await upstream.ask("POST", path, (), body)).status

        return ask

    return draw


async def saturating_rate(upstream: Upstream, traffic: Traffic, seconds: float) -> float:
    """Requests per second that a few clients, each asking again once answered, are answered."""
    draw = _requests(upstream, traffic)
    ends, answered = time.monotonic() + seconds, 0

    async def client(number: int) -> None:
        nonlocal answered
        rng = np.random.default_rng(number)
        while time.monotonic() < ends:
            await draw(rng)()
            answered += 1

    await asyncio.gather(*map(client, range(_CALIBRATING)))
    return answered / seconds


async def offered(
    upstream: Upstream, traffic: Traffic, rate: float, seconds: float
) -> dict[str, Any]:
    """One load.

    Args:
      upstream: The server.
      traffic: What is asked.
      rate: Requests per second.
      seconds: For how long.
    """
    rng = np.random.default_rng(5)
    draw = _requests(upstream, traffic)
    latencies: list[float] = []
    errors = 0

    async def one(ask: Ask, due: float) -> None:
        nonlocal errors
        try:
            status = await ask()
        except OSError:
            status = 0
        latencies.append(time.monotonic() - due)
        errors += status != 200

    began = time.monotonic()
    due, running = began, set()
    while (due := due + rng.exponential(1 / rate)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(draw(rng), due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    took = time.monotonic() - began
    return {"offered (1/s)": rate, "answered (1/s)": len(latencies) / took,
            "requests": len(latencies), "errors": errors, **quantiles(latencies)}  # fmt: skip


def ideal_queue(rate: float, saturating: float) -> dict[str, float]:
    """Quantiles of latency if nothing disturbed the server: one queue, every score takes the same.

    Args:
      rate: Requests per second, of a Poisson process.
      saturating: Requests per second that the server can answer; appends take none of the time.
    """
    rng = np.random.default_rng(6)
    waited, latencies = 0.0, np.empty(200_000)
    score_seconds = 1 / saturating / (1 - _APPENDS)
    for i, between in enumerate(rng.exponential(1 / rate, len(latencies))):
        waited = max(0.0, waited - between)
        waited += score_seconds * (rng.random() >= _APPENDS)
        latencies[i] = waited
    found = quantiles(latencies.tolist())
    return {f"ideal {name}": found[name] for name in _QUANTILES if name != "max (ms)"}


async def cached(upstream: Upstream) -> tuple[float, float]:
    """Users in the server's caches, and the bytes that they take."""
    text = (await upstream.ask("GET", b"/metrics")).body.decode()

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)))

    return total("stca_cached_users"), total("stca_cached_bytes")


@dataclasses.dataclass(frozen=True)
class LoadTest:
    """What is measured.

    Attributes:
      num_users: Users, by Zipf's law.
      num_events: Of each.
      shares: Offered loads, as shares of the saturating rate.
      seconds: For each of them.
      num_targets: Candidates of a score; each number is a load test of its own.
      options: Of the server.
    """

    num_users: int
    num_events: int
    shares: Sequence[float]
    seconds: float
    num_targets: Sequence[int]
    options: Sequence[str]


def run_load_test(
    folder: pathlib.Path, directory: pathlib.Path, test: LoadTest
) -> dict[str, list[dict[str, Any]]]:
    """All measurements of a server of its own.

    Args:
      folder: Of the export.
      directory: For the store and the server's compiled programs.
      test: What is measured.

    Returns:
      Rows of the tables `starts`, `users`, `overhead` and `loads`.
    """
    model = ServingModel.load(folder)
    traffics = [Traffic(model, test.num_users, m) for m in test.num_targets]
    sizes = ",".join(map(str, test.num_targets))
    options = [f"--warm_up={sizes}", f"--compilation_cache={directory / 'compiled'}",
               "--deadline=30", "--max_waiting=100000", *test.options]  # fmt: skip
    tables: dict[str, list[dict[str, Any]]] = {"starts": [], "users": [], "overhead": []}
    tables["loads"] = []
    histories = directory / "users.sqlite"

    async def first() -> None:
        await fill(Upstream(process.connect), traffics[0], test.num_events)

    async def second() -> None:
        upstream = Upstream(process.connect)
        tables["users"] = await first_and_second(upstream, traffics[0])
        for traffic in traffics:
            tables["overhead"].append(await overhead(upstream, traffic, 50))
            saturating = await saturating_rate(upstream, traffic, min(test.seconds, 60))
            for share in test.shares:
                before = process.resident_megabytes
                row = await offered(upstream, traffic, share * saturating, test.seconds)
                memory = {"server before (MB)": before, "after (MB)": process.resident_megabytes}
                shape = {"candidates": traffic.num_targets, "load": share}
                ideal = ideal_queue(share * saturating, saturating)
                tables["loads"].append(shape | row | ideal | memory)
        users, num_bytes = await cached(upstream)
        for row in tables["users"]:
            row["MB of a user"] = num_bytes / users / 1e6

    for name, measure in (("cold", first), ("warm", second)):
        with server(folder, histories, options) as process:
            seconds = process.seconds_to_ready
            tables["starts"].append({"compilation cache": name, "ready after (s)": seconds})
            asyncio.run(measure())
    return tables
