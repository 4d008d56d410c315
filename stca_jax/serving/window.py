"""The events of one user that the model reads, on the host: what stands in which slot.

Slots are filled in order; once there are `max_history`, an event takes the slot of the oldest.
Attention does not know the order of slots, so that nothing is ever moved:

    max_history = 4      slots   e0 e1 e2 e3      + e4      slots   e4 e1 e2 e3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from stca_jax.serving.matches import MatchIndex


class Window:
    """Encoded events by slot, and the match index over them.

    Attributes:
      size: Filled slots, n.
      matches: Over the events in the slots.
    """

    def __init__(
        self,
        max_history: int,
        names: Sequence[str],
        matches: MatchIndex,
        match_fields: Sequence[str],
    ):
        self.size = 0
        self.matches = matches
        self._most = max_history
        self._match_fields = tuple(match_fields)
        self._capacity = 0
        self._time = np.empty(0, np.int64)
        self._sequence = np.empty(0, np.int64)
        self._columns = {name: np.empty(0) for name in names}

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        arrays = [self._time, self._sequence, *self._columns.values()]
        return sum(a.nbytes for a in arrays) + self.matches.num_bytes

    @property
    def latest(self) -> int:
        """Time of the latest event; only of a window with events."""
        return int(self._time[: self.size].max())

    @property
    def time(self) -> Int[np.ndarray, " n"]:
        """Times by slot, since the dataset's origin."""
        return self._time[: self.size]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Encoded features by slot."""
        return {name: column[: self.size] for name, column in self._columns.items()}

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """Slots from the oldest event to the latest."""
        return np.lexsort((self._sequence[: self.size], self._time[: self.size]))

    def fill(
        self,
        columns: Mapping[str, np.ndarray],
        time: Int[np.ndarray, " n"],
        sequence: Int[np.ndarray, " n"],
    ) -> None:
        """Starts anew with these events, at most `max_history`."""
        self.size = 0
        self._reserve(len(time), columns)
        self.size = len(time)
        self._time[: self.size] = time
        self._sequence[: self.size] = sequence
        for name, column in columns.items():
            self._columns[name][: self.size] = column
        self._count_again()

    def add(
        self,
        columns: Mapping[str, np.ndarray],
        time: Int[np.ndarray, " k"],
        sequence: Int[np.ndarray, " k"],
    ) -> Int[np.ndarray, " slots"]:
        """Adds events, each into a free slot or that of the oldest.

        Returns:
          Slots that were written, each once. An event that is older than all of a full window is in
          none.
        """
        written: dict[int, None] = {}
        self._reserve(self.size + len(time), columns)
        for k in range(len(time)):
            slot = self.size
            if slot == self._most:
                slot = self._oldest()
                oldest = self._time[slot], self._sequence[slot]
                if (time[k], sequence[k]) < oldest:
                    continue
                self.matches.remove_oldest(self._ids(slot), int(oldest[0]))
            else:
                self.size += 1
            self._time[slot], self._sequence[slot] = time[k], sequence[k]
            for name, column in columns.items():
                self._columns[name][slot] = column[k]
            self.matches.add(self._ids(slot), int(time[k]))
            written[slot] = None
        return np.fromiter(written, np.int64, len(written))

    def rewrite(
        self, columns: Mapping[str, np.ndarray], sequence: Int[np.ndarray, " k"]
    ) -> Int[np.ndarray, " slots"]:
        """Gives events other features, where they are in the window; times stay.

        Returns:
          Slots that were written.
        """
        order = np.argsort(self._sequence[: self.size])
        known = self._sequence[: self.size][order]
        place = np.searchsorted(known, sequence).clip(max=max(len(known) - 1, 0))
        found = known[place] == sequence if len(known) else np.zeros(len(sequence), bool)
        slots = order[place[found]] if len(known) else np.empty(0, np.int64)
        for name, column in columns.items():
            self._columns[name][slots] = column[found]
        if len(slots):
            self._count_again()
        return slots

    def _count_again(self) -> None:
        self.matches.rebuild({n: self.columns[n] for n in self._match_fields}, self.time)

    def _oldest(self) -> int:
        time = self._time[: self.size]
        ties = np.flatnonzero(time == time.min())
        return int(ties[self._sequence[ties].argmin()])

    def _ids(self, slot: int) -> list[int]:
        return [int(self._columns[name][slot]) for name in self._match_fields]

    def _reserve(self, size: int, columns: Mapping[str, np.ndarray]) -> None:
        """Makes room, half as much again as is needed, up to `max_history`."""
        size = min(size, self._most)
        if size <= self._capacity:
            return
        self._capacity = min(self._most, max(64, size + size // 2))

        def larger(old: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
            new = np.zeros(self._capacity, dtype)
            new[: self.size] = old[: self.size]
            return new

        self._time, self._sequence = (larger(x, np.int64) for x in (self._time, self._sequence))
        self._columns = {
            name: larger(self._columns[name], column.dtype) for name, column in columns.items()
        }
