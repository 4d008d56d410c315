"""The match channel of one user, kept up event by event: what a pass over the history would find.

For every id of every field: how many events carry it, the time of the latest, and decayed counts
relative to that time, sum of exp(-(latest - time) / constant), in float64. An event costs a few
operations, and a candidate a look-up, whatever the length of the history.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

_COUNT, _LATEST, _DECAYED = 0, 1, 2  # columns; decayed counts are the last ones


class MatchIndex:
    """Ids of a user's events, by field.

    Attributes:
      derived: What others make of a field's `ids` and want to keep; gone when an id comes or goes.
    """

    def __init__(self, fields: Sequence[str], decay_seconds: Sequence[float]):
        self._fields = tuple(fields)
        self._decays = np.asarray(decay_seconds, np.float64)
        self.derived: dict[str, tuple[np.ndarray, ...]] = {}
        self._places: list[dict[int, int]] = [{} for _ in fields]  # id -> row of `_values`
        self._clear()

    def _clear(self) -> None:
        # Row 0 is of an id that no event carries.
        self.derived.clear()
        self._values = np.zeros((64, 2 + len(self._decays)))
        self._values[:, _LATEST] = -np.inf
        self._size = 1
        self._free: list[int] = []

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        derived = sum(array.nbytes for arrays in self.derived.values() for array in arrays)
        return self._values.nbytes + 100 * sum(map(len, self._places)) + derived

    def rebuild(
        self, columns: Mapping[str, Int[np.ndarray, " n"]], time: Int[np.ndarray, " n"]
    ) -> None:
        """Forgets everything and counts these events, in any order."""
        self._clear()
        parts = [self._values[:1]]
        for f, field in enumerate(self._fields):
            ids, place = np.unique(columns[field], return_inverse=True)
            latest = np.full(len(ids), -np.inf)
            np.maximum.at(latest, place, time)
            values = np.empty((len(ids), self._values.shape[1]))
            values[:, _COUNT] = np.bincount(place, minlength=len(ids))
            values[:, _LATEST] = latest
            for k, decay in enumerate(self._decays):
                weight = np.exp((time - latest[place]) / decay)
                values[:, _DECAYED + k] = np.bincount(place, weight, len(ids))
            self._places[f] = dict(zip(ids.tolist(), itertools.count(self._size), strict=False))
            self._size += len(ids)
            parts.append(values)
        self._values = np.concatenate(parts)

    def add(self, ids: Sequence[int], time: int) -> None:
        """Counts an event, which may be earlier than others.

        Args:
          ids: Of each field, in order.
          time: Of the event.
        """
        places = [
            found.get(i, 0) or self._new_place(field, found, i, time)
            for field, found, i in zip(self._fields, self._places, ids, strict=True)
        ]
        rows = self._values[places]
        latest = np.maximum(rows[:, _LATEST], time)
        rows[:, _DECAYED:] *= self._weight(rows[:, _LATEST] - latest)
        rows[:, _DECAYED:] += self._weight(time - latest)
        rows[:, _COUNT] += 1
        rows[:, _LATEST] = latest
        self._values[places] = rows

    def remove_oldest(self, ids: Sequence[int], time: int) -> None:
        """Takes back an event than which none is earlier.

        Args:
          ids: Of each field, in order.
          time: Of the event.
        """
        places = [found[i] for found, i in zip(self._places, ids, strict=True)]
        rows = self._values[places]
        rows[:, _COUNT] -= 1
        rows[:, _DECAYED:] -= self._weight(time - rows[:, _LATEST])
        # The latest event itself counts 1, whatever was rounded.
        rows[:, _DECAYED:] = np.maximum(rows[:, _DECAYED:], 1)
        self._values[places] = rows
        left = rows[:, _COUNT].tolist()
        for f, field in enumerate(self._fields):
            if not left[f]:
                self.derived.pop(field, None)
                del self._places[f][ids[f]]
                self._free.append(places[f])

    def ids(self, field: str) -> tuple[Int[np.ndarray, " ids"], Int[np.ndarray, " ids"]]:
        """The ids of a field that events carry, and their places."""
        places = self._places[self._fields.index(field)]
        both = (np.fromiter(x, np.int64, len(places)) for x in (places, places.values()))
        return next(both), next(both)

    def counts(self, places: Int[np.ndarray, " ids"]) -> Float[np.ndarray, " ids"]:
        """How many events carry the id of each place."""
        return self._values[places, _COUNT]

    def look_up(
        self, columns: Mapping[str, Int[np.ndarray, " m"]], now: int
    ) -> Float[np.ndarray, "m F stats"]:
        """Count, age of the latest in seconds (inf if none) and decayed counts of candidates.

        Args:
          columns: Ids of the candidates by field.
          now: Time of the request, no earlier than any event.
        """
        zeros = itertools.repeat(0)
        places = [
            list(map(found.get, columns[field].tolist(), zeros))
            for field, found in zip(self._fields, self._places, strict=True)
        ]
        values = self._values[np.array(places, np.intp).T]  # [m, F, stats]
        age = now - values[..., _LATEST]
        values[..., _LATEST] = age
        values[..., _DECAYED:] *= np.exp(-age[..., None] / self._decays)
        return values.astype(np.float32)

    def _weight(self, age: Float[np.ndarray, " F"]) -> Float[np.ndarray, "F decays"]:
        return np.exp(age[:, None] / self._decays)

    def _new_place(self, field: str, found: dict[int, int], i: int, time: int) -> int:
        self.derived.pop(field, None)
        if self._free:
            place = self._free.pop()
        else:
            place = self._size
            self._size += 1
            if place == len(self._values):
                self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[place] = 0
        self._values[place, _LATEST] = time
        found[i] = place
        return place
