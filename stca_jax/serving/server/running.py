"""Runs a server until it is told to end: signals, draining, and going on with another export."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from stca_jax.errors import UserError, first_line
from stca_jax.serving.model import BUCKETS
from stca_jax.serving.scorer import Scorer
from stca_jax.serving.server.app import Server, ServerOptions
from stca_jax.serving.server.telemetry import Telemetry
from stca_jax.serving.server.worker import Worker

_log = logging.getLogger("stca_jax.serving")
_LONGEST_DRAIN = 30  # seconds for requests that are being answered


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    scorer: Scorer,
    model: pathlib.Path,
    options: ServerOptions,
    sockets: list[socket.socket],
    drain_seconds: float,
) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP goes on with what lies at `model` then.

    Args:
      scorer: What answers.
      model: Path of the export, such as a link that is set to another.
      options: What an operator may set.
      sockets: Bound, to listen at.
      drain_seconds: After SIGTERM, how long /v2/health/ready says no before the sockets close.
    """
    telemetry = Telemetry()
    worker = Worker(scorer, max_waiting=options.max_waiting, timed=telemetry.stage)
    telemetry.watch(worker)
    server = Server(worker, telemetry, options)
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=_LONGEST_DRAIN, backlog=16_384,
    )  # fmt: skip
    try:
        asyncio.run(
            _serve(_Uvicorn(config), server, scorer, telemetry, model, sockets, drain_seconds)
        )
    finally:
        worker.close()
        scorer.histories.close()
    _log.info("ended")


async def _serve(
    http: _Uvicorn,
    server: Server,
    scorer: Scorer,
    telemetry: Telemetry,
    model: pathlib.Path,
    sockets: list[socket.socket],
    drain_seconds: float,
) -> None:
    loop = asyncio.get_running_loop()
    reloading = threading.Lock()

    def end() -> None:
        http.should_exit = True

    def drain() -> None:
        server.is_ready = False
        _log.info("SIGTERM: ending", extra={"fields": {"drain_seconds": drain_seconds}})
        loop.call_later(drain_seconds, end)

    def reload() -> None:
        with reloading:
            _reload(scorer, telemetry, model)

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGINT, end)
    loop.add_signal_handler(
        signal.SIGHUP, lambda: threading.Thread(target=reload, daemon=True).start()
    )
    _log.info("ready", extra={"fields": {"model_version": scorer.model.info.version}})
    await http.serve(sockets)


def _reload(scorer: Scorer, telemetry: Telemetry, model: pathlib.Path) -> None:
    """Goes on with another export if it is sound, else with the one that serves."""
    try:
        scorer.reload(model.resolve(), warm_up=BUCKETS)
    except (UserError, OSError) as error:
        telemetry.reloaded("failed")
        fields = {"reason": first_line(error), "model_version": scorer.model.info.version}
        _log.error("the new export cannot serve; the old one goes on", extra={"fields": fields})
        return
    telemetry.reloaded("succeeded")
    fields = {"model_version": scorer.model.info.version}
    _log.info("goes on with a new export", extra={"fields": fields})
