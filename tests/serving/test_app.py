"""What the application answers to bad input, to crowds and to strangers; in this process."""

import asyncio
import json
import random
import threading

import httpx
import numpy as np
import pytest

from stca_jax.serving import Scorer, ServingModel, SqliteHistories
from stca_jax.serving.server.app import Server, ServerOptions
from stca_jax.serving.server.telemetry import Telemetry
from stca_jax.serving.server.worker import Worker


class Asked:
    """A server around a scorer, asked from the thread of the test."""

    def __init__(self, scorer, **options):
        self.telemetry = Telemetry()
        self.options = ServerOptions(
            deadline_seconds=options.pop("deadline_seconds", 60), **options
        )
        self.worker = Worker(
            scorer, max_waiting=self.options.max_waiting, timed=self.telemetry.stage
        )
        self.telemetry.watch(self.worker)
        self.server = Server(self.worker, self.telemetry, self.options)

    async def send(self, method, path, **arguments):
        transport = httpx.ASGITransport(self.server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **arguments)

    def __call__(self, method, path, **arguments):
        return asyncio.run(self.send(method, path, **arguments))


@pytest.fixture(scope="module")
def scorer(export):
    return Scorer(ServingModel.load(export), max_bytes=64 << 20, encoded=True)


@pytest.fixture(scope="module")
def asked(scorer):
    return Asked(scorer, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def bodies(scorer):
    """A good body to append, and one to score."""
    schema = scorer.model.info.schema

    def column(name, size):
        return [1] * size if schema.is_categorical(name) else [0.5] * size

    time = scorer.model.info.time_origin + 1_000
    events = {
        "time": [time, time + 1],
        "features": {n: column(n, 2) for n in schema.history},
        "ids": ["a", "b"],
    }
    score = {
        "targets": {n: column(n, 3) for n in schema.target},
        "request": {n: column(n, 1)[0] for n in schema.request},
        "time": time + 10,
    }
    return events, score


def test_events_count_once_and_can_be_rewritten(asked, bodies):
    events, score = bodies
    path = "/v1/users/a%2Fb c/events"  # any name of a user
    assert asked("POST", path, json=events).json() == {"appended": 2}
    assert asked("POST", path, json=events).json() == {"appended": 0}
    before = asked("POST", "/v1/users/a%2Fb c/score", json=score).json()["probabilities"]
    name = next(iter(events["features"]))
    other = events | {"features": events["features"] | {name: [2, 2]}}
    assert asked("PUT", path, json=other).json() == {"updated": 2}
    after = asked("POST", "/v1/users/a%2Fb c/score", json=score).json()["probabilities"]
    assert not np.allclose(*(next(iter(x.values())) for x in (before, after)), atol=1e-4)
    unknown = asked("PUT", path, json=events | {"ids": ["a", "z"]})
    assert (unknown.status_code, "no event with id 'z'" in unknown.text) == (400, True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": {}}, "the body has 'target'; did you mean 'targets'?"),
        ({"targets": None}, "the body lacks 'targets'"),
        ({"targets": []}, "'targets' is []; give an object"),
        ({"targets": {}}, "target lacks"),
        ({"targets": {"item": 3}}, "targets 'item' is 3; give a list"),
        ({"targets": {"item": [10**9]}}, "'item' has 1000000000; its values must be whole numbers"),
        ({"targets": {"item": ["x"]}}, "has values like 'x', not numbers"),
        ({"time": "now"}, "'time' is 'now'; give a number"),
        ({"time": 5}, "time 5 is not within"),
        ({"time": True}, "'time' is True; give a number"),
    ],
)
def test_bad_scores_name_field_value_and_expectation(asked, bodies, change, sentence):
    body = bodies[1] | change
    if isinstance(change.get("targets"), dict) and change["targets"]:  # one candidate
        body["targets"] = {n: v[:1] for n, v in bodies[1]["targets"].items()} | change["targets"]
    answer = asked("POST", "/v1/users/u/score", json=body)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]


def test_limits(asked, bodies):
    events, score = bodies
    many = score | {"targets": {n: v[:1] * 2_049 for n, v in score["targets"].items()}}
    answer = asked("POST", "/v1/users/u/score", json=many)
    assert (answer.status_code, answer.json()["error"]) == (413, "2,049 targets; at most 2,048")
    answer = asked("POST", "/v1/users/u/events", content=b" " * (1 << 20) + b"{}")
    assert (answer.status_code, "more than 1,048,576 bytes" in answer.text) == (413, True)
    answer = asked("POST", f"/v1/users/{'u' * 513}/events", json=events)
    assert (answer.status_code, "513 characters" in answer.text) == (400, True)
    assert asked("POST", "/v1/users/u", json={}).status_code == 405
    assert asked("GET", "/v1/nothing").json() == {"error": "Not Found"}


