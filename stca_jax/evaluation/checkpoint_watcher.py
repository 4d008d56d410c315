"""Follows a training run: scores each of its checkpoints once, at every history length.

    WORKDIR/evaluation/
      checkpoints.jsonl     a line per row: {"split": "validation", "step": 500, "length": 2048, …}
      checkpoints.claims/   a file for each row that some job is at work on

Any number of jobs may follow one run. A job scores the rows that it holds the claim of, and looks
for them in the file once it holds it, so that every row is there once. A claim is a lock of the
operating system (flock) which falls when its holder dies, however it dies; then another job, or the
same one started again, scores the row. The file is replaced whole, so it never holds half a row.

Checkpoints are found by listing the directory, oldest first, since retention deletes those first.
Orbax's `checkpoints_iterator` yields the newest only: a job slower than the training would skip
some. It also releases the snapshots that other jobs hold.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from stca_jax.errors import first_line
from stca_jax.evaluation.best import Criterion, mark_best, score
from stca_jax.evaluation.tables import Row, write_table
from stca_jax.files import read_json_lines

State = TypeVar("State")
_Identity = tuple[int, int]

_MAX_READS = 3
_log = logging.getLogger(__name__)


class RowLog:
    """Result rows in one file, to which several jobs add."""

    def __init__(self, path: str | os.PathLike[str]):
        """Creates the directories of the file and of the claims; the file appears with its rows.

        Args:
          path: Ending in `.jsonl`, on a file system whose locks hold for all the jobs.
        """
        self._path = pathlib.Path(path)
        self._claims = self._path.with_suffix(".claims")
        self._claims.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, by any job."""
        # Before there was that limit, there was none.
        return [{"max_targets": None, **row} for row in read_json_lines(self._path)]

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, all or none of them."""
        with (self._claims / ".write").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_table(self._path, [*self.rows(), *rows])

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yields whether the claim is this job's; if so, no other has it until the block ends.

        Args:
          name: Of a piece of work, usable as a file name.
        """
        path = self._claims / name
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Its last holder may have removed the file after it was opened here: then the lock is
            # on a file that nobody else will find.
            if _identity(path) != _identity(file.fileno()):
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    def discard_claims(self, pattern: str) -> None:
        """Removes the claims that nobody holds: of killed jobs, on checkpoints deleted since.

        Args:
          pattern: Of their names. A job that asks for one of them right now may have to ask again.
        """
        for path in self._claims.glob(pattern):
            with self.claim(path.name):
                pass


class _Loaded(NamedTuple, Generic[State]):
    step: int
    identity: _Identity
    state: State


