"""Runs a server until it is told to end: signals, draining, and going on with another export."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from stca_jax.errors import UserError, first_line
from stca_jax.files import replacing
from stca_jax.serving.model import ServingModel
from stca_jax.serving.scorer import Scorer
from stca_jax.serving.server.app import Server, ServerOptions
from stca_jax.serving.server.telemetry import Telemetry
from stca_jax.serving.server.worker import Worker

_log = logging.getLogger("stca_jax.serving")
# Seconds that a connection may be idle; those of the front process are its own to close.
_KEEP_ALIVE, _KEEP_ALIVE_FRONT = 75, 86_400
_BACKLOG = 16_384  # connections that wait to be accepted
_LONGEST_DRAIN = 30  # seconds for requests that are being answered


class Uvicorn(uvicorn.Server):
    """Leaves signals to those who run it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own."""
        yield


def uvicorn_config(app: Any, *, of_front: bool = False) -> uvicorn.Config:
    """How every process of a server speaks HTTP.

    Args:
      app: In ASGI.
      of_front: Whether it is a worker, which a front process asks.
    """
    return uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=_LONGEST_DRAIN, backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_FRONT if of_front else _KEEP_ALIVE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """How a server goes on and ends.

    Attributes:
      model: Path of the export, such as a link that is set to another before SIGHUP.
      warm_up: Numbers of candidates that another export is compiled for before it answers.
      drain_seconds: After SIGTERM, how long /v2/health/ready says no before the sockets close.
      served_file: Names the export that serves, for a worker that is started again while `model` is
        a bad one.
    """

    model: pathlib.Path
    warm_up: Sequence[int]
    drain_seconds: float
    served_file: pathlib.Path | None = None

    def note(self, model: ServingModel) -> None:
        """Says which export serves."""
        if self.served_file is not None:
            with replacing(self.served_file) as file:
                file.write(os.fsencode(model.directory))


def run(
    scorer: Scorer, options: ServerOptions, operation: Operation, sockets: list[socket.socket]
) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP goes on with what lies at the model's path then.

    Args:
      scorer: What answers.
      options: What an operator may set.
      operation: How it goes on and ends.
      sockets: Bound, to listen at.
    """
    operation.note(scorer.model)
    telemetry = Telemetry()
    worker = Worker(scorer, max_waiting=options.max_waiting, timed=telemetry.stage)
    telemetry.watch(worker)
    server = Server(worker, telemetry, options)
    of_front = sockets[0].family == socket.AF_UNIX
    http = Uvicorn(uvicorn_config(server.app, of_front=of_front))
    try:
        asyncio.run(_serve(http, server, operation, sockets))
    finally:
        worker.close()
        scorer.histories.close()
    _log.info("ended")


async def _serve(
    http: Uvicorn, server: Server, operation: Operation, sockets: list[socket.socket]
) -> None:
    loop = asyncio.get_running_loop()
    reloading = threading.Lock()

    def end() -> None:
        http.should_exit = True

    def drain() -> None:
        server.is_ready = False
        _log.info("SIGTERM: ending", extra={"fields": {"drain_seconds": operation.drain_seconds}})
        loop.call_later(operation.drain_seconds, end)

    def reload() -> None:
        with reloading:
            _reload(server, operation)

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGINT, end)
    loop.add_signal_handler(
        signal.SIGHUP, lambda: threading.Thread(target=reload, daemon=True).start()
    )
    for listening in sockets:  # who reads that it is ready may connect at once
        listening.listen(_BACKLOG)
    _log.info("ready", extra={"fields": {"model_version": server.scorer.model.info.version}})
    await http.serve(sockets)


def _reload(server: Server, operation: Operation) -> None:
    """Goes on with another export if it is sound, else with the one that serves."""
    scorer = server.scorer
    try:
        scorer.reload(operation.model.resolve(), warm_up=operation.warm_up)
    except (UserError, OSError) as error:
        server.telemetry.reloaded("failed")
        fields = {"reason": first_line(error), "model_version": scorer.model.info.version}
        _log.error("the new export cannot serve; the old one goes on", extra={"fields": fields})
        return
    operation.note(scorer.model)
    server.telemetry.reloaded("succeeded")
    fields = {"model_version": scorer.model.info.version}
    _log.info("goes on with a new export", extra={"fields": fields})
