"""The server as a process: scores over HTTP, restarts, drains, reloads, and what it refuses."""

import asyncio
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import httpx
import numpy as np
import pytest
from server_process import (
    SECONDS,
    answers,
    body_of,
    outputs_of,
    score_body,
    serving,
    tensors,
)

from stca_jax.experiments.benchmarks.serving_replay import replay_over_http
from stca_jax.export.replay import replay
from stca_jax.serving.__main__ import listen
from stca_jax.serving.server.upstream import Upstream


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_write_of_an_answer_waits_for_an_acknowledgement(host):
    async def no_delay_of_a_connection():
        accepted = asyncio.get_running_loop().create_future()
        listening = listen(host, 0)
        server = await asyncio.start_server(
            lambda reader, writer: accepted.set_result(writer), sock=listening
        )
        async with server:
            _, client = await asyncio.open_connection(*listening.getsockname()[:2])
            writer = await accepted
            connection = writer.get_extra_info("socket")
            found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for end in (client, writer):
                end.close()
            return found

    assert asyncio.run(no_delay_of_a_connection())


@pytest.mark.slow
def test_scores_are_the_evaluations_after_kills_and_ends(
    export, everything_run, expected, tmp_path, compiled
):
    replayed = list(replay(everything_run.dataset, expected))
    half = len(replayed) // 2
    histories = f"--histories={tmp_path / 'users.sqlite'}"
    with serving(export, histories, compiled) as server:
        assert answers(server, replayed[:half], expected) < 2e-6
        server.end(signal.SIGKILL)
    with serving(export, histories, compiled) as server:  # nothing acknowledged is lost
        assert answers(server, replayed[half:], expected) < 2e-6
        last = replayed[-1].request
        plain = server.client.post(f"/v1/users/{last.user}/score", json=score_body(last))
        for binary in (False, True):
            content, headers = tensors(last, binary)
            answer = server.client.post("/v2/models/stca/infer", content=content, headers=headers)
            for task, values in outputs_of(answer).items():
                np.testing.assert_allclose(values, plain.json()["probabilities"][task], rtol=1e-6)
        metrics = server.client.get("/metrics").text
        assert (
            f'stca_requests_total{{operation="score",status="200"}} {len(replayed) - half + 1}'
            in metrics.replace(".0\n", "\n")
        )
        forgotten = "who-is-to-be-forgotten"
        some = next(step.new for step in replayed if len(step.new))
        server.client.post(f"/v1/users/{forgotten}/events", json=body_of(some))
        server.client.post(f"/v1/users/{forgotten}/score", json=score_body(last))
        server.client.post(f"/v1/users/{forgotten}/score", json={"targets": 1})  # an error
        assert is_in_files(tmp_path, forgotten)
        assert server.client.delete(f"/v1/users/{forgotten}").json() == {"deleted": True}
        assert server.client.delete(f"/v1/users/{forgotten}").json() == {"deleted": False}
        assert server.end() == 0
        assert not any(forgotten in line for line in server.log)
    assert not is_in_files(tmp_path, forgotten)


@pytest.mark.exhaustive  # three servers compile; the test above replays as well
def test_the_benchmark_replays_over_a_kill_a_reload_and_evictions(
    export, everything_run, expected, tmp_path, compiled
):
    replayed = list(replay(everything_run.dataset, expected))
    users = len({step.request.user for step in replayed})
    options = (compiled, "--cache_bytes=500000", "--deadline=60")
    found = replay_over_http(export, tmp_path / "users.sqlite", options, replayed, expected)
    assert found.num_probabilities == sum(logit.size for logit in expected.values())
    assert found.probability < 2e-6
    assert found.logit < 1e-5
    assert found.appended == sum(len(step.new) for step in replayed)
    assert found.counts["evictions"] > 0
    assert found.counts["misses"] > users  # each process and each export reads users again


