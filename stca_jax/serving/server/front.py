"""The process in front of several workers: each user's requests go to the same one.

    client ── front ──┬── worker 0   users whose id hashes to 0, their pages
                      ├── worker 1
                      └── worker 2

A worker caches users by appending to them in place, so that no two may have the same user. The
front decodes nothing but the user's id. While a worker is started again, its users are answered
503.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
import socket
import tempfile
from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stca_jax.errors import UserError
from stca_jax.serving.server import protocol
from stca_jax.serving.server.answers import RETRY, error_answer, json_answer, read_body
from stca_jax.serving.server.app import ServerOptions
from stca_jax.serving.server.running import Uvicorn, uvicorn_config
from stca_jax.serving.server.supervision import WorkerProcess
from stca_jax.serving.server.telemetry import CONTENT_TYPE, merge
from stca_jax.serving.server.upstream import Answer

_log = logging.getLogger("stca_jax.serving")
_USERS = "/v1/users/"
_FORWARDED = ("authorization", "content-type", protocol.HEADER_LENGTH)
_RETURNED = ("content-type", "retry-after", "www-authenticate", "allow", protocol.HEADER_LENGTH)
_METHODS = ("GET", "POST", "PUT", "DELETE")


def worker_of(user: str, num_workers: int) -> int:
    """Which worker has a user: the same in every process."""
    digest = hashlib.blake2b(user.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) % num_workers


def run_front(
    command: Sequence[str],
    num_workers: int,
    options: ServerOptions,
    drain_seconds: float,
    listening: socket.socket,
) -> None:
    """Serves by several workers until SIGTERM or SIGINT; SIGHUP has all of them reload.

    Args:
      command: That runs a worker, but for the address that it listens at.
      num_workers: At least one.
      options: Those of the workers.
      drain_seconds: After SIGTERM, how long /v2/health/ready says no before the socket closes.
      listening: Bound.

    Raises:
      UserError: a worker did not start.
    """
    with tempfile.TemporaryDirectory(prefix="stca-") as folder:
        workers = []
        for k in range(num_workers):
            path = f"{folder}/{k}"
            own = [*command, "--workers=1", f"--host=unix:{path}"]
            workers.append(WorkerProcess(k, own, path))
        front = Front(workers, options)
        asyncio.run(_serve(front, drain_seconds, listening))
    _log.info("ended")


async def _serve(front: Front, drain_seconds: float, listening: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    http = Uvicorn(uvicorn_config(front))

    def end() -> None:
        http.should_exit = True

    def drain() -> None:
        front.is_ready = False
        _log.info("SIGTERM: ending", extra={"fields": {"drain_seconds": drain_seconds}})
        loop.call_later(drain_seconds, end)

    def reload() -> None:
        for worker in front.workers:
            worker.reload()

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGINT, end)
    loop.add_signal_handler(signal.SIGHUP, reload)
    kept = [asyncio.create_task(worker.keep()) for worker in front.workers]
    saying = asyncio.create_task(_say_ready(front))
    for task in kept:
        task.add_done_callback(lambda _: end())  # only an error ends one before its time
    try:
        await http.serve([listening])
    finally:
        saying.cancel()
        await asyncio.gather(*(worker.end() for worker in front.workers))
        ended = await asyncio.gather(*kept, return_exceptions=True)
    for error in ended:
        if isinstance(error, BaseException):
            raise error


async def _say_ready(front: Front) -> None:
    while not front.all_ready:
        await asyncio.sleep(0.05)
    _log.info("all workers are ready", extra={"fields": {"workers": len(front.workers)}})


class Front:
    """The application, in ASGI.

    Attributes:
      workers: By number.
      is_ready: Whether new requests should come; false while it ends.
    """

    def __init__(self, workers: Sequence[WorkerProcess], options: ServerOptions):
        """Nothing is started yet."""
        self.workers = workers
        self.is_ready = True
        self._options = options
        self._model = f"/v2/models/{options.name}"

    @property
    def all_ready(self) -> bool:
        """Whether every worker answers."""
        return all(worker.is_ready for worker in self.workers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's protocol."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        try:
            response = await self._answer(Request(scope, receive))
        except HTTPException as error:
            response = error_answer(error.status_code, error.detail)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            _log.exception("request failed")
            response = error_answer(500, "the server failed; its log says why")
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path, method = request.scope["path"], request.method
        if path == "/v2/health/live" and method == "GET":
            return json_answer({"live": True})
        if path in ("/v2/health/ready", f"{self._model}/ready") and method == "GET":
            is_ready = self.is_ready and self.all_ready
            return json_answer({"ready": is_ready}, 200 if is_ready else 503)
        if method not in _METHODS:
            raise HTTPException(405, "Method Not Allowed")
        if path == "/metrics" and method == "GET":
            return await self._metrics(request)
        body = await read_body(request, self._options.max_body_bytes)
        return await self._forward(self._worker(request, body), request, body)

    def _worker(self, request: Request, body: bytes) -> WorkerProcess:
        """That of the user; of a request without one, any: it says what is wrong, or what it is."""
        path = request.scope["path"]  # decoded, as a worker reads it
        user = None
        if path.startswith(_USERS):
            user = path.removeprefix(_USERS)
            if request.method != "DELETE":
                user = user.rpartition("/")[0]
        elif path == f"{self._model}/infer":
            with contextlib.suppress(UserError):
                user = protocol.user_of(body, request.headers.get(protocol.HEADER_LENGTH))
        if user is None:
            return next((w for w in self.workers if w.is_ready), self.workers[0])
        return self.workers[worker_of(user, len(self.workers))]

    async def _forward(self, worker: WorkerProcess, request: Request, body: bytes) -> Response:
        if worker.upstream.num_asked > self._options.max_waiting + 1:
            return error_answer(503, f"{self._options.max_waiting} requests wait already", RETRY)
        try:
            if not worker.is_ready:
                raise ConnectionError
            answer = await self._ask(worker, request, body)
        except OSError:
            return error_answer(
                503,
                f"worker {worker.number}, which has this user, is being started again: send the "
                "request once more; events with the same ids count once",
                RETRY,
            )
        headers = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
        return Response(answer.body, answer.status, headers)

    async def _ask(self, worker: WorkerProcess, request: Request, body: bytes) -> Answer:
        target, query = request.scope["raw_path"], request.scope["query_string"]
        headers = [
            (name.encode(), request.headers[name].encode("latin-1"))
            for name in _FORWARDED
            if name in request.headers
        ]
        if query:
            target = target + b"?" + query
        return await worker.upstream.ask(request.method, target, headers, body)

    async def _metrics(self, request: Request) -> Response:
        """Those of all workers that answer, labelled, and which do."""
        up = GaugeMetricFamily("stca_worker_up", "Whether a worker answers.", labels=["worker"])
        starts = CounterMetricFamily(
            "stca_worker_starts", "Starts of a worker; one without trouble.", labels=["worker"]
        )
        texts: dict[str, str] = {}
        for worker in self.workers:
            name = str(worker.number)
            up.add_metric([name], float(worker.is_ready))
            starts.add_metric([name], worker.starts)
            if not worker.is_ready:
                continue
            with contextlib.suppress(OSError):
                answer = await self._ask(worker, request, b"")
                if answer.status != 200:
                    return Response(answer.body, answer.status, {"www-authenticate": "Bearer"})
                texts[name] = answer.body.decode()
        return Response(merge(texts, [up, starts]), headers={"content-type": CONTENT_TYPE})
