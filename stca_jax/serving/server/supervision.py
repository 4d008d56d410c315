"""Worker processes: started, awaited, started again when they end, told to reload and to end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Sequence

from stca_jax.errors import UserError
from stca_jax.serving.server.upstream import Upstream

_log = logging.getLogger("stca_jax.serving")
WORKER = "STCA_SERVING_WORKER"  # its number, in the environment of a worker
SERVED = "STCA_SERVING_SERVED"  # a file that names the export that the worker served last
_POLL_SECONDS = 0.05
_LONGEST_PAUSE = 30.0  # seconds before a worker is started again
_LONGEST_END = 35.0  # seconds


@dataclasses.dataclass
class WorkerProcess:
    """One worker.

    Attributes:
      number: From 0.
      command: That runs it.
      socket: Path of its Unix socket.
      upstream: Asks it.
      is_ready: Whether it answers.
      starts: How often it was started.
    """

    number: int
    command: Sequence[str]
    socket: str
    upstream: Upstream = dataclasses.field(init=False)
    is_ready: bool = False
    starts: int = 0
    _process: asyncio.subprocess.Process | None = None
    _must_reload: bool = False
    _is_ending: bool = False

    def __post_init__(self) -> None:
        self.upstream = Upstream(functools.partial(asyncio.open_unix_connection, self.socket))

    async def keep(self) -> None:
        """Runs it, again whenever it ends, until `end` is called.

        Raises:
          UserError: it never became ready; its own output says why.
        """
        pause, was_ready = 0.0, False
        while not self._is_ending:
            process = await self._start()
            self.is_ready = await self._becomes_ready(process)
            was_ready = was_ready or self.is_ready
            if self.is_ready:
                pause = 0.0
                if self._must_reload:
                    self.reload()
            status = await process.wait()
            self.is_ready = False
            self.upstream.close()
            if self._is_ending:
                return
            if not was_ready:
                raise UserError(f"worker {self.number} did not start: see above")
            fields = {"worker": str(self.number), "status": status, "pause_seconds": pause}
            _log.error("a worker ended and is started again", extra={"fields": fields})
            await asyncio.sleep(pause)
            pause = min(2 * pause + 0.5, _LONGEST_PAUSE)

    async def _start(self) -> asyncio.subprocess.Process:
        self.starts += 1
        self._must_reload = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        own = {WORKER: str(self.number), SERVED: f"{self.socket}.served"}
        # A session of its own, so that Ctrl-C reaches the front alone; the pipe, which nobody
        # writes to, ends when the front does.
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            env={**os.environ, **own},
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        fields = {"worker": str(self.number), "pid": self._process.pid}
        _log.info("a worker starts", extra={"fields": fields})
        return self._process

    async def _becomes_ready(self, process: asyncio.subprocess.Process) -> bool:
        while process.returncode is None:
            with contextlib.suppress(OSError):
                answer = await self.upstream.ask("GET", b"/v2/health/ready")
                if answer.status == 200:
                    return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    def reload(self) -> None:
        """Has it go on with what --model names now."""
        if self.is_ready:
            self._send(signal.SIGHUP)
        else:
            self._must_reload = True  # it may have read the old one already

    async def end(self) -> None:
        """Has it answer what has come and end; kills it if it does not."""
        self._is_ending = True
        process = self._process
        if process is None:
            return
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _LONGEST_END)
        except TimeoutError:
            self._send(signal.SIGKILL)
            await process.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def end_with_parent() -> None:
    """Ends this worker at once when its front does: two servers must not append to one cache.

    What a front deletes that ends by itself goes as well: the worker's files, and their folder with
    the last of them.
    """
    served = pathlib.Path(os.environ[SERVED])

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock would be held at the end
            pass
        with contextlib.suppress(OSError):  # whatever comes, it ends
            for file in (served, served.with_suffix("")):
                file.unlink(missing_ok=True)
            served.parent.rmdir()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
