"""Scores candidates for users, and keeps up with their events."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time as clock
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from stca_jax.errors import UserError
from stca_jax.serving.cache import CacheCounts, CachedUser, Query, UserCache
from stca_jax.serving.encoding import with_missing_texts
from stca_jax.serving.events import Events, as_times
from stca_jax.serving.golden import check_golden
from stca_jax.serving.golden import warm_up as compile_for
from stca_jax.serving.histories import HistoryStore
from stca_jax.serving.model import BUCKETS, ServingModel
from stca_jax.serving.paged_cache import PagedCache
from stca_jax.serving.request_encoder import RequestEncoder
from stca_jax.serving.row_cache import RowCache
from stca_jax.serving.score_request import ScoreRequest
from stca_jax.serving.sqlite_histories import SqliteHistories
from stca_jax.serving.window import Window

DEFAULT_CACHE_BYTES = 1 << 30
_USERS_AT_ONCE = 16  # of a call to an accelerator


@dataclasses.dataclass(frozen=True)
class _Pool:
    """A model and its cache, which change together."""

    model: ServingModel
    cache: UserCache
    encoder: RequestEncoder


class Scorer:
    """Scores, appends, forgets; safe for several threads, which it serves one at a time.

    Probabilities are those of the evaluation. Whatever the cache has lost (room for other users, a
    restart, a new model), or another process has changed in the store, is read from there and
    encoded again, so that it changes no score.
    """

    def __init__(
        self,
        model: ServingModel,
        histories: HistoryStore | None = None,
        *,
        max_bytes: int = DEFAULT_CACHE_BYTES,
        encoded: bool | None = None,
    ):
        """Checks the model's golden requests on this machine.

        Args:
          model: From `ServingModel.load`.
          histories: Where events are kept; by default in the memory of this process.
          max_bytes: Of the cache on the device.
          encoded: Take ids and numbers as trained instead of raw values; None does where the export
            has no features. Which it is must not change during the life of a store.

        Raises:
          UserError: golden requests differ, the cache is too small for a user, or raw values are
            asked for and the export has no features.
        """
        self._lock = threading.RLock()
        self._max_bytes = max_bytes
        self._encoded = model.features is None if encoded is None else encoded
        self.histories = SqliteHistories() if histories is None else histories
        self._pool = self._open(model)

    @property
    def model(self) -> ServingModel:
        """The model that serves."""
        return self._pool.model

    @property
    def counts(self) -> CacheCounts:
        """Hits, misses and evictions of the model's cache."""
        return self._pool.cache.counts

    @property
    def cached(self) -> tuple[int, int]:
        """Users in the cache, and the bytes that they take."""
        with self._lock:
            return len(self._pool.cache), self._pool.cache.num_bytes

    def append(self, user: str, events: Events) -> int:
        """Adds events to a user's history; durable once it returns.

        Args:
          user: Whose; a new name is a new user.
          events: In any order, also earlier than others. One whose id the user has counts once.

        Returns:
          How many were new.

        Raises:
          UserError: an event cannot be encoded; nothing was stored then.
        """
        with self._lock:
            events = with_missing_texts(self.model, events)
            encoded = self._pool.encoder.events(events)
            change = self.histories.append(user, events)
            new = change.sequence >= 0
            cached = self._find(user, change.before)
            if cached is not None and new.any():
                with self._dropping(user):
                    columns = {name: column[new] for name, column in encoded.items()}
                    time = self._pool.encoder.since_origin(events.time)[new]
                    self._pool.cache.append(cached, columns, time, change.sequence[new], user)
                cached.revision = change.after
            return int(new.sum())

    def update(self, user: str, events: Events) -> None:
        """Gives events that were appended with ids other features: a label that came late.

        Args:
          user: Whose.
          events: With their ids and all columns; their times are not read.

        Raises:
          UserError: the user has no event of an id; nothing was changed then.
        """
        with self._lock:
            events = with_missing_texts(self.model, events)
            encoded = self._pool.encoder.events(events)
            change = self.histories.update(user, events)
            cached = self._find(user, change.before)
            if cached is not None:
                with self._dropping(user):
                    self._pool.cache.rewrite(cached, encoded, change.sequence)
                cached.revision = change.after

    def forget(self, user: str) -> bool:
        """Deletes all that is known of a user, on disk, in memory and on the device.

        Returns:
          Whether anything was.
        """
        with self._lock:
            self._pool.cache.drop(user, erase=True)
            return self.histories.delete(user)

    def score(
        self,
        user: str,
        targets: Mapping[str, Any],
        request: Mapping[str, Any] | None = None,
        time: int | None = None,
    ) -> dict[str, Float[np.ndarray, " m"]]:
        """Probabilities of a user's candidates, by task; arguments as of `ScoreRequest`.

        Raises:
          UserError: the request does not fit the model; names feature and value.
        """
        return self.probabilities(self.logits(ScoreRequest(user, targets, request or {}, time)))

    def score_many(
        self, requests: Sequence[ScoreRequest]
    ) -> list[dict[str, Float[np.ndarray, " m"]] | UserError]:
        """Probabilities of several requests: on an accelerator in few calls.

        Returns:
          For each request what `score` returns, or the error that it raises.
        """
        at_once = 1 if jax.default_backend() == "cpu" else _USERS_AT_ONCE
        results: list[dict[str, np.ndarray] | UserError] = []
        with self._lock:
            for first in range(0, len(requests), at_once):
                scored = self._score_group(requests[first : first + at_once])
                results += [
                    x if isinstance(x, UserError) else self.probabilities(x) for x in scored
                ]
        return results

    def logits(self, request: ScoreRequest) -> Float[np.ndarray, "m tasks"]:
        """What `score` makes probabilities of.

        Raises:
          UserError: see `score`.
        """
        with self._lock:
            (result,) = self._score_group([request])
        if isinstance(result, UserError):
            raise result
        return result

    def score_once(
        self,
        history: Events,
        targets: Mapping[str, Any],
        request: Mapping[str, Any] | None = None,
        time: int | None = None,
        user: str = "",
    ) -> dict[str, Float[np.ndarray, " m"]]:
        """Probabilities for a history that is given, and not kept.

        Args:
          history: Events; those at or after the request are not read.
          targets: See `ScoreRequest`.
          request: See `ScoreRequest`.
          time: See `ScoreRequest`.
          user: Whose features the user table has; nothing is read or kept of the user.

        Raises:
          UserError: see `score`.
        """
        with self._lock:
            asked = ScoreRequest(user, targets, request or {}, time)
            latest = int(history.time.max()) if len(history) else 0
            now = self._time_of(asked, latest)
            known = history.select(history.time < now)
            query = self._pool.encoder.query(
                asked, now, lambda start: int((known.time >= start).sum())
            )
            order = np.argsort(known.time, kind="stable")[-self.model.info.max_history :]
            name = object()
            try:
                cached = self._put(name, known.select(order), ())
                (logits,) = self._pool.cache.score([cached], [query])
            finally:
                self._pool.cache.drop(name)
        return self.probabilities(logits)

    def reload(self, directory: str | os.PathLike[str], *, warm_up: Sequence[int] = ()) -> None:
        """Goes on with another export; requests that wait are answered by it.

        Args:
          directory: Of an export with the same kind of input, encoded or not.
          warm_up: Numbers of candidates to compile for before it answers.

        Raises:
          UserError: the export cannot serve; the model that did goes on.
        """
        model = ServingModel.load(directory, cache=self.model.cache or "keys_values")
        if not self._encoded and model.features is None:
            raise UserError(f"{directory} has no features, but this scorer takes raw values")
        pool = self._open(model)
        compile_for(pool.cache, warm_up)
        with self._lock:
            self._pool = pool

    def warm_up(self, num_targets: Sequence[int] = BUCKETS) -> None:
        """Compiles the programs for so many candidates, not when they are first asked for."""
        with self._lock:
            compile_for(self._pool.cache, num_targets)

    def probabilities(
        self, logits: Float[np.ndarray, "m tasks"]
    ) -> dict[str, Float[np.ndarray, " m"]]:
        """The sigmoid of each task's logits, by name."""
        with np.errstate(over="ignore"):
            values = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return {task: values[:, k] for k, task in enumerate(self.model.info.schema.tasks)}

    def _open(self, model: ServingModel) -> _Pool:
        if not self._encoded and model.features is None:
            raise UserError(
                f"{model.directory} has no features/, so that raw values cannot be encoded: "
                "prepare the dataset again and export anew, or pass encoded=True and ids as trained"
            )
        kind = PagedCache if model.cache else RowCache
        cache = kind(model, self._max_bytes)
        check_golden(cache)
        cache.counts = CacheCounts()
        return _Pool(model, cache, RequestEncoder(model, self._encoded))

    def _score_group(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | UserError]:
        """Logits of requests whose users fit into the cache at once."""
        cache = self._pool.cache
        kept: list[Hashable] = []  # users of this call
        temporary: list[Hashable] = []
        prepared: list[tuple[CachedUser, Query] | UserError] = []
        try:
            for request in requests:
                try:
                    name, user, query = self._prepare(request, kept)
                except UserError as error:
                    prepared.append(error)
                    continue
                kept.append(name)
                if name != request.user:
                    temporary.append(name)
                prepared.append((user, query))
            entries = [p for p in prepared if not isinstance(p, UserError)]
            users, queries = [user for user, _ in entries], [query for _, query in entries]
            scored = iter(cache.score(users, queries) if entries else [])
            return [p if isinstance(p, UserError) else next(scored) for p in prepared]
        finally:
            for name in temporary:
                cache.drop(name)

    def _prepare(
        self, request: ScoreRequest, kept: Sequence[Hashable]
    ) -> tuple[Hashable, CachedUser, Query]:
        """The user as the cache knows it, encoded if need be, and what is asked."""
        cache, most = self._pool.cache, self.model.info.max_history
        revision = self.histories.revision(request.user)  # before what is read, lest it be newer
        user = self._find(request.user, revision)
        name: Hashable = request.user
        if user is None:
            cache.counts.misses += 1
            events = self.histories.read(request.user, most)
            if not len(events):
                name = object()  # nothing to keep
            user = self._put(name, events, kept)
            user.revision = revision
        else:
            cache.counts.hits += 1
        latest = user.window.latest + self.model.info.time_origin if user.window.size else 0
        try:
            now = self._time_of(request, latest)
            if user.window.size and now <= latest:
                # A request of the past reads another history, which is encoded for it alone.
                name = object()
                events = self.histories.read(request.user, most, before=now)
                user = self._put(name, events, [*kept, request.user])
            query = self._pool.encoder.query(
                request, now, self._count_since(request.user, user.window, now)
            )
        except UserError:
            if name != request.user:
                cache.drop(name)
            raise
        return name, user, query

    def _find(self, user: str, revision: int | None) -> CachedUser | None:
        """The user, if the cache has what the store had at this revision."""
        cached = self._pool.cache.find(user)
        if cached is not None and cached.revision != revision:
            self._pool.cache.drop(user)
            return None
        return cached

    def _put(self, name: Hashable, events: Events, kept: Sequence[Hashable]) -> CachedUser:
        with self._dropping(name):
            return self._pool.cache.put(name, *self._pool.encoder.history(events), kept)

    def _time_of(self, request: ScoreRequest, latest: int) -> int:
        """Unix second of a request."""
        if request.time is None:
            return max(int(clock.time()), latest + 1)
        return int(as_times("time", [request.time])[0])

    def _count_since(self, user: str, window: Window, now: int) -> Callable[[int], int]:
        """How many events a user had before `now`, from a Unix second on."""
        most, origin = self.model.info.max_history, self.model.info.time_origin

        def count_since(start: int) -> int:
            found = limit = int((window.time >= start - origin).sum())
            while found == limit >= most:  # earlier ones, which the model does not read, count too
                limit *= 2
                found = int((self.histories.read(user, limit, before=now).time >= start).sum())
            return found

        return count_since

    @contextlib.contextmanager
    def _dropping(self, user: Hashable) -> Iterator[None]:
        """After an error, a user is not left half written in the cache; the store has all."""
        try:
            yield
        except BaseException:
            self._pool.cache.drop(user)
            raise