class CheckpointWatcher(Generic[State]):
    """Scores every checkpoint that appears in a directory, at every length."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        log: RowLog,
        lengths: Sequence[int],
        columns: Mapping[str, Any],
        *,
        steps: Callable[[], Sequence[int]],
        restore: Callable[[int], State],
        score: Callable[[State, int, int], Sequence[Row]],
    ):
        """Nothing is read yet.

        Args:
          directory: Holds one directory per checkpoint, named by its step.
          log: Where rows go.
          lengths: History lengths, in events.
          columns: Tell these rows from others of the log, such as `{"split": "validation"}`.
          steps: Lists the whole checkpoints.
          restore: Reads the checkpoint of a step.
          score: (state, step, length) -> rows; "step", "length" and `columns` are put before them.
        """
        self._directory = pathlib.Path(directory)
        self._rows = log
        self._lengths = tuple(lengths)
        self._columns = dict(columns)
        self._list_steps = steps
        self._restore = restore
        self._score = score
        self._steps: set[int] = set()  # there at the last look
        self._newest = 0  # of all that were ever seen
        self._loaded: _Loaded[State] | None = None
        self._reads: collections.Counter[tuple[int, _Identity | None]] = collections.Counter()
        self._failed: dict[tuple[int, int], str] = {}

    def run(
        self,
        *,
        num_steps: int,
        timeout: float | None = None,
        poll_seconds: float = 1.0,
        after_row: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Scores until the last step's checkpoint has been seen and no row is missing.

        Rows that another job holds the claim of are waited for.

        Args:
          num_steps: The last step of the training.
          timeout: End after so many seconds without a new checkpoint or row; None waits for ever.
          poll_seconds: Pause between two looks at the directory.
          after_row: Called after each row and each look.

        Returns:
          What could not be scored, and why, one line each. Failed rows are not tried again, unless
          by a later job.
        """
        news = time.monotonic()
        while True:
            progress = self._look(after_row)
            after_row()
            if progress:
                news = time.monotonic()
                continue
            if self._newest >= num_steps and not self._missing():
                break
            if timeout is not None and time.monotonic() - news >= timeout:
                _log.info("no new checkpoint in %g seconds", timeout)
                break
            time.sleep(poll_seconds)
        self._rows.discard_claims(self._claim("[0-9]*", "[0-9]*"))
        return list(self._failed.values())

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far that have this watcher's `columns`."""
        return [
            row
            for row in self._rows.rows()
            if "step" in row and all(row.get(n) == v for n, v in self._columns.items())
        ]

    def _look(self, after_row: Callable[[], None]) -> bool:
        """Scores what is missing; says whether there was a new checkpoint or row."""
        try:
            steps = set(self._list_steps())
        except Exception as error:  # one of them was deleted meanwhile
            _log.warning("the checkpoints in %s could not be listed: %s", self._directory, error)
            return False
        progress = not steps <= self._steps
        self._steps = steps
        done = [row["step"] for row in self.rows()]
        self._newest = max([self._newest, *steps, *done])
        for step in sorted({step for step, _ in self._missing()}):
            for length in self._lengths:
                if self._score_if_missing(step, length):
                    progress = True
                    after_row()
        return progress

    def _missing(self) -> list[tuple[int, int]]:
        done = {(row["step"], row["length"]) for row in self.rows()} | self._failed.keys()
        wanted = [(step, length) for step in sorted(self._steps) for length in self._lengths]
        return [key for key in wanted if key not in done]

    def _score_if_missing(self, step: int, length: int) -> bool:
        """Says whether a row was added."""
        with self._rows.claim(self._claim(step, length)) as is_mine:
            if not is_mine or (step, length) not in self._missing():
                return False
            state = self._state(step)
            if state is None:
                return False
            started = time.perf_counter()
            try:
                rows = self._score(state, step, length)
            except Exception as error:  # must not stop the other lengths
                self._fail(step, length, error)
                return False
            key = {**self._columns, "step": step, "length": length}
            self._rows.add([{**key, **row} for row in rows])
            seconds = time.perf_counter() - started
            _log.info("checkpoint %d at length %d: %.1f s", step, length, seconds)
            return True

    def _claim(self, step: int | str, length: int | str) -> str:
        """The name of a row's claim, or the pattern of some."""
        return "-".join(map(str, [*self._columns.values(), step, length]))

    def _state(self, step: int) -> State | None:
        """The state of a checkpoint; None if it cannot be read, now or at all."""
        path = self._directory / str(step)
        identity = _identity(path)
        # One that was deleted since it was read is as good as ever, one replaced is not.
        if self._loaded and self._loaded.step == step and identity in (self._loaded.identity, None):
            return self._loaded.state
        self._loaded = None  # so that two states never lie in memory
        if identity is None:
            _log.warning("checkpoint %d was deleted before it was scored", step)
            return None
        try:
            state = self._restore(step)
            if _identity(path) != identity:
                raise OSError("it was deleted or replaced while it was read")
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._reads[step, identity] += 1
            _log.warning("checkpoint %d could not be read: %s", step, first_line(error))
            if self._reads[step, identity] >= _MAX_READS:  # it is not being deleted: it is damaged
                for length in self._lengths:
                    self._fail(step, length, error)
            return None
        self._loaded = _Loaded(step, identity, state)
        return state

    def _fail(self, step: int, length: int, error: Exception) -> None:
        message = f"checkpoint {step} at length {length}: {first_line(error)}"
        self._failed[step, length] = message
        _log.error("%s", message)


def mark_best_checkpoint(
    workdir: str | os.PathLike[str], rows: Sequence[Row], criterion: Criterion
) -> None:
    """Marks the best checkpoint that still exists, so that retention never deletes it.

    Args:
      workdir: Of the run.
      rows: Of its checkpoints.
      criterion: What decides; rows of other lengths do not count.
    """
    of_step = collections.defaultdict(list)
    for row in rows:
        if row["length"] == criterion.length:
            of_step[row["step"]].append(row)
    checkpoints = pathlib.Path(workdir) / "checkpoints"
    values = {
        step: score(rows, criterion.metric)
        for step, rows in of_step.items()
        if (checkpoints / str(step)).exists()
    }
    if values:
        mark_best(workdir, values, criterion)


def _identity(path: pathlib.Path | int) -> _Identity | None:
    """Changes when a directory is replaced or its entries change; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
