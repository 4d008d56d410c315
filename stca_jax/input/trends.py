"""What happened to items before a moment: counts, rates and age, as of each request; NumPy only.

    events of an item     x    x x      x |x      x    x
    windows of a request  ├───────28d─────┤
                                  ├──7d───┤  t: the request; events of that second do not count

Preparing a dataset and serving a model use the same classes; `stca_jax.input.features` holds their
state at the end of the log.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64

from stca_jax.errors import UserError
from stca_jax.schema import SECONDS_PER_DAY

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": SECONDS_PER_DAY, "w": 7 * SECONDS_PER_DAY}
_PRIOR = 20.0  # labelled events that a rate counts as if it had been the average
_TIME = np.uint64(2**32 - 1)  # what of a key is seconds
_BLOCK = 1 << 22  # events looked at in one go, where memory should not follow their number
_NEVER = -1.0  # the age of a value that no event had yet


def parse_window(text: str) -> int:
    """Seconds of a span such as "12h", "7d" or "4w".

    Raises:
      UserError: it is none.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})([smhdw])", text.strip())
    if match is None:
        raise UserError(f"{text!r} is no span of time; write a number and s, m, h, d or w: 7d")
    return int(match[1]) * _UNITS[match[2]]


@dataclasses.dataclass(frozen=True, eq=False)
class ValueEvents:
    """Events by the value of a field and then by time; n of them.  May be memory-mapped.

    Attributes:
      key: value << 32 | Unix seconds, ascending; a value is a number from 0 on.
      positive: Of each task, how many of the first 0 … n events had label 1.
      known: Likewise, how many had a label.
    """

    key: UInt64[np.ndarray, " n"]
    positive: Sequence[Int[np.ndarray, " n+1"]] = ()
    known: Sequence[Int[np.ndarray, " n+1"]] = ()

    @classmethod
    def of(
        cls,
        value: Int[np.ndarray, " n"],
        time: Int[np.ndarray, " n"],
        label: Float[np.ndarray, "n tasks"] | None = None,
    ) -> ValueEvents:
        """Sorts events that fit into memory; a label is 0, 1, or NaN where it is missing."""
        key = value.astype(np.uint64) << np.uint64(32) | time.astype(np.uint64)
        order = np.argsort(key, kind="stable")
        tasks = () if label is None else tuple(label[order].T)
        return cls(
            key[order],
            tuple(cumulative(task == 1) for task in tasks),
            tuple(cumulative(~np.isnan(task)) for task in tasks),
        )

    def before(self, value: Int[np.ndarray, " q"], time: Int[np.ndarray, " q"]) -> np.ndarray:
        """How many events come before the first one of a value at a time or later.

        Quickest for values, and times of each, that ascend, as mapped pages are then touched once.
        """
        wanted = value.astype(np.uint64) << np.uint64(32) | _seconds(time).astype(np.uint64)
        return np.searchsorted(self.key, wanted)

    def first_time(self, value: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
        """Unix seconds of a value's first event; -1 of one that has none."""
        place = self.before(value, np.zeros_like(value))
        inside = np.minimum(place, len(self.key) - 1)
        found = self.key[inside] if len(self.key) else np.zeros(len(value), np.uint64)
        has = (place < len(self.key)) & ((found >> np.uint64(32)).astype(np.int64) == value)
        return np.where(has, (found & _TIME).astype(np.int64), -1)

    def first_times(self) -> Int[np.ndarray, " values"]:
        """Unix seconds of the first event of each value that has one, by value."""
        found, last = [np.empty(0, np.int64)], -1
        for begin in range(0, len(self.key), _BLOCK):
            block = np.asarray(self.key[begin : begin + _BLOCK])
            value = (block >> np.uint64(32)).astype(np.int64)
            is_first = np.diff(value, prepend=last) > 0
            found.append((block[is_first] & _TIME).astype(np.int64))
            last = int(value[-1])
        release(self.key)
        return np.concatenate(found)

    def since(self, time: int) -> ValueEvents:
        """The events from Unix seconds on, copied."""
        blocks = range(0, len(self.key), _BLOCK)
        late = np.empty(len(self.key), bool)
        for b in blocks:
            late[b : b + _BLOCK] = self.key[b : b + _BLOCK] & _TIME >= np.uint64(time)
        key = np.empty(np.count_nonzero(late), np.uint64)
        end = 0
        for b in blocks:
            kept = self.key[b : b + _BLOCK][late[b : b + _BLOCK]]
            key[end : end + len(kept)] = kept
            end += len(kept)

        def counted(before: np.ndarray) -> np.ndarray:
            flags = np.empty(len(late), bool)
            for b in blocks:
                flags[b : b + _BLOCK] = np.diff(before[b : b + _BLOCK + 1])
            release(before)
            return cumulative(flags[late])

        release(self.key)
        return ValueEvents(key, tuple(map(counted, self.positive)), tuple(map(counted, self.known)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Totals:
    """Of all events before some moments.

    Attributes:
      events: How many.
      labels: Of each task, how many had label 1 and any label, [2, moments].
    """

    events: Int[np.ndarray, " moments"]
    labels: Sequence[Float[np.ndarray, "2 moments"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trends:
    """Features of targets as of their requests.

    Attributes:
      windows: Seconds, by what they are called, such as {"7d": 604800}.
      tasks: Labels of which there are rates.
      label_delay: Seconds after an event from which its label is known.
      fields: Events by item, or by another field.
      time: Of all events, ascending, for totals; Unix seconds.
      positive: Of each task, how many of the first 0 … n events in time had label 1.
      known: Likewise, how many had a label.
      first: Of each field, the first time of each value, or -1; None reads it from the events.
    """

    windows: Mapping[str, int]
    tasks: tuple[str, ...]
    label_delay: int
    fields: Mapping[str, ValueEvents]
    time: UInt32[np.ndarray, " n"]
    positive: Sequence[Int[np.ndarray, " n+1"]] = ()
    known: Sequence[Int[np.ndarray, " n+1"]] = ()
    first: Mapping[str, Int[np.ndarray, " values"]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features."""
        return trend_names(tuple(self.fields), tuple(self.windows), self.tasks)

    def encode(
        self, values: Mapping[str, Int[np.ndarray, " t"]], time: Int[np.ndarray, " t"]
    ) -> dict[str, Float[np.ndarray, " t"]]:
        """float32 features of targets, from events strictly before their requests.

        FIELD_trend_WINDOW is half the log of (1 + events) / (1 + mean events of a value);
        FIELD_rate_WINDOW_TASK the log of the smoothed rate of label 1 over that of all events;
        FIELD_age half the log of 1 + days since the first event, or -1 if there was none.

        Args:
          values: Of each field, the targets' values; -1 for one that the log does not have.
          time: Of the targets' requests, Unix seconds.
        """
        found: dict[str, np.ndarray] = {}
        moments, of_target = np.unique(time, return_inverse=True)
        totals = {"": self._totals(moments)}
        totals |= {name: self._totals(moments - span) for name, span in self.windows.items()}
        for field in self.fields:
            order = np.lexsort((time, values[field]))
            ordered = values[field][order], time[order], of_target[order]
            for name, column in self._of_field(field, moments, totals, *ordered):
                found[name] = np.empty(len(time), np.float32)
                found[name][order] = column
        return found

    def _of_field(
        self,
        field: str,
        moments: np.ndarray,
        totals: Mapping[str, _Totals],
        value: np.ndarray,
        time: np.ndarray,
        of_target: np.ndarray,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Names and features of targets in the order of values and times.

        Args:
          field: Which.
          moments: Distinct times of requests.
          totals: Of all events before each moment, and before each window of it by name.
          value: Of each target.
          time: Of its request.
          of_target: Its place in the moments.
        """
        events, delay = self.fields[field], self.label_delay
        absent = value < 0
        value = np.where(absent, 0, value)
        mean = np.maximum(np.searchsorted(self._first_times[field], moments), 1)
        end = events.before(value, time)
        end_known = events.before(value, time - delay) if delay else end
        for name, span in self.windows.items():
            begin = events.before(value, time - span)
            count = np.where(absent, 0, end - begin)
            total = (totals[""].events - totals[name].events) / mean
            lift = np.log1p(count) - np.log1p(total)[of_target]
            yield f"{field}_trend_{name}", lift / 2
            if self.tasks and delay:
                begin = events.before(value, time - delay - span)
            for k, task in enumerate(self.tasks):
                positive = np.where(absent, 0, _inside(events.positive[k], begin, end_known))
                known = np.where(absent, 0, _inside(events.known[k], begin, end_known))
                inside = totals[""].labels[k] - totals[name].labels[k]
                average = ((inside[0] + 1) / (inside[1] + 2))[of_target]
                rate = (positive + _PRIOR * average) / ((known + _PRIOR) * average)
                yield f"{field}_rate_{name}_{task}", np.log(rate)
        first = self._first(field, value)
        seen = ~absent & (first >= 0) & (first < time)
        age = np.log1p(np.maximum(time - first, 0) / SECONDS_PER_DAY) / 2
        yield f"{field}_age", np.where(seen, age, _NEVER)

    def tail(self, sizes: Mapping[str, int]) -> Trends:
        """What later requests need: the events of the longest window before the end of the log.

        Args:
          sizes: How many values each field has.
        """
        last = int(self.time[-1]) if len(self.time) else 0
        start = max(last - max(self.windows.values()) - self.label_delay, 0)
        begin = int(np.searchsorted(self.time, np.uint32(start)))
        first = {field: self._first(field, np.arange(sizes[field])) for field in self.fields}
        return dataclasses.replace(
            self,
            fields={field: events.since(start) for field, events in self.fields.items()},
            time=np.asarray(self.time[begin:]),
            positive=tuple(np.asarray(c[begin:]) - c[begin] for c in self.positive),
            known=tuple(np.asarray(c[begin:]) - c[begin] for c in self.known),
            first=first,
        )

    def _totals(self, time: np.ndarray) -> _Totals:
        events = self._before(time)
        known = self._before(time - self.label_delay) if self.label_delay else events
        labels = [
            np.stack([positive[known], of_all[known]]).astype(np.float64)
            for positive, of_all in zip(self.positive, self.known, strict=True)
        ]
        return _Totals(events, labels)

    def _before(self, time: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.time, _seconds(time))

    def _first(self, field: str, value: np.ndarray) -> np.ndarray:
        if self.first is not None:
            return self.first[field][value]
        return self.fields[field].first_time(value)

    @functools.cached_property
    def _first_times(self) -> dict[str, np.ndarray]:
        if self.first is not None:
            return {field: np.sort(first[first >= 0]) for field, first in self.first.items()}
        return {field: np.sort(events.first_times()) for field, events in self.fields.items()}


def user_trend(count: Int[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """float32 feature of requests: half the log of 1 + the user's events in a window before."""
    return (np.log1p(count) / 2).astype(np.float32)


def trend_names(
    fields: Sequence[str], windows: Sequence[str], tasks: Sequence[str]
) -> tuple[str, ...]:
    """Names of the features of `Trends`."""
    names = []
    for field in fields if windows else ():
        for window in windows:
            names += [f"{field}_trend_{window}", *(f"{field}_rate_{window}_{t}" for t in tasks)]
        names.append(f"{field}_age")
    return tuple(names)


def cumulative(flags: np.ndarray) -> Int[np.ndarray, " n+1"]:
    """How many of the first 0 … n are set."""
    found = np.zeros(len(flags) + 1, np.int32)
    np.cumsum(flags, out=found[1:])
    return found


def release(array: np.ndarray) -> None:
    """Lets go of a mapped file's pages, which count as this process's memory once they are read."""
    mapped = getattr(array, "_mmap", None)  # None after a pickle, which copies
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _inside(cumulated: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of the events from `begin` to `end`, as float64."""
    return cumulated[end].astype(np.float64) - cumulated[begin]


def _seconds(time: np.ndarray) -> UInt32[np.ndarray, " q"]:
    """Unix seconds as events have them; a search among other types would copy all events."""
    return np.clip(time, 0, 2**32 - 1).astype(np.uint32)
