"""Which items a request's positives are held against, when a log has no labels."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Int, UInt32, UInt64

from stca_jax.data.request_building import ItemSampler
from stca_jax.input.trends import parse_window


def make_sampler(
    kind: str,
    count: Int[np.ndarray, " items"],
    time: UInt32[np.ndarray, " n"],
    item: Int[np.ndarray, " n"],
    request_time: Int[np.ndarray, " q"],
) -> ItemSampler:
    """What draws negatives.

    Args:
      kind: "training", "uniform", or a window such as "7d".
      count: Training events of each item.
      time: Of all events, ascending, Unix seconds.
      item: Of each event.
      request_time: Of each request, Unix seconds.

    Raises:
      UserError: the kind is none of these.
    """
    if kind == "training":
        return ByCount(count)
    if kind == "uniform":
        return Uniform.of(len(count), time, item, request_time)
    return Trailing(len(count), time, item, parse_window(kind), request_time)


@dataclasses.dataclass(frozen=True, eq=False)
class ByCount:
    """Items in proportion to a count, the same for all requests.

    Attributes:
      count: Of each item.
    """

    count: Int[np.ndarray, " items"]

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.count)

    def draw(
        self, request: Int[np.ndarray, " n"], hashed: UInt64[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Items; raises ValueError if none has a count."""
        if not len(self._before) or self._before[-1] < 1:
            raise ValueError("no item occurs in training events: move the validation start later")
        # An item of count c owns c consecutive integers; one of count 0 owns none.
        place = (hashed % np.uint64(self._before[-1])).astype(np.int64)
        return np.searchsorted(self._before, place, side="right")

    @functools.cached_property
    def _before(self) -> np.ndarray:
        return np.cumsum(self.count, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Trailing:
    """The item of an event in the window before the request: by its popularity there.

    Attributes:
      num_items: How many items there are.
      time: Of all events, ascending; uint32 Unix seconds.
      item: Of each event.
      window: Seconds.
      request_time: Of each request, Unix seconds.
    """

    num_items: int
    time: np.ndarray
    item: np.ndarray
    window: int
    request_time: Int[np.ndarray, " q"]

    def draw(
        self, request: Int[np.ndarray, " n"], hashed: UInt64[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Items; -1 where the window has no event."""
        begin, size = (bound[request] for bound in self._bounds)
        place = begin + (hashed % np.maximum(size, 1).astype(np.uint64)).astype(np.int64)
        item = self.item[np.minimum(place, max(len(self.item) - 1, 0))]
        return np.where(size > 0, item, -1)

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        end = np.searchsorted(self.time, self.request_time.astype(np.uint32))
        start = np.maximum(self.request_time - self.window, 0).astype(np.uint32)
        begin = np.searchsorted(self.time, start)
        return begin, end - begin


@dataclasses.dataclass(frozen=True, eq=False)
class Uniform:
    """Any item that an event before the request had, each alike.

    Attributes:
      num_items: How many items there are.
      first_time: When each item of the log had its first event, ascending; Unix seconds.
      item: Whose it is.
      request_time: Of each request, Unix seconds.
    """

    num_items: int
    first_time: Int[np.ndarray, " seen"]
    item: Int[np.ndarray, " seen"]
    request_time: Int[np.ndarray, " q"]

    @classmethod
    def of(
        cls, num_items: int, time: np.ndarray, item: np.ndarray, request_time: np.ndarray
    ) -> Uniform:
        """From all events, in the order of time."""
        seen, first = np.unique(np.asarray(item), return_index=True)
        order = np.argsort(first, kind="stable")
        return cls(num_items, time[first[order]].astype(np.int64), seen[order], request_time)

    def draw(
        self, request: Int[np.ndarray, " n"], hashed: UInt64[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Items; -1 where there are none yet."""
        count = np.searchsorted(self.first_time, self.request_time)[request]
        place = (hashed % np.maximum(count, 1).astype(np.uint64)).astype(np.int64)
        return np.where(count > 0, self.item[place], -1)
