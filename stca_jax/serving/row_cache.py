"""For models whose events cannot be encoded once: the events of users, encoded for each request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from stca_jax.serving.cache import CachedUser, Query, UserCache


class RowCache(UserCache):
    """Events of users on the host; a request encodes all of them again."""

    def score(
        self, users: Sequence[CachedUser], queries: Sequence[Query], at_least: int = 1
    ) -> list[Float[np.ndarray, "m tasks"]]:
        """See `UserCache`; one call for each user."""
        return [
            self._score(user, query, at_least) for user, query in zip(users, queries, strict=True)
        ]

    def _score(self, user: CachedUser, query: Query, at_least: int) -> Float[np.ndarray, "m tasks"]:
        window = user.window
        name, size, length = self.model.score_program(max(query.num_targets, at_least), window.size)
        history = np.zeros((1, length, sum(self.model.info.levels["history"].widths)), np.float32)
        time = np.zeros((1, length), np.int32)
        order = window.order
        columns = {n: column[order] for n, column in window.columns.items()}
        if window.size:
            history[0, : window.size] = self.model.embed("history", columns)
            time[0, : window.size] = window.time[order]
        logits = self.model.program(name)(
            self.model.weights,
            history,
            time,
            np.array([window.size], np.int32),
            self._inputs([user], [query], size),
        )
        return np.asarray(logits)[0, : query.num_targets]

    def _bytes_of(self, user: CachedUser) -> int:
        return user.window.num_bytes

    def _make_room(self, user: CachedUser, kept: set[Hashable]) -> None:
        while self.num_bytes > self._max_bytes and self._evict(kept):
            pass

    def _write_all(self, user: CachedUser) -> None: ...

    def _write(self, user: CachedUser, slots: Int[np.ndarray, " k"]) -> None: ...

    def _release(self, user: CachedUser, erase: bool) -> None: ...