def is_in_files(folder, text):
    return any(text.encode() in file.read_bytes() for file in folder.glob("users.sqlite*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--workers=2",), marks=pytest.mark.exhaustive)]
)
def test_ten_thousand_connections_at_once_get_scores_or_a_refusal(
    export, everything_run, expected, compiled, tmp_path, options
):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    number = min(10_000, hard - 1_000)
    step = next(s for s in replay(everything_run.dataset, expected) if len(s.new))
    right = 1 / (1 + np.exp(-expected[step.request_id].astype(np.float64)))
    histories = f"--histories={tmp_path / 'users.sqlite'}"
    try:
        with serving(export, compiled, histories, *options) as server:
            path = f"/v1/users/{urllib.parse.quote(step.request.user)}"
            server.client.post(f"{path}/events", json=body_of(step.new)).raise_for_status()
            body = json.dumps(score_body(step.request))
            answers_of_all = asyncio.run(ask_at_once(server.port, f"{path}/score", body, number))
            after = server.client.post(f"{path}/score", content=body)
            assert server.process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(answers_of_all) == number
    assert {answer.status for answer in answers_of_all} <= {200, 503}
    scored = [answer.body for answer in answers_of_all if answer.status == 200]
    assert len(scored) >= 50
    assert all("retry-after" in a.headers for a in answers_of_all if a.status == 503)
    for content in {*scored, after.content}:
        found = np.stack(list(json.loads(content)["probabilities"].values()), -1)
        np.testing.assert_allclose(found, right, atol=2e-6)


async def ask_at_once(port, path, body, number):
    """All answers; all connections are open before the first asks."""
    opened = []
    while len(opened) < number:
        some = range(min(500, number - len(opened)))
        opened += await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in some))

    async def connect():
        return opened.pop()

    upstream = Upstream(connect)
    asked = (upstream.ask("POST", path.encode(), (), body.encode()) for _ in range(number))
    found = await asyncio.gather(*asked)
    assert not opened  # each asked by a connection of its own
    upstream.close()
    return found


@pytest.mark.slow
def test_going_on_with_another_export_loses_no_request(
    export, everything_run, expected, tmp_path, compiled
):
    link, bad = tmp_path / "model", tmp_path / "bad"
    shutil.copytree(export, bad)
    weights = bytearray((bad / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bad / "weights.safetensors").write_bytes(weights)
    request = next(replay(everything_run.dataset, expected)).request
    link.symlink_to(export)
    with serving(link, compiled, "--drain=1") as server:
        statuses, stop = [], threading.Event()

        def ask():
            client = httpx.Client(base_url=server.client.base_url, timeout=SECONDS)
            while not stop.is_set():
                answer = client.post(f"/v1/users/{request.user}/score", json=score_body(request))
                statuses.append(answer.status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        link.unlink()
        link.symlink_to(bad)
        server.process.send_signal(signal.SIGHUP)
        failed = server.wait_for("the old one goes on")
        assert "weights.safetensors is damaged" in failed["reason"]
        link.unlink()
        link.symlink_to(export)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("goes on with a new export")
        stop.set()
        asking.join()
        assert set(statuses) == {200}
        assert 'stca_reloads_total{result="failed"} 1.0' in server.client.get("/metrics").text
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("ending")
        ready = server.client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False})
        assert server.process.wait(SECONDS) == 0


def products_threads(pid):
    """Threads of a process that XLA multiplies matrices with."""
    names = [task.joinpath("comm") for task in pathlib.Path(f"/proc/{pid}/task").iterdir()]
    return sum(name.read_text().startswith("tf_XLAEigen") for name in names)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads Linux' /proc")
def test_one_thread_computes_unless_told_otherwise(export, compiled):
    with serving(export, compiled, PJRT_NPROC="3") as server:
        assert products_threads(server.process.pid) == 3
    os.environ.pop("PJRT_NPROC", None)
    with serving(export, compiled) as server:
        assert products_threads(server.process.pid) == 1


def test_a_taken_port_and_a_folder_without_a_model_are_said_at_once(tmp_path):
    def error_of(*options):
        done = subprocess.run(
            [sys.executable, "-m", "stca_jax.serving", *options],
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 1
        return done.stderr

    assert "is no exported model" in error_of(f"--model={tmp_path}", "--port=0")
    message = error_of(f"--model={tmp_path}", "--host=203.0.113.1")
    assert "cannot listen at --host=203.0.113.1 --port=8080" in message