def test_a_token_is_needed_but_for_health(scorer, bodies):
    guarded = Asked(scorer, token="secret")
    path = "/v1/users/u/score"
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
        answer = guarded("POST", path, json=bodies[1], headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    right = {"authorization": "Bearer secret"}
    assert guarded("POST", path, json=bodies[1], headers=right).status_code == 200
    assert guarded("GET", "/metrics").status_code == 401
    assert guarded("GET", "/v2/health/ready").status_code == 200


class Stuck:
    """A scorer that waits until it is let go."""

    def __init__(self, scorer):
        self.go = threading.Event()
        self.began = threading.Event()
        self.scorer = scorer

    def score_many(self, requests):
        self.began.set()
        self.go.wait(60)
        return self.scorer.score_many(requests)

    def __getattr__(self, name):
        return getattr(self.scorer, name)


def test_crowds_are_told_to_come_back_and_the_late_are_not_begun(scorer, bodies):
    stuck = Stuck(scorer)
    crowded = Asked(stuck, max_waiting=1, deadline_seconds=0.2)

    async def crowd():
        path, body = "/v1/users/u/score", bodies[1]
        running = asyncio.create_task(crowded.send("POST", path, json=body))
        await asyncio.to_thread(stuck.began.wait)
        waiting = asyncio.create_task(crowded.send("POST", path, json=body))
        while not crowded.worker.num_waiting:
            await asyncio.sleep(0.01)
        refused = await crowded.send("POST", path, json=body)
        await asyncio.sleep(0.3)
        stuck.go.set()
        return refused, await running, await waiting

    refused, running, waiting = asyncio.run(crowd())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert running.status_code == 200
    assert (waiting.status_code, "0.2 seconds" in waiting.text) == (504, True)


class FullDisk(SqliteHistories):
    """A store that can read and not write."""

    def append(self, user, events):
        raise OSError("histories 'x': database or disk is full")


def test_a_full_disk_acknowledges_nothing(export, bodies):
    asked = Asked(Scorer(ServingModel.load(export), FullDisk(), max_bytes=64 << 20, encoded=True))
    answer = asked("POST", "/v1/users/u/events", json=bodies[0])
    assert (answer.status_code, "disk is full" in answer.text) == (503, True)
    assert asked("POST", "/v1/users/u/score", json=bodies[1]).status_code == 200


def test_the_protocol_describes_the_model(asked, scorer):
    schema = scorer.model.info.schema
    described = asked("GET", "/v2/models/stca").json()
    names = {tensor["name"] for tensor in described["inputs"]}
    assert names == {"user", "time", *(f"targets/{n}" for n in schema.target),
                     *(f"request/{n}" for n in schema.request)}  # fmt: skip
    assert [tensor["name"] for tensor in described["outputs"]] == list(schema.tasks)
    assert asked("GET", "/v2/models/stca/ready").json() == {"ready": True}
    assert asked("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]


def test_nothing_malformed_brings_the_server_down(asked, bodies):
    """A thousand bodies: good ones cut, flipped, and with values of other kinds."""
    rng = random.Random(0)
    paths = [
        ("POST", "/v1/users/u/events", bodies[0]),
        ("PUT", "/v1/users/u/events", bodies[0]),
        ("POST", "/v1/users/u/score", bodies[1]),
        ("POST", "/v2/models/stca/infer", {"inputs": [
            {"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u"]},
            *({"name": f"targets/{n}", "datatype": "INT64", "shape": [3], "data": v}
              for n, v in bodies[1]["targets"].items())]}),
    ]  # fmt: skip
    odd = [None, True, -1, 2**63, 2**70, 1e300, "", "\0", "x" * 5_000, [], [[]], {}, {"a": []}]

    def spoilt(value, depth=0):
        if isinstance(value, dict) and value and rng.random() < 0.8:
            key = rng.choice(list(value))
            return value | {key: spoilt(value[key], depth + 1)}
        if isinstance(value, list) and value and rng.random() < 0.8:
            k = rng.randrange(len(value))
            return [*value[:k], spoilt(value[k], depth + 1), *value[k + 1 :]]
        return rng.choice(odd)

    async def all_of_them():
        statuses = []
        for _ in range(1_000):
            method, path, body = rng.choice(paths)
            content = bytearray(json.dumps(spoilt(body)).encode())
            headers = {}
            if rng.random() < 0.5:
                content = content[: rng.randrange(len(content) + 1)]
            if content and rng.random() < 0.5:
                content[rng.randrange(len(content))] = rng.randrange(256)
            if rng.random() < 0.2:
                headers["inference-header-content-length"] = str(rng.randrange(-5, 500))
            answer = await asked.send(method, path, content=bytes(content), headers=headers)
            statuses.append(answer.status_code)
        return statuses

    statuses = asyncio.run(all_of_them())
    assert set(statuses) <= {200, 400}
    assert statuses.count(400) > 500
    assert asked("POST", "/v1/users/v/score", json=bodies[1]).status_code == 200
