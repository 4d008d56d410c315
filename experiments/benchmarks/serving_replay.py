"""Replays test requests over HTTP in the order of time, and compares with the evaluation.

Every user's events are appended before the request that has them as history.  Half way the server
is killed and started again, and later it is told to read its export anew; its cache is too small
for all users, so that many are evicted and encoded again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import re
import signal
import urllib.parse
from collections.abc import Mapping, Sequence

import numpy as np
import orjson

from stca_jax.experiments.benchmarks.serving_load import ServerProcess, to_json
from stca_jax.export.replay import Replayed
from stca_jax.serving.server.upstream import Upstream

_RESOLVED = 0.01  # p (1 - p) above which a float32 probability tells logits 1e-5 apart


@dataclasses.dataclass
class Differences:
    """What a replay has found.

    Attributes:
      num_probabilities: Those compared.
      probability: The largest difference.
      logit: Of logits, where the probabilities resolve them.
      appended: Events.
      counts: Hits, misses and evictions of the caches.
    """

    num_probabilities: int = 0
    probability: float = 0.0
    logit: float = 0.0
    appended: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, found: np.ndarray, logit: np.ndarray) -> None:
        """Compares probabilities with the evaluation's logits."""
        right = 1 / (1 + np.exp(-logit.astype(np.float64)))
        difference, slope = np.abs(found - right), right * (1 - right)
        is_resolved = slope > _RESOLVED
        self.num_probabilities += difference.size
        self.probability = max(self.probability, float(difference.max()))
        self.logit = max(self.logit, float((difference / slope)[is_resolved].max(initial=0.0)))


def replay_over_http(
    folder: pathlib.Path,
    histories: pathlib.Path,
    options: Sequence[str],
    replayed: Sequence[Replayed],
    expected: Mapping[int, np.ndarray],
) -> Differences:
    """Sends all requests to servers of an export.

    Args:
      folder: Of the export.
      histories: The servers' store, a file.
      options: Of the servers.
      replayed: Requests in the order of time.
      expected: The evaluation's logits by request id, [targets, tasks].
    """
    differences, half = Differences(), len(replayed) // 2
    process = ServerProcess(folder, histories, options)
    try:
        asyncio.run(_ask(process, replayed[:half], expected, differences))
    finally:
        process.end(signal.SIGKILL)
    process = ServerProcess(folder, histories, options)
    try:
        reload_at = (len(replayed) - half) // 2
        asyncio.run(_ask(process, replayed[half : half + reload_at], expected, differences))
        asyncio.run(_reload(process))
        asyncio.run(_ask(process, replayed[half + reload_at :], expected, differences))
    finally:
        process.end()
    return differences


async def _ask(
    process: ServerProcess,
    replayed: Sequence[Replayed],
    expected: Mapping[int, np.ndarray],
    differences: Differences,
) -> None:
    upstream = Upstream(process.connect)
    for step in replayed:
        name, new = urllib.parse.quote(step.request.user, safe=""), step.new
        path = f"/v1/users/{name}".encode()
        if len(new):
            events = {"time": new.time, "features": new.columns, "ids": new.ids}
            answer = await upstream.ask("POST", path + b"/events", (), to_json(events))
            assert answer.status == 200, answer.body
            differences.appended += orjson.loads(answer.body)["appended"]
        asked = step.request
        body = {"targets": asked.targets, "request": asked.request, "time": asked.time}
        answer = await upstream.ask("POST", path + b"/score", (), to_json(body))
        assert answer.status == 200, answer.body
        found = orjson.loads(answer.body)["probabilities"]
        differences.add(np.stack(list(found.values()), -1), expected[step.request_id])
    text = (await upstream.ask("GET", b"/metrics")).body.decode()
    for name, number in re.findall(r"^stca_cache_(\w+)\S* ([\d.]+)$", text, re.MULTILINE):
        differences.counts[name] = differences.counts.get(name, 0) + int(float(number))


async def _reload(process: ServerProcess) -> None:
    """Goes on with the export as if it were another one: with caches that are empty."""
    upstream = Upstream(process.connect)
    process.send_signal(signal.SIGHUP)
    while (
        b'stca_reloads_total{result="succeeded"} 1'
        not in (await upstream.ask("GET", b"/metrics")).body
    ):
        await asyncio.sleep(0.1)
