"""Histories in Redis, for several machines: a `HistoryStore` with the extra `redis`.

    stca:{USER}:order     sorted set: sequence numbers by the time of their events
    stca:{USER}:rows      hash: sequence number -> values of the columns, as JSON
    stca:{USER}:ids       hash: an event's id -> its sequence number
    stca:{USER}:columns   names of the columns, and which are texts
    stca:{USER}:next      the next sequence number
    stca:{USER}:revision  see `HistoryStore.revision`

The braces put a user's keys into one slot of a cluster. Every method is one script, which Redis
runs as a whole or not at all. What Redis acknowledges outlives its kill if it is run with
`appendonly yes` and `appendfsync always`; else the last second may be lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import redis

from stca_jax.errors import UserError
from stca_jax.serving.events import Events
from stca_jax.serving.histories import Change, new_revision

_KEYS = ("order", "rows", "ids", "columns", "next", "revision")
_COLUMNS_DIFFER = "other columns"
# ARGV: columns, the new revision, then time, id ("" for none) and row of each event.
_APPEND = """
local before = redis.call('GET', KEYS[6])
local columns = redis.call('GET', KEYS[4])
if columns and columns ~= ARGV[1] then return {err = 'other columns ' .. columns} end
local sequence, after = {}, before
for i = 3, #ARGV, 3 do
  local id = ARGV[i + 1]
  if id ~= '' and redis.call('HEXISTS', KEYS[3], id) == 1 then
    sequence[#sequence + 1] = -1
  else
    local number = redis.call('INCR', KEYS[5]) - 1
    local name = string.format('%020d', number)
    redis.call('ZADD', KEYS[1], ARGV[i], name)
    redis.call('HSET', KEYS[2], name, ARGV[i + 2])
    if id ~= '' then redis.call('HSET', KEYS[3], id, name) end
    sequence[#sequence + 1] = number
    after = ARGV[2]
  end
end
if #sequence > 0 and not columns then redis.call('SET', KEYS[4], ARGV[1]) end
if after ~= before then redis.call('SET', KEYS[6], after) end
return {sequence, before, after}
"""
# ARGV: columns, the new revision, then id and row of each event. Looks at all ids before it
# changes anything.
_UPDATE = """
local before = redis.call('GET', KEYS[6])
local columns = redis.call('GET', KEYS[4])
local names = {}
for i = 3, #ARGV, 2 do
  local name = redis.call('HGET', KEYS[3], ARGV[i])
  if not name then return {err = 'no event ' .. ARGV[i]} end
  names[#names + 1] = name
end
if columns ~= ARGV[1] then return {err = 'other columns ' .. tostring(columns)} end
local sequence = {}
for i, name in ipairs(names) do
  redis.call('HSET', KEYS[2], name, ARGV[2 + 2 * i])
  sequence[i] = tonumber(name)
end
redis.call('SET', KEYS[6], ARGV[2])
return {sequence, before, ARGV[2]}
"""
# ARGV: most events, and the time before which they are.
_READ = """
local names = redis.call('ZRANGE', KEYS[1], ARGV[2], '-inf', 'BYSCORE', 'REV',
                         'LIMIT', 0, ARGV[1], 'WITHSCORES')
local numbers, times, rows = {}, {}, {}
for i = #names - 1, 1, -2 do
  numbers[#numbers + 1] = names[i]
  times[#times + 1] = names[i + 1]
end
for i = 1, #numbers, 1000 do
  local some = redis.call('HMGET', KEYS[2], unpack(numbers, i, math.min(i + 999, #numbers)))
  for _, row in ipairs(some) do rows[#rows + 1] = row end
end
return {redis.call('GET', KEYS[4]), numbers, times, rows}
"""


class RedisHistories:
    """See `HistoryStore`; several servers may share it."""

    def __init__(self, url: str, *, timeout_seconds: float = 5.0):
        """Connects.

        Args:
          url: redis://[:PASSWORD@]HOST:PORT[/DATABASE], rediss:// or unix://PATH.
          timeout_seconds: Of one call.

        Raises:
          UserError: there is no server, or the URL is none of Redis.
        """
        self._name = url.rpartition("@")[2]  # without the password
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds
            )
            self._redis.ping()
        except (redis.RedisError, ValueError) as error:
            raise UserError(f"histories {self._name} cannot be opened: {error}") from None
        self._append = self._redis.register_script(_APPEND)
        self._update = self._redis.register_script(_UPDATE)
        self._read = self._redis.register_script(_READ)

    def read(self, user: str, limit: int, before: int | None = None) -> Events:
        """See `HistoryStore`."""
        latest = "+inf" if before is None else f"({before}"
        columns, numbers, times, rows = self._call(self._read, user, [limit, latest])
        if not numbers:
            return Events(np.empty(0, np.int64), {}, None, np.empty(0, np.int64))
        names = json.loads(columns)
        values = json.loads(b"[" + b",".join(rows) + b"]")
        by_column = zip(*values, strict=True)
        return Events(
            np.array([float(t) for t in times]).astype(np.int64),
            {name: np.asarray(column) for (name, _), column in zip(names, by_column, strict=True)},
            None,
            np.array([int(n) for n in numbers]),
        )

    def revision(self, user: str) -> int | None:
        """See `HistoryStore`."""
        try:
            return _integer(self._redis.get(_keys(user)[-1]))
        except redis.RedisError as error:
            raise OSError(f"histories {self._name}: {error}") from error

    def append(self, user: str, events: Events) -> Change:
        """See `HistoryStore`."""
        ids = [""] * len(events) if events.ids is None else [_checked(i) for i in events.ids]
        arguments = [_columns(events), str(new_revision())]
        for time, name, row in zip(events.time.tolist(), ids, _rows(events), strict=True):
            arguments += [str(time), name, row]
        return _change(self._call(self._append, user, arguments))

    def update(self, user: str, events: Events) -> Change:
        """See `HistoryStore`."""
        if events.ids is None:
            raise UserError("events to update need ids, by which they were appended")
        arguments = [_columns(events), str(new_revision())]
        for name, row in zip(events.ids, _rows(events), strict=True):
            arguments += [name, row]
        return _change(self._call(self._update, user, arguments))

    def delete(self, user: str) -> bool:
        """See `HistoryStore`; Redis' own log forgets at its next rewrite, which this asks for."""
        try:
            was_there = self._redis.delete(*_keys(user)) > 0
            if was_there and self._redis.config_get("appendonly").get("appendonly") == "yes":
                self._redis.bgrewriteaof()
        except redis.ResponseError:  # one runs already, or CONFIG is not allowed
            return was_there
        except redis.RedisError as error:
            raise OSError(f"histories {self._name}: {error}") from error
        return was_there

    def close(self) -> None:
        """See `HistoryStore`."""
        self._redis.close()

    def _call(self, script: Any, user: str, arguments: Sequence[Any]) -> Any:
        try:
            return script(keys=_keys(user), args=arguments)
        except redis.ResponseError as error:
            text = str(error)
            if text.startswith(_COLUMNS_DIFFER):
                known = text.removeprefix(_COLUMNS_DIFFER).strip()
                raise UserError(
                    f"the events have columns {_described(arguments[0])}, but the user's earlier "
                    f"ones {_described(known)}"
                ) from None
            if text.startswith("no event "):
                name = text.removeprefix("no event ")
                raise UserError(
                    f"the user has no event with id {name!r}: append it first"
                ) from None
            raise OSError(f"histories {self._name}: {error}") from error
        except redis.RedisError as error:
            raise OSError(f"histories {self._name}: {error}") from error


def _keys(user: str) -> list[str]:
    # A brace in the name would end the part that chooses the slot.
    tag = user.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return [f"stca:{{{tag}}}:{key}" for key in _KEYS]


def _change(answer: tuple[list[int], bytes | None, bytes | None]) -> Change:
    sequence, before, after = answer
    return Change(np.array(sequence, np.int64), _integer(before), _integer(after))


def _integer(text: bytes | str | None) -> int | None:
    return None if text is None else int(text)


def _checked(name: str) -> str:
    if not name:
        raise UserError("an event's id is empty: leave ids out, or name every event")
    return name


def _columns(events: Events) -> str:
    """Names of the columns in the order of a row, and whether they are texts."""
    return json.dumps([[n, events.columns[n].dtype.kind == "U"] for n in sorted(events.columns)])


def _described(columns: str) -> str:
    return ", ".join(f"{name} ({'text' if t else 'number'})" for name, t in json.loads(columns))


def _rows(events: Events) -> list[str]:
    columns = [events.columns[name].tolist() for name in sorted(events.columns)]
    if not columns:
        return ["[]"] * len(events)
    return [json.dumps(row) for row in zip(*columns, strict=True)]
