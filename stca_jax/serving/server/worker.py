"""The one thread that owns a scorer, and the queue in front of it.

Scores and appends of a user are answered in the order in which they came: an append changes the
cache in place. On an accelerator, scores that wait side by side become one call.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from stca_jax.serving.score_request import ScoreRequest
from stca_jax.serving.scorer import Scorer

_SCORES_AT_ONCE = 64
Timed = Callable[[str, float], None]  # (stage, seconds)


class BusyError(Exception):
    """As many tasks wait as may."""


class LateError(Exception):
    """The deadline passed before the task's turn."""


@dataclasses.dataclass(eq=False)
class _Task:
    """Something to do for a client.

    Attributes:
      work: A request to score, or a function to call.
      deadline: When nobody waits any longer, on the monotonic clock.
      loop: Where the client waits …
      future: … for this.
      submitted: When it came.
    """

    work: ScoreRequest | Callable[[], Any]
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    submitted: float = dataclasses.field(default_factory=time.monotonic)

    def finish(self, result: Any) -> None:
        """Gives the client a result, or an exception to raise."""
        self.loop.call_soon_threadsafe(self._finish, result)

    def _finish(self, result: Any) -> None:
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Worker:
    """Does tasks one after the other, in a thread of its own."""

    def __init__(self, scorer: Scorer, *, max_waiting: int, timed: Timed):
        """Starts the thread.

        Args:
          scorer: Used by this thread only, but for `reload`.
          max_waiting: Tasks that may wait.
          timed: Told how long tasks waited ("queue") and took ("score", "call").
        """
        self.scorer = scorer
        self._max_waiting = max_waiting
        self._timed = timed
        self._tasks: collections.deque[_Task] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Tasks in the queue."""
        return len(self._tasks)

    async def do(self, work: ScoreRequest | Callable[[], Any], seconds: float) -> Any:
        """Scores a request, or calls a function, when it is its turn.

        Args:
          work: What to do.
          seconds: From now on; after that, it is not begun.

        Raises:
          BusyError: too many tasks wait.
          LateError: the time passed before its turn.
          UserError: see `Scorer`.
        """
        loop = asyncio.get_running_loop()
        task = _Task(work, time.monotonic() + seconds, loop, loop.create_future())
        with self._changed:
            if self._is_closed or len(self._tasks) >= self._max_waiting:
                raise BusyError
            self._tasks.append(task)
            self._changed.notify()
        return await task.future

    def close(self) -> None:
        """Ends the thread once nothing waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while tasks := self._next():
            now = time.monotonic()
            in_time = []
            for task in tasks:
                self._timed("queue", now - task.submitted)
                if task.deadline < now:
                    task.finish(LateError())
                elif not task.future.cancelled():
                    in_time.append(task)
            if in_time:
                self._do(in_time)

    def _next(self) -> list[_Task]:
        """The next task, with the scores that follow it if it is one; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._is_closed)
            if not self._tasks:
                return []
            tasks = [self._tasks.popleft()]
            if isinstance(tasks[0].work, ScoreRequest):
                while (
                    self._tasks
                    and isinstance(self._tasks[0].work, ScoreRequest)
                    and len(tasks) < _SCORES_AT_ONCE
                ):
                    tasks.append(self._tasks.popleft())
            return tasks

    def _do(self, tasks: list[_Task]) -> None:
        started = time.monotonic()
        first = tasks[0].work
        try:
            if isinstance(first, ScoreRequest):
                requests = [t.work for t in tasks if isinstance(t.work, ScoreRequest)]
                results: list[Any] = list(self.scorer.score_many(requests))
                stage = "score"
            else:
                results, stage = [first()], "call"
        except BaseException as error:  # the thread must live on, and the client must hear of it
            results, stage = [error] * len(tasks), "error"
        self._timed(stage, (time.monotonic() - started) / len(tasks))
        for task, result in zip(tasks, results, strict=True):
            task.finish(result)
