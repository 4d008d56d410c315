"""Several workers behind one port: who has which user, and what their deaths cost."""

import asyncio
import os
import re
import shutil
import signal
import tempfile
import threading
import time

import httpx
import numpy as np
import pytest
from server_process import SECONDS, answers, body_of, outputs_of, score_body, serving, tensors

from stca_jax.errors import UserError
from stca_jax.export.replay import replay
from stca_jax.serving import Events
from stca_jax.serving.server import protocol
from stca_jax.serving.server.app import ServerOptions
from stca_jax.serving.server.front import Front, worker_of


def test_users_are_spread_and_stay():
    counts = np.bincount([worker_of(f"user {u}", 4) for u in range(4_000)], minlength=4)
    assert (np.abs(counts - 1_000) < 150).all()
    assert worker_of("user 7", 4) == worker_of("user 7", 4)


@pytest.mark.parametrize("binary", [False, True])
def test_the_protocols_user_is_found_without_decoding_the_rest(binary):
    from stca_jax.serving import ScoreRequest

    request = ScoreRequest("käthe", {"item": np.arange(5), "price": np.ones(5)}, {"hour": 3}, 9)
    body, headers = tensors(request, binary)
    length = headers.get(protocol.HEADER_LENGTH)
    assert protocol.user_of(body, length) == "käthe" == protocol.read_request(body, length)[0].user
    with pytest.raises(UserError, match="'user' is missing"):
        protocol.user_of(b'{"inputs": []}', None)


class FakeWorker:
    """Answers by its number."""

    def __init__(self, number, is_ready=True):
        self.number, self.is_ready, self.upstream, self.starts = number, is_ready, self, 1
        self.num_asked = 0

    async def ask(self, method, target, headers=(), body=b""):
        from stca_jax.serving.server.upstream import Answer

        if target == b"/metrics":
            text = (
                b"# HELP stca_requests r\n# TYPE stca_requests counter\nstca_requests_total 2.0\n"
            )
            return Answer(200, {}, text)
        return Answer(200, {"content-type": "text/plain"}, b"%d" % self.number)


def asked(front, method, path, **arguments):
    async def send():
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(send())


def test_every_kind_of_request_of_a_user_goes_to_one_worker():
    front = Front([FakeWorker(k) for k in range(5)], ServerOptions(max_body_bytes=100))
    for user, path in (("a", "a"), ("a/events", "a%2Fevents"), ("ü b", "%C3%BC%20b")):
        right = str(worker_of(user, 5))
        found = {
            asked(front, method, f"/v1/users/{path}{end}").text
            for method, end in (
                ("POST", "/events"), ("PUT", "/events"), ("POST", "/score"), ("DELETE", "")
            )
        }  # fmt: skip
        body = {"inputs": [{"name": "user", "datatype": "BYTES", "shape": [1], "data": [user]}]}
        found.add(asked(front, "POST", "/v2/models/stca/infer", json=body).text)
        assert found == {right}, user
    assert asked(front, "POST", "/v1/users/a/events", content=b" " * 101).status_code == 413
    assert asked(front, "HEAD", "/v1/users/a/events").status_code == 405


