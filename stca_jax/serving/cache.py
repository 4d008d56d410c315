"""Users' encoded histories, the least recently used first out: what all kinds of caches share.

One cache is of one model. It is not for several threads at once: `Scorer` locks it.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from stca_jax.serving.matches import MatchIndex
from stca_jax.serving.model import ServingModel
from stca_jax.serving.window import Window


class Query(NamedTuple):
    """Encoded candidates and request.

    Attributes:
      target: Features of m candidates, by name.
      request: Features of the request, one value each.
      now: Seconds since the dataset's origin.
    """

    target: Mapping[str, np.ndarray]
    request: Mapping[str, np.ndarray]
    now: int

    @property
    def num_targets(self) -> int:
        """M."""
        return len(next(iter(self.target.values())))


@dataclasses.dataclass
class CachedUser:
    """What is kept of a user.

    Attributes:
      window: The user's events.
      pages: Of the pool, in order; empty if nothing is kept on the device.
      revision: Of the events in the store that these are.
    """

    window: Window
    pages: list[int] = dataclasses.field(default_factory=list)
    revision: int | None = None


@dataclasses.dataclass
class CacheCounts:
    """What happened since the start.

    Attributes:
      hits: Requests of users that were in the cache.
      misses: Requests of users that had to be read and encoded.
      evictions: Users that made room for others.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class UserCache(abc.ABC):
    """Users by name, the least recently used first.

    Attributes:
      model: Whose encoded events these are.
      counts: For metrics.
    """

    def __init__(self, model: ServingModel, max_bytes: int):
        self.model = model
        self.counts = CacheCounts()
        self._max_bytes = max_bytes
        self._users: collections.OrderedDict[Hashable, CachedUser] = collections.OrderedDict()

    def __len__(self) -> int:
        """Users in the cache."""
        return len(self._users)

    @property
    def num_bytes(self) -> int:
        """Bytes that users take, on the host and in pages."""
        return sum(self._bytes_of(user) for user in self._users.values())

    def find(self, name: Hashable) -> CachedUser | None:
        """A user, who is then the most recently used; None if not in the cache."""
        user = self._users.get(name)
        if user is not None:
            self._users.move_to_end(name)
        return user

    def put(
        self,
        name: Hashable,
        columns: Mapping[str, np.ndarray],
        time: Int[np.ndarray, " n"],
        sequence: Int[np.ndarray, " n"],
        kept: Sequence[Hashable] = (),
    ) -> CachedUser:
        """Encodes a user's history.

        Args:
          name: Of the user.
          columns: Encoded features of at most `max_history` events.
          time: Since the dataset's origin.
          sequence: Each event's own number.
          kept: Users who must not make room.
        """
        self.drop(name)
        info = self.model.info
        matches = MatchIndex(info.match_fields, info.decay_seconds)
        names = info.levels["history"].names
        window = Window(info.max_history, names, matches, info.match_fields)
        window.fill(columns, time, sequence)
        user = CachedUser(window)
        self._users[name] = user
        self._make_room(user, {name, *kept})
        self._write_all(user)
        return user

    def append(
        self,
        user: CachedUser,
        columns: Mapping[str, np.ndarray],
        time: Int[np.ndarray, " k"],
        sequence: Int[np.ndarray, " k"],
        name: Hashable,
    ) -> None:
        """Adds events to a user's history; arguments as of `put`."""
        slots = user.window.add(columns, time, sequence)
        self._make_room(user, {name})
        self._write(user, slots)

    def rewrite(
        self, user: CachedUser, columns: Mapping[str, np.ndarray], sequence: np.ndarray
    ) -> None:
        """Gives events of a user other features."""
        self._write(user, user.window.rewrite(columns, sequence))

    def drop(self, name: Hashable, *, erase: bool = False) -> None:
        """Forgets a user, if there.

        Args:
          name: Of the user.
          erase: Overwrite what is on the device, too.
        """
        user = self._users.pop(name, None)
        if user is not None:
            self._release(user, erase)

    @abc.abstractmethod
    def score(
        self, users: Sequence[CachedUser], queries: Sequence[Query], at_least: int = 1
    ) -> list[Float[np.ndarray, "m tasks"]]:
        """Logits of each user's candidates.

        Args:
          users: No event of theirs is at or after their request.
          queries: Of each.
          at_least: Pad to so many targets, for fewer sizes of programs.
        """

    def _evict(self, kept: set[Hashable]) -> bool:
        for name in self._users:
            if name not in kept:
                self.drop(name)
                self.counts.evictions += 1
                return True
        return False

    def _inputs(
        self, users: Sequence[CachedUser], queries: Sequence[Query], size: int
    ) -> tuple[np.ndarray, ...]:
        """The fields of the programs' inputs, padded to so many targets."""
        info, model = self.model.info, self.model
        U = len(users)
        widths = {name: sum(level.widths) for name, level in info.levels.items()}
        target = np.zeros((U, size, widths["target"]), np.float32)
        request = np.zeros((U, widths["request"]), np.float32)
        stats = 2 + len(info.decay_seconds)
        matches = np.zeros((U, size, len(info.match_fields), stats), np.float32)
        soft = np.zeros((U, size, len(info.soft_fields)), np.float32)
        for u, (user, query) in enumerate(zip(users, queries, strict=True)):
            m = query.num_targets
            target[u, :m] = model.embed("target", query.target)
            request[u] = model.embed("request", query.request)[0]
            if info.match_fields:
                matches[u, :m] = user.window.matches.look_up(query.target, query.now)
            if model.soft_counts is not None:
                soft[u, :m] = model.soft_counts.look_up(user.window.matches, query.target)
        now = np.array([q.now for q in queries], np.int32)
        return now, target, request, matches, *([soft] if info.soft_fields else [])

    @abc.abstractmethod
    def _bytes_of(self, user: CachedUser) -> int: ...

    @abc.abstractmethod
    def _make_room(self, user: CachedUser, kept: set[Hashable]) -> None: ...

    @abc.abstractmethod
    def _write_all(self, user: CachedUser) -> None: ...

    @abc.abstractmethod
    def _write(self, user: CachedUser, slots: Int[np.ndarray, " k"]) -> None: ...

    @abc.abstractmethod
    def _release(self, user: CachedUser, erase: bool) -> None: ...
