"""Histories in SQLite, which every Python brings along: the default `HistoryStore`.

A user's events lie in chunks of columns, sorted by (time, sequence):

    user   chunk   first, last time   events   layout            data
    u7     0       100    340         256      dtype of a row    the rows' bytes
    u7     1       340    355          12
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from stca_jax.errors import UserError
from stca_jax.serving.events import Events
from stca_jax.serving.histories import Change, new_revision

CHUNK = 256  # events; late ones may make a chunk twice as long
_TIME, _SEQUENCE = "time", "sequence"  # of a row, before the columns, which begin with ":"


class _Chunk(NamedTuple):
    number: int
    rows: np.ndarray  # structured


_SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    user TEXT PRIMARY KEY, next_sequence INTEGER NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chunks (
    user TEXT NOT NULL, chunk INTEGER NOT NULL, first_time INTEGER NOT NULL,
    last_time INTEGER NOT NULL, events INTEGER NOT NULL, layout TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (user, chunk)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (
    user TEXT NOT NULL, id TEXT NOT NULL, sequence INTEGER NOT NULL,
    PRIMARY KEY (user, id)) WITHOUT ROWID;
SELECT revision FROM users LIMIT 0;  -- an error if the file is of another layout
"""


class SqliteHistories:
    """A file, or memory.

    Several processes may share the file. What was acknowledged outlives the kill of the process;
    with `sync=True` also a loss of power, at the price of a write to disk for every append.
    """

    def __init__(self, path: str | os.PathLike[str] = ":memory:", *, sync: bool = False):
        """Opens the file, or makes it.

        Raises:
          UserError: it cannot be opened, or is no database.
        """
        self._path = os.fspath(path)
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(
                self._path, check_same_thread=False, isolation_level=None, timeout=10
            )
            # Deleted events are overwritten.
            for pragma in ("journal_mode=WAL", "secure_delete=ON",
                           f"synchronous={'FULL' if sync else 'NORMAL'}"):  # fmt: skip
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"histories {self._path!r} cannot be opened: {error}") from None

    def read(self, user: str, limit: int, before: int | None = None) -> Events:
        """See `HistoryStore`."""
        query = "SELECT chunk, layout, data FROM chunks WHERE user = ?"
        values: list[Any] = [user]
        if before is not None:
            query += " AND first_time < ?"
            values.append(before)
        parts: list[np.ndarray] = []
        missing = limit
        with self._lock, self._errors():
            for _, layout, data in self._db.execute(query + " ORDER BY chunk DESC", values):
                rows = np.frombuffer(data, _dtype(layout))
                if before is not None:
                    rows = rows[rows[_TIME] < before]
                parts.append(rows[max(len(rows) - missing, 0) :])
                missing -= len(parts[-1])
                if missing <= 0:
                    break
        return _events(_concatenate(parts[::-1]))

    def revision(self, user: str) -> int | None:
        """See `HistoryStore`."""
        with self._lock, self._errors():
            return self._state(user)[1]

    def append(self, user: str, events: Events) -> Change:
        """See `HistoryStore`."""
        sequence = np.full(len(events), -1, np.int64)
        with self._transaction() as db:
            new = np.ones(len(events), bool)
            if events.ids is not None:
                new = self._unknown(user, events.ids)
            first, before = self._state(user)
            count = int(new.sum())
            if not count:
                return Change(sequence, before, before)
            sequence[new] = np.arange(first, first + count)
            after = new_revision()
            db.execute(
                "INSERT OR REPLACE INTO users VALUES (?, ?, ?)", (user, first + count, after)
            )
            if events.ids is not None:
                named = zip(events.ids, sequence.tolist(), strict=True)
                db.executemany(
                    "INSERT INTO ids VALUES (?, ?, ?)",
                    [(user, name, k) for name, k in named if k >= 0],
                )
            rows = _rows(events.select(new), sequence[new])
            self._insert(user, rows[np.lexsort((rows[_SEQUENCE], rows[_TIME]))])
        return Change(sequence, before, after)

    def update(self, user: str, events: Events) -> Change:
        """See `HistoryStore`."""
        if events.ids is None:
            raise UserError("events to update need ids, by which they were appended")
        with self._transaction() as db:
            sequence = np.empty(len(events), np.int64)
            for k, name in enumerate(events.ids):
                found = db.execute(
                    "SELECT sequence FROM ids WHERE user = ? AND id = ?", (user, name)
                ).fetchone()
                if found is None:
                    raise UserError(f"the user has no event with id {name!r}: append it first")
                sequence[k] = found[0]
            rows = _rows(events, sequence)
            for chunk in self._chunks(user):
                places = np.flatnonzero(np.isin(chunk.rows[_SEQUENCE], sequence))
                if not len(places):
                    continue
                by_sequence = {int(s): row for s, row in zip(sequence, rows, strict=True)}
                old = chunk.rows[places]
                changed = np.array([by_sequence[int(s)] for s in old[_SEQUENCE]], rows.dtype)
                changed[_TIME] = old[_TIME]
                merged = _concatenate([chunk.rows, changed])
                merged[places] = merged[len(chunk.rows) :]
                self._write(user, _Chunk(chunk.number, merged[: len(chunk.rows)]))
            _, before = self._state(user)
            after = new_revision()
            db.execute("UPDATE users SET revision = ? WHERE user = ?", (after, user))
        return Change(sequence, before, after)

    def delete(self, user: str) -> bool:
        """See `HistoryStore`; the pages of the file and its log are overwritten."""
        with self._transaction() as db:
            for table in ("chunks", "ids"):
                db.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
            was_there = db.execute("DELETE FROM users WHERE user = ?", (user,)).rowcount > 0
        if was_there:
            with self._lock:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return was_there

    def close(self) -> None:
        """See `HistoryStore`."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"histories {self._path!r}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # not after a full disk
                    self._db.execute("ROLLBACK")
                raise

    def _state(self, user: str) -> tuple[int, int | None]:
        """The user's next sequence number and revision."""
        found = self._db.execute(
            "SELECT next_sequence, revision FROM users WHERE user = ?", (user,)
        ).fetchone()
        return found or (0, None)

    def _unknown(self, user: str, ids: Any) -> np.ndarray:
        """Which ids the user does not have; of equal ones the first."""
        unknown = np.zeros(len(ids), bool)
        seen: set[str] = set()
        for k, name in enumerate(ids):
            known = self._db.execute(
                "SELECT 1 FROM ids WHERE user = ? AND id = ?", (user, name)
            ).fetchone()
            unknown[k] = known is None and name not in seen
            seen.add(name)
        return unknown

    def _insert(self, user: str, rows: np.ndarray) -> None:
        """Puts sorted rows where they belong by time, after equal times."""
        tail = self._db.execute(
            "SELECT chunk, last_time, events FROM chunks WHERE user = ? "
            "ORDER BY chunk DESC LIMIT 1",
            (user,),
        ).fetchone()
        number, last_time, size = tail or (-1, None, CHUNK)
        on_time = np.ones(len(rows), bool) if tail is None else rows[_TIME] >= last_time
        late, rows = rows[~on_time], rows[on_time]
        if len(rows) and size < CHUNK:
            (chunk,) = self._chunks(user, number)
            taken, rows = rows[: CHUNK - size], rows[CHUNK - size :]
            self._write(user, _Chunk(number, _concatenate([chunk.rows, taken])))
        elif len(rows) and tail is not None:  # columns are checked against those before
            _concatenate([self._chunks(user, number)[0].rows[:1], rows[:1]])
        for start in range(0, len(rows), CHUNK):
            number += 1
            self._write(user, _Chunk(number, rows[start : start + CHUNK]))
        while len(late):
            late = late[self._insert_late(user, late) :]

    def _insert_late(self, user: str, late: np.ndarray) -> int:
        """Puts the first of sorted rows, and those that belong into the same chunk, there."""
        at = self._db.execute(
            "SELECT max(chunk) FROM chunks WHERE user = ? AND first_time <= ?",
            (user, int(late[_TIME][0])),
        ).fetchone()[0]
        number = 0 if at is None else at
        following = self._db.execute(
            "SELECT first_time FROM chunks WHERE user = ? AND chunk = ?", (user, number + 1)
        ).fetchone()
        count = len(late)
        if following is not None:
            count = max(1, int((late[_TIME] < following[0]).sum()))
        (chunk,) = self._chunks(user, number)
        merged = _concatenate([chunk.rows, late[:count]])
        merged = merged[np.lexsort((merged[_SEQUENCE], merged[_TIME]))]
        parts = [merged]
        if len(merged) > 2 * CHUNK:
            parts = [merged[start : start + CHUNK] for start in range(0, len(merged), CHUNK)]
            # Two steps, since a number may be taken only once at any moment.
            shift = "UPDATE chunks SET chunk = -(chunk + ?) WHERE user = ? AND chunk > ?"
            self._db.execute(shift, (len(parts) - 1, user, number))
            self._db.execute("UPDATE chunks SET chunk = -chunk WHERE user = ? AND chunk < 0",
                             (user,))  # fmt: skip
        for k, part in enumerate(parts):
            self._write(user, _Chunk(number + k, part))
        return count

    def _chunks(self, user: str, number: int | None = None) -> list[_Chunk]:
        query = "SELECT chunk, layout, data FROM chunks WHERE user = ?"
        values: tuple[Any, ...] = (user,)
        if number is not None:
            query, values = query + " AND chunk = ?", (user, number)
        return [
            _Chunk(n, np.frombuffer(data, _dtype(layout)))
            for n, layout, data in self._db.execute(query, values).fetchall()
        ]

    def _write(self, user: str, chunk: _Chunk) -> None:
        rows = chunk.rows
        first, last = int(rows[_TIME][0]), int(rows[_TIME][-1])
        layout = json.dumps(rows.dtype.descr)
        self._db.execute(
            "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)",
            (user, chunk.number, first, last, len(rows), layout, rows.tobytes()),
        )


