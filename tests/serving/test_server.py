"""The server as a process: scores over HTTP, restarts, drains, reloads, and what it refuses."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest

from stca_jax.export.replay import replay

SECONDS = 400  # for a start, on a busy machine


class Process:
    """A server, and the lines of its log."""

    def __init__(self, model, *options, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stca_jax.serving", f"--model={model}", "--port=0",
             "--encoded", "--deadline=60", "--warm_up=1", *options],
            stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = self.wait_for("listening")["port"]
        self.wait_for("ready")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=SECONDS)

    def _read(self):
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, message):
        """The fields of the next line that says so."""
        while (line := self.lines.get(timeout=SECONDS)) is not None:
            # XLA writes lines of its own.
            fields = json.loads(line) if line.startswith("{") else {"message": ""}
            if message in fields["message"]:
                return fields
        raise AssertionError(f"the log ended without {message!r}")

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def serving(model, *options, **environment):
    server = Process(model, *options, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return f"--compilation_cache={tmp_path_factory.mktemp('compiled')}"


def body_of(events):
    features = {name: column.tolist() for name, column in events.columns.items()}
    ids = {"ids": list(events.ids)} if events.ids is not None else {}
    return {"time": events.time.tolist(), "features": features, **ids}


def answers(server, replayed, expected):
    """Largest difference of probabilities over replayed requests, events appended on the way."""
    worst = 0.0
    for step in replayed:
        user = step.request.user
        if len(step.new):
            answer = server.client.post(f"/v1/users/{user}/events", json=body_of(step.new))
            assert answer.status_code == 200, answer.text
            assert answer.json() == {"appended": len(step.new)}
        answer = server.client.post(f"/v1/users/{user}/score", json=score_body(step.request))
        assert answer.status_code == 200, answer.text
        found = np.stack(list(answer.json()["probabilities"].values()), -1)
        right = 1 / (1 + np.exp(-expected[step.request_id].astype(np.float64)))
        worst = max(worst, np.abs(found - right).max())
    return worst


def score_body(request):
    return {
        "targets": {name: np.asarray(v).tolist() for name, v in request.targets.items()},
        "request": {name: np.asarray(v).item() for name, v in request.request.items()},
        "time": request.time,
    }


def tensors(request, binary):
    """The request in the Open Inference Protocol: its body and headers."""
    named = {"user": [request.user], "time": [request.time]}
    named |= {f"targets/{name}": v for name, v in request.targets.items()}
    named |= {f"request/{name}": [v] for name, v in request.request.items()}
    inputs, data = [], b""
    for name, values in named.items():
        array = np.asarray(values)
        kind = {"U": "BYTES", "i": "INT64", "f": "FP64"}[array.dtype.kind]
        tensor = {"name": name, "datatype": kind, "shape": [len(array)]}
        if not binary:
            inputs.append({**tensor, "data": array.tolist()})
            continue
        if kind == "BYTES":
            texts = [text.encode() for text in array.tolist()]
            own = b"".join(len(t).to_bytes(4, "little") + t for t in texts)
        else:
            own = array.astype(np.int64 if kind == "INT64" else np.float64).tobytes()
        inputs.append({**tensor, "parameters": {"binary_data_size": len(own)}})
        data += own
    parameters = {"binary_data_output": True} if binary else {}
    text = json.dumps({"id": "7", "inputs": inputs, "parameters": parameters}).encode()
    headers = {"inference-header-content-length": str(len(text))} if binary else {}
    return text + data, headers


def outputs_of(answer):
    """Values by task, from JSON or from the bytes behind it."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    header, rest = json.loads(answer.content[:length]), answer.content[length:]
    assert header["id"] == "7"
    values = {}
    for output in header["outputs"]:
        if "data" in output:
            values[output["name"]] = np.asarray(output["data"], np.float32)
            continue
        size = output["parameters"]["binary_data_size"]
        values[output["name"]], rest = np.frombuffer(rest[:size], np.float32), rest[size:]
    assert rest == b""
    return values


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
        assert server.client.delete(f"/v1/users/{last.user}").json() == {"deleted": True}
        assert server.client.delete(f"/v1/users/{last.user}").json() == {"deleted": False}
        assert server.end() == 0
    for file in tmp_path.glob("users.sqlite*"):
        assert f'"{last.user}"'.encode() not in file.read_bytes()


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
