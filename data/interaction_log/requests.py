"""From a shard's sorted events to requests: who was shown what, when, after which history."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa

from stca_jax.data import request_building as rb
from stca_jax.data.interaction_log.events import id_keys
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.input.hashing import counter_hash

LONGEST_GAP = 6 * 3_600
"""Seconds between targets of one request id; after a longer gap the id was given anew."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The events of some users, sorted by user and time; all of each user's are here.

    Attributes:
      events: As `events.group_events` gives them; n rows.
      config: Of the log.
      times: Where validation and test begin, Unix seconds; requests need them.
    """

    events: pa.Table
    config: LogConfig
    times: tuple[int, int] | None = None

    @functools.cached_property
    def user(self) -> np.ndarray:
        """Each event's user, an index into `user_ids`, ascending, [n]."""
        return self._users[1]

    @property
    def user_ids(self) -> pa.Array:
        """The users' ids in the log."""
        return self._users[0]

    @functools.cached_property
    def time(self) -> np.ndarray:
        """Seconds since 1970, [n]."""
        return self.events["time"].to_numpy()

    @functools.cached_property
    def is_target(self) -> np.ndarray:
        """Whether each event is a target: labelled, or all of a log without labels, [n]."""
        if not self.config.labels:
            return np.ones(len(self.time), bool)
        return np.any(self.labels >= 0, axis=1)

    @functools.cached_property
    def is_history(self) -> np.ndarray:
        """Whether each event is part of histories, [n]."""
        if "in_history" not in self.events.column_names:
            return np.ones(len(self.time), bool)
        return self.events["in_history"].to_numpy()

    @functools.cached_property
    def history(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Histories of all users: rows of events, their times, and whether their labels are known.

        With a delay of labels, an event's are unknown; one that has a label of 1 stands there a
        second time, when that is known.
        """
        row = np.flatnonzero(self.is_history)
        delay = self.config.label_seconds
        if not delay:
            return row, self.time[row], np.ones(len(row), bool)
        late = row[(self.labels[row] == 1).any(1)]
        known = np.repeat([False, True], [len(row), len(late)])
        row = np.concatenate([row, late])
        time = self.time[row] + delay * known
        order = np.lexsort((known, time, self.user[row]))
        return row[order], time[order], known[order]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """0, 1, or -1 where it is missing, [n, tasks]."""
        columns = [
            self.events[f"label_{c.name}"].fill_null(-1).to_numpy()
            for c in self.config.feature_columns["label"]
        ]
        return np.stack(columns, axis=1)

    @functools.cached_property
    def _users(self) -> tuple[pa.Array, np.ndarray]:
        column = self.events["user"].combine_chunks()
        encoded = column.dictionary_encode()
        return encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)

    @functools.cached_property
    def requests(self) -> Requests:
        """The requests of all users, by user and time."""
        return _find_requests(self)


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests, by user and then by time; q of them.

    Attributes:
      user: Index into the shard's users, [q].
      time: When the first of its items was shown, in seconds since 1970, [q].
      history_end: Events of the user's history strictly before it, [q].
      target_row: Rows of the events that are targets, by request, [t].
      of_target: The request of each of them, ascending, [t].
      key: Identifies each request, whatever else is in the log, [q].
      span: Seconds from the first of its targets to the last, [q].
      num_cut: How often a request's id came back in another split or after a long gap, or a
        session went on in another split.
    """

    user: np.ndarray
    time: np.ndarray
    history_end: np.ndarray
    target_row: np.ndarray
    of_target: np.ndarray
    key: np.ndarray
    span: np.ndarray
    num_cut: int


def _find_requests(shard: Shard) -> Requests:
    """Groups targets by request id or session; none spans a long gap or two splits."""
    assert shard.times is not None
    row = np.flatnonzero(shard.is_target)
    same, max_gap = _named_same(shard, row)
    order = np.argsort(same, kind="stable")  # within it, rows stay sorted by time
    same, time = same[order], shard.time[row][order]
    split = rb.time_split(time, *shard.times)
    other, late, crosses = np.diff(same) != 0, np.diff(time) > max_gap, np.diff(split) != 0
    begins = np.ones(len(row), bool)
    begins[1:] = other | late | crosses
    is_cut = ~other & (crosses | late if shard.config.request_id else crosses & ~late)
    first = order[begins]
    # Rows are sorted by user and time, so that order of first rows is that of requests.
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    of_target = np.empty_like(order)
    of_target[order] = rank[np.cumsum(begins) - 1]
    return _requests(shard, row, of_target, int(is_cut.sum()))


def _requests(shard: Shard, row: np.ndarray, of_target: np.ndarray, num_cut: int) -> Requests:
    order = np.argsort(of_target, kind="stable")
    row, of_target = row[order], of_target[order]
    begins = np.flatnonzero(np.diff(of_target, prepend=-1))
    first, last = row[begins], row[np.append(begins[1:], len(row))[: len(begins)] - 1]
    user, time = shard.user[first], shard.time[first]
    event, event_time, _ = shard.history
    return Requests(
        user=user,
        time=time,
        history_end=rb.history_end(shard.user[event], event_time, user, time),
        target_row=row,
        of_target=of_target,
        key=counter_hash(shard.config.seed, id_keys(shard.user_ids)[user], time),
        span=shard.time[last] - time,
        num_cut=num_cut,
    )


def _named_same(shard: Shard, row: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers of what may be one request, and the longest gap, in seconds, that it may have."""
    gap = shard.config.session_gap
    if not shard.config.request_id:
        return shard.user[row], gap
    # Ids may repeat between users.
    encoded = shard.events["request"].combine_chunks().take(pa.array(row)).dictionary_encode()
    request = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return shard.user[row] * (len(encoded.dictionary) + 1) + request, max(gap, LONGEST_GAP)