@functools.lru_cache(maxsize=256)
def _dtype(layout: str) -> np.dtype:
    return np.dtype([(name, kind) for name, kind in json.loads(layout)])


def _rows(events: Events, sequence: np.ndarray) -> np.ndarray:
    columns = {_TIME: events.time, _SEQUENCE: sequence}
    columns |= {f":{name}": column for name, column in sorted(events.columns.items())}
    # A text of no characters would have no bytes.
    dtypes = [(n, np.promote_types(c.dtype, "U1") if c.dtype.kind == "U" else c.dtype)
              for n, c in columns.items()]  # fmt: skip
    rows = np.zeros(len(events), dtypes)
    for name, column in columns.items():
        rows[name] = column
    return rows


def _events(rows: np.ndarray) -> Events:
    columns = {
        name.removeprefix(":"): np.ascontiguousarray(rows[name])
        for name in rows.dtype.names or ()
        if name.startswith(":")
    }
    sequence = np.ascontiguousarray(rows[_SEQUENCE])
    return Events(np.ascontiguousarray(rows[_TIME]), columns, None, sequence)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """Rows one after the other, in a layout that holds all of them.

    Raises:
      UserError: they have other columns, or texts where others have numbers; names them.
    """
    if not parts:
        return np.empty(0, [(_TIME, np.int64), (_SEQUENCE, np.int64)])
    first, *others = parts
    dtypes = {name: first.dtype[name] for name in first.dtype.names or ()}
    for part in others:
        if part.dtype.names != first.dtype.names:
            known, given = (
                ", ".join(n[1:] for n in p.dtype.names or () if n.startswith(":"))
                for p in (first, part)
            )
            raise UserError(f"the events have columns {given}, but the user's earlier ones {known}")
        for name in dtypes:
            old, new = dtypes[name], part.dtype[name]
            if (old.kind == "U") != (new.kind == "U"):
                raise UserError(
                    f"{name[1:]!r} is {'text' if new.kind == 'U' else 'a number'}, but the other "
                    "way round in the user's earlier events"
                )
            dtypes[name] = np.promote_types(old, new)
    dtype = np.dtype(list(dtypes.items()))
    return np.concatenate([part.astype(dtype) for part in parts])
