"""A server as a process, and what is sent to it and read from it."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np

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
        self.log = []
        self.started = {}  # process ids of workers by their names, as of the lines read
        threading.Thread(target=self._read, daemon=True).start()
        self.port = self.wait_for("listening")["port"]
        has_workers = any(option.startswith("--workers") for option in options)
        self.wait_for("all workers are ready" if has_workers else "ready")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=SECONDS)

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, message):
        """The fields of the next line that says so."""
        while (line := self.lines.get(timeout=SECONDS)) is not None:
            # XLA writes lines of its own.
            fields = json.loads(line) if line.startswith("{") else {"message": ""}
            if fields["message"] == "a worker starts":
                self.started[fields["worker"]] = fields["pid"]
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
