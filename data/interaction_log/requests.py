"""From a shard's sorted events to requests: who was shown what, when, after which history."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa

from stca_jax.data.interaction_log.events import id_keys
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.input import request_building as rb


@dataclasses.dataclass(frozen=True)
class Shard:
    """The events of some users, sorted by user and time; all of each user's are here.

    Attributes:
      events: As `events.group_events` gives them; n rows.
      config: Of the log.
    """

    events: pa.Table
    config: LogConfig

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
        return self.labels[:, 0] >= 0

    @functools.cached_property
    def is_history(self) -> np.ndarray:
        """Whether each event is part of histories, [n]."""
        if "in_history" not in self.events.column_names:
            return np.ones(len(self.time), bool)
        return self.events["in_history"].to_numpy()

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
    """

    user: np.ndarray
    time: np.ndarray
    history_end: np.ndarray
    target_row: np.ndarray
    of_target: np.ndarray
    key: np.ndarray


def _find_requests(shard: Shard) -> Requests:
    row = np.flatnonzero(shard.is_target)
    if shard.config.request_id:
        first, of_target = _by_request_id(shard, row)
        order = np.argsort(of_target, kind="stable")
        row, of_target = row[order], of_target[order]
    else:
        first, of_target = _by_session(shard, row)
    user, time = shard.user[first], shard.time[first]
    in_history = np.flatnonzero(shard.is_history)
    return Requests(
        user=user,
        time=time,
        history_end=rb.history_end(shard.user[in_history], shard.time[in_history], user, time),
        target_row=row,
        of_target=of_target,
        key=rb.counter_hash(shard.config.seed, id_keys(shard.user_ids)[user], time),
    )


def _by_session(shard: Shard, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each request, and each target's request, when gaps in time separate them."""
    user, time = shard.user[row], shard.time[row]
    begins = np.ones(len(row), bool)
    begins[1:] = (user[1:] != user[:-1]) | (time[1:] - time[:-1] > shard.config.session_gap)
    return row[begins], np.cumsum(begins) - 1


def _by_request_id(shard: Shard, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likewise, when each target names its request; ids may repeat between users."""
    encoded = shard.events["request"].combine_chunks().take(pa.array(row)).dictionary_encode()
    request = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    pair = shard.user[row] * (len(encoded.dictionary) + 1) + request
    _, first, of_target = np.unique(pair, return_index=True, return_inverse=True)
    # Rows are sorted by user and time, so that order of first rows is that of requests.
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return row[first[order]], rank[of_target]