def test_readiness_needs_all_workers_and_metrics_name_each():
    workers = [FakeWorker(0), FakeWorker(1, is_ready=False)]
    front = Front(workers, ServerOptions())
    assert asked(front, "GET", "/v2/health/ready").status_code == 503
    assert asked(front, "GET", "/v2/health/live").status_code == 200
    down = next(u for u in map(str, range(99)) if worker_of(u, 2) == 1)
    answer = asked(front, "POST", f"/v1/users/{down}/score", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert asked(front, "GET", "/v2/models/stca").text == "0"
    text = asked(front, "GET", "/metrics").text
    assert 'stca_worker_up{worker="1"} 0.0' in text
    assert 'stca_requests_total{worker="1"}' not in text
    workers[1].is_ready = True
    assert asked(front, "GET", "/v2/health/ready").status_code == 200
    assert 'stca_requests_total{worker="1"} 2.0' in asked(front, "GET", "/metrics").text


class Appending(threading.Thread):
    """Appends one event after the other to one user, and remembers what was acknowledged."""

    def __init__(self, server, user, schema, start):
        super().__init__()
        self.client = httpx.Client(base_url=server.client.base_url, timeout=SECONDS)
        self.user, self.schema, self.at = user, schema, start
        self.acknowledged, self.refused = [], []
        self.stop = threading.Event()

    def run(self):
        k = 0
        while not self.stop.is_set():
            columns = {
                n: np.full(1, 1 + k % 7 if self.schema.is_categorical(n) else 0.5 * (k % 3))
                for n in self.schema.history
            }
            event = Events([self.at + k], columns, [f"late {k}"])
            answer = self.client.post(f"/v1/users/{self.user}/events", json=body_of(event))
            if answer.status_code == 200:  # sent again where it was refused: counts once
                self.acknowledged.append(event)
                k += 1
            else:
                assert answer.status_code == 503, answer.text
                self.refused.append(answer.headers["retry-after"])
                time.sleep(0.02)


def number_of(server, pattern):
    return float(re.search(pattern + r" (\S+)", server.client.get("/metrics").text)[1])


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # nobody may have waited for it
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_worker_costs_no_event_and_no_score(
    export, everything_run, expected, tmp_path, compiled
):
    replayed = list(replay(everything_run.dataset, expected))[:60]
    half = len(replayed) // 2
    schema = everything_run.dataset.schema
    histories = f"--histories={tmp_path / 'users.sqlite'}"
    with serving(export, histories, compiled, "--workers=2") as server:
        pids = [server.started[k] for k in "01"]
        assert answers(server, replayed[:half], expected) < 2e-6
        last = replayed[half - 1].request
        own = worker_of(last.user, 2)

        # A user of the worker that dies is appended to, all the time.
        fresh = next(f"new {u}" for u in range(99) if worker_of(f"new {u}", 2) == own)
        appending = Appending(server, fresh, schema, last.time)
        appending.start()
        while len(appending.acknowledged) < 20:
            time.sleep(0.01)
        os.kill(pids[own], signal.SIGKILL)
        server.wait_for("is started again")
        assert server.client.get("/v2/health/ready").status_code == 503
        other = next(r.request for r in replayed if worker_of(r.request.user, 2) != own)
        path = f"/v1/users/{other.user}/score"
        assert server.client.post(path, json=score_body(other)).status_code == 200
        while server.client.get("/v2/health/ready").status_code != 200:
            time.sleep(0.05)
        known = len(appending.acknowledged)
        while len(appending.acknowledged) < known + 20:
            time.sleep(0.01)
        appending.stop.set()
        appending.join()
        assert appending.refused
        assert set(appending.refused) == {"1"}

        # What the restarted worker scores is what one scores that was given all events at once.
        asked_of = dict(score_body(last), time=last.time + 10**6)
        events = appending.acknowledged
        whole = Events(
            np.concatenate([e.time for e in events]),
            {n: np.concatenate([e.columns[n] for e in events]) for n in schema.history},
        )
        server.client.post("/v1/users/whole/events", json=body_of(whole))
        found, right = (
            server.client.post(f"/v1/users/{user}/score", json=asked_of).json()["probabilities"]
            for user in (fresh, "whole")
        )
        for task, values in right.items():
            np.testing.assert_allclose(found[task], values, atol=2e-6)

        assert answers(server, replayed[half:], expected) < 2e-6
        content, headers = tensors(replayed[-1].request, True)
        answer = server.client.post("/v2/models/stca/infer", content=content, headers=headers)
        right = 1 / (1 + np.exp(-expected[replayed[-1].request_id].astype(np.float64)))
        np.testing.assert_allclose(
            np.stack(list(outputs_of(answer).values()), -1), right, atol=2e-6
        )
        home = worker_of(replayed[-1].request.user, 2)
        infer = rf'stca_requests_total{{operation="infer",status="200",worker="{home}"}}'
        assert number_of(server, infer) == 1
        assert number_of(server, rf'stca_worker_starts_total{{worker="{own}"}}') == 2
        pids = [server.started[k] for k in "01"]
        assert server.end() == 0
        assert not any(map(is_alive, pids))

    sockets = tempfile.mkdtemp(dir="/tmp")  # a socket's path is short
    options = (export, histories, compiled, "--workers=2")
    with serving(*options, TMPDIR=sockets) as server:  # and without its front
        pids = [server.started[k] for k in "01"]
        server.end(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.rmdir(sockets)  # nothing is left


@pytest.mark.slow
def test_a_worker_that_is_started_again_serves_what_the_others_do(
    export, everything_run, expected, tmp_path, compiled
):
    """Also after the server went on with another export, while --model names a bad one."""
    first, second, bad = (tmp_path / name for name in ("first", "second", "bad"))
    for folder in (first, second):
        shutil.copytree(export, folder)
    bad.mkdir()
    link = tmp_path / "model"

    def set_to(folder):
        link.unlink(missing_ok=True)
        link.symlink_to(folder)

    step = next(s for s in replay(everything_run.dataset, expected) if len(s.new))
    own = worker_of(step.request.user, 2)
    set_to(first)
    histories = f"--histories={tmp_path / 'users.sqlite'}"
    with serving(link, histories, compiled, "--workers=2") as server:
        set_to(second)
        server.process.send_signal(signal.SIGHUP)
        for _ in range(2):
            server.wait_for("goes on with a new export")
        set_to(bad)
        shutil.rmtree(first)
        os.kill(server.started[str(own)], signal.SIGKILL)
        reason = server.wait_for("the one before does")["reason"]
        assert "is no exported model" in reason
        while server.client.get("/v2/health/ready").status_code != 200:
            time.sleep(0.05)
        assert answers(server, [step], expected) < 2e-6
