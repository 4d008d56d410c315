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
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64

from stca_jax.errors import UserError
from stca_jax.schema import SECONDS_PER_DAY

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": SECONDS_PER_DAY, "w": 7 * SECONDS_PER_DAY}
_PRIOR = 20.0  # labelled events that a rate counts as if it had been the average
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
        """How many events come before the first one of a value at a time or later."""
        wanted = value.astype(np.uint64) << np.uint64(32) | _seconds(time).astype(np.uint64)
        order = np.argsort(wanted)  # a search in order touches each page once
        found = np.empty(len(wanted), np.int64)
        found[order] = np.searchsorted(self.key, wanted[order])
        return found

    def first_time(self, value: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
        """Unix seconds of a value's first event; -1 of one that has none."""
        place = self.before(value, np.zeros_like(value))
        inside = np.minimum(place, len(self.key) - 1)
        found = self.key[inside] if len(self.key) else np.zeros(len(value), np.uint64)
        has = (place < len(self.key)) & ((found >> np.uint64(32)).astype(np.int64) == value)
        return np.where(has, (found & np.uint64(2**32 - 1)).astype(np.int64), -1)


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
        labelled = time - self.label_delay
        for field, events in self.fields.items():
            value = values[field]
            absent = value < 0
            value = np.where(absent, 0, value)
            first = self._first(field, value)
            seen = ~absent & (first >= 0) & (first < time)
            mean = self._values_before(field, time)
            end, end_known = events.before(value, time), events.before(value, labelled)
            for name, seconds in self.windows.items():
                count = np.where(absent, 0, end - events.before(value, time - seconds))
                total = self._before(time) - self._before(time - seconds)
                lift = np.log1p(count) - np.log1p(total / np.maximum(mean, 1))
                found[f"{field}_trend_{name}"] = (lift / 2).astype(np.float32)
                begin = events.before(value, labelled - seconds) if self.tasks else None
                for k, task in enumerate(self.tasks):
                    spans = begin, end_known, labelled, seconds
                    rate = self._log_rate(events, k, absent, *spans)
                    found[f"{field}_rate_{name}_{task}"] = rate.astype(np.float32)
            age = np.log1p(np.maximum(time - first, 0) / SECONDS_PER_DAY) / 2
            found[f"{field}_age"] = np.where(seen, age, _NEVER).astype(np.float32)
        return found

    def tail(self, sizes: Mapping[str, int]) -> Trends:
        """What later requests need: the events of the longest window before the end of the log.

        Args:
          sizes: How many values each field has.
        """
        last = int(self.time[-1]) if len(self.time) else 0
        start = max(last - max(self.windows.values()) - self.label_delay, 0)
        begin = int(np.searchsorted(self.time, np.uint32(start)))
        fields = {}
        for field, events in self.fields.items():
            keep = (np.asarray(events.key) & np.uint64(2**32 - 1)) >= np.uint64(start)
            fields[field] = ValueEvents(
                np.asarray(events.key)[keep],
                tuple(cumulative(np.diff(c)[keep]) for c in events.positive),
                tuple(cumulative(np.diff(c)[keep]) for c in events.known),
            )
        first = {field: self._first(field, np.arange(sizes[field])) for field in self.fields}
        return dataclasses.replace(
            self,
            fields=fields,
            time=np.asarray(self.time[begin:]),
            positive=tuple(np.asarray(c[begin:]) - c[begin] for c in self.positive),
            known=tuple(np.asarray(c[begin:]) - c[begin] for c in self.known),
            first=first,
        )

    def _log_rate(
        self,
        events: ValueEvents,
        task: int,
        absent: np.ndarray,
        begin: np.ndarray | None,
        end: np.ndarray,
        time: np.ndarray,
        seconds: int,
    ) -> np.ndarray:
        def inside(cumulated: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return cumulated[b].astype(np.float64) - cumulated[a]

        whole = self._before(time - seconds), self._before(time)
        average = (inside(self.positive[task], *whole) + 1) / (inside(self.known[task], *whole) + 2)
        assert begin is not None
        positive = np.where(absent, 0, inside(events.positive[task], begin, end))
        known = np.where(absent, 0, inside(events.known[task], begin, end))
        return np.log((positive + _PRIOR * average) / ((known + _PRIOR) * average))

    def _before(self, time: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.time, _seconds(time))

    def _first(self, field: str, value: np.ndarray) -> np.ndarray:
        if self.first is not None:
            return self.first[field][value]
        return self.fields[field].first_time(value)

    def _values_before(self, field: str, time: np.ndarray) -> np.ndarray:
        """How many values of a field had been seen before each time."""
        return np.searchsorted(self._first_times[field], time)

    @functools.cached_property
    def _first_times(self) -> dict[str, np.ndarray]:
        if self.first is not None:
            return {field: np.sort(first[first >= 0]) for field, first in self.first.items()}
        found = {}
        for field, events in self.fields.items():
            value = np.asarray(events.key) >> np.uint64(32)
            begins = np.flatnonzero(np.diff(value, prepend=np.uint64(2**63)))
            first = np.asarray(events.key)[begins] & np.uint64(2**32 - 1)
            found[field] = np.sort(first.astype(np.int64))
        return found


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
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int32)]).astype(np.int32)


def _seconds(time: np.ndarray) -> UInt32[np.ndarray, " q"]:
    """Unix seconds as events have them; a search among other types would copy all events."""
    return np.clip(time, 0, 2**32 - 1).astype(np.uint32)
