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
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64

from stca_jax.errors import UserError
from stca_jax.input.mapped import release
from stca_jax.schema import SECONDS_PER_DAY

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": SECONDS_PER_DAY, "w": 7 * SECONDS_PER_DAY}
_PRIOR = 20.0  # labelled events that a rate counts as if it had been the average
_TIME = np.uint64(2**32 - 1)  # what of a key is seconds
_BLOCK = 1 << 22  # events looked at in one go, where memory should not follow their number
_TARGETS = 1 << 12  # looked up in one go: their events and results stay in the caches
_DENSE = 1 << 19  # events of these targets that are read one after the other, not leapt over
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

        Quickest for values, and times of each, that ascend: what is next to it was just looked at.
        """
        return np.searchsorted(self.key, _keys(value, time))

    def of_values(self, first: int, last: int) -> ValueEvents:
        """The events of some values, the last one included; views, or copies of few.

        Counts of them start anywhere: only differences say something.
        """
        begin, end = np.searchsorted(self.key, _keys(np.array([first, last + 1]), np.zeros(2)))
        copied = np.array if end - begin <= _DENSE else np.asarray
        return ValueEvents(
            copied(self.key[begin:end]),
            tuple(copied(c[begin : end + 1]) for c in self.positive),
            tuple(copied(c[begin : end + 1]) for c in self.known),
        )

    def release(self) -> None:
        """Lets go of mapped pages."""
        for array in (self.key, *self.positive, *self.known):
            release(array)

    def first_times(self) -> Int[np.ndarray, " values"]:
        """Unix seconds of the first event of each value, or -1, up to the last that has one."""
        size = int(self.key[-1] >> np.uint64(32)) + 1 if len(self.key) else 0
        found, last = np.full(size, -1), -1
        for begin in range(0, len(self.key), _BLOCK):
            block = np.asarray(self.key[begin : begin + _BLOCK])
            value = (block >> np.uint64(32)).astype(np.int64)
            is_first = np.diff(value, prepend=last) > 0
            found[value[is_first]] = (block[is_first] & _TIME).astype(np.int64)
            last = int(value[-1])
            release(self.key)
        return found

    def since(self, time: int) -> ValueEvents:
        """The events from Unix seconds on, copied."""
        blocks = [slice(b, b + _BLOCK) for b in range(0, len(self.key), _BLOCK)]
        late = np.empty(len(self.key), bool)
        for block in blocks:
            late[block] = self.key[block] & _TIME >= np.uint64(time)
            release(self.key)
        key = np.empty(np.count_nonzero(late), np.uint64)
        end = 0
        for block in blocks:
            kept = self.key[block][late[block]]
            key[end : end + len(kept)] = kept
            end += len(kept)
            release(self.key)

        def counted(before: np.ndarray) -> np.ndarray:
            flags = np.empty(len(late), bool)
            for block in blocks:
                flags[block] = np.diff(before[block.start : block.stop + 1])
                release(before)
            return cumulative(flags[late])

        return ValueEvents(key, tuple(map(counted, self.positive)), tuple(map(counted, self.known)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Totals:
    """Of all events in a window before some moments.

    Attributes:
      events: How many.
      average: Of each task, the rate of label 1.
    """

    events: Int[np.ndarray, " moments"]
    average: Sequence[Float[np.ndarray, " moments"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trends:
    """Features of targets as of their requests.

    Attributes:
      windows: Seconds, by what they are called, such as {"7d": 604800}.
      tasks: Labels of which there are rates.
      label_delay: Seconds after an event from which its label is known.
      fields: Events by item, or by another field.
      time: Unix seconds at which there were events, ascending, each once; for totals.
      events: How many events there were in the first 0 … n of these seconds.
      positive: Of each task, how many of them had label 1.
      known: Likewise, how many had a label.
      first: Of each field, the first time of each value, or -1; None reads it from the events.
    """

    windows: Mapping[str, int]
    tasks: tuple[str, ...]
    label_delay: int
    fields: Mapping[str, ValueEvents]
    time: UInt32[np.ndarray, " n"]
    events: Int[np.ndarray, " n+1"]
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
          time: Of the targets' requests, Unix seconds; quickest where equal ones stand together.
        """
        moments, of_target = _distinct(time)
        totals = {name: self._totals(moments, span) for name, span in self.windows.items()}
        found: dict[str, np.ndarray] = {}
        for field, events in self.fields.items():
            names = trend_names((field,), tuple(self.windows), self.tasks)
            found |= {name: np.empty(len(time), np.float32) for name in names}
            before = self._before_moments(field, moments, totals)
            # Equal targets have equal features, whatever their order among each other.
            order = np.argsort(_keys(values[field], time))
            for begin in range(0, len(order), _TARGETS):
                rows = order[begin : begin + _TARGETS]
                moment = of_target[rows]
                totals_of = (column[moment] for column in before)
                columns = self._of_targets(field, values[field][rows], time[rows], totals_of)
                for name, column in zip(names, columns, strict=True):
                    found[name][rows] = column
                events.release()
        return found

    def _before_moments(
        self, field: str, moments: np.ndarray, totals: Mapping[str, _Totals]
    ) -> list[np.ndarray]:
        """Of each window the log of 1 + mean events of a value, and each task's average rate."""
        num_values = np.maximum(np.searchsorted(self._sorted_first[field], moments), 1)
        return [
            column
            for total in totals.values()
            for column in (np.log1p(total.events / num_values), *total.average)
        ]

    def _of_targets(
        self, field: str, value: np.ndarray, time: np.ndarray, totals: Iterator[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Features of targets, in the order of their names.

        Args:
          field: Which.
          value: Of each target, ascending but for those below 0, which count as 0.
          time: Of its request.
          totals: As `_before_moments` gives them, of each target's request.
        """
        delay, absent = self.label_delay, value < 0
        value = np.where(absent, 0, value)
        events = self.fields[field].of_values(int(value[0]), int(value[-1]))
        end = events.before(value, time)
        end_known = events.before(value, time - delay) if delay else end
        at_end = [counts[end_known] for counts in (*events.positive, *events.known)]
        for span in self.windows.values():
            begin = events.before(value, time - span)
            count = np.where(absent, 0, end - begin)
            yield (np.log1p(count) - next(totals)) / 2
            if self.tasks and delay:
                begin = events.before(value, time - delay - span)
            at_begin = [counts[begin] for counts in (*events.positive, *events.known)]
            inside = [np.where(absent, 0, b - a) for a, b in zip(at_begin, at_end, strict=True)]
            for k in range(len(self.tasks)):
                average, positive, known = next(totals), inside[k], inside[len(self.tasks) + k]
                rate = (positive + _PRIOR * average) / ((known + _PRIOR) * average)
                yield np.log(rate)
        first = self._first_of(field, value)
        seen = ~absent & (first >= 0) & (first < time)
        age = np.log1p(np.maximum(time - first, 0) / SECONDS_PER_DAY) / 2
        yield np.where(seen, age, _NEVER)

    def tail(self, sizes: Mapping[str, int]) -> Trends:
        """What later requests need: the events of the longest window before the end of the log.

        Args:
          sizes: How many values each field has.
        """
        last = int(self.time[-1]) if len(self.time) else 0
        start = max(last - max(self.windows.values()) - self.label_delay, 0)
        begin = int(np.searchsorted(self.time, np.uint32(start)))
        first = {field: self._first_of(field, np.arange(sizes[field])) for field in self.fields}
        return dataclasses.replace(
            self,
            fields={field: events.since(start) for field, events in self.fields.items()},
            time=np.asarray(self.time[begin:]),
            events=np.asarray(self.events[begin:]) - self.events[begin],
            positive=tuple(np.asarray(c[begin:]) - c[begin] for c in self.positive),
            known=tuple(np.asarray(c[begin:]) - c[begin] for c in self.known),
            first=first,
        )

    def _totals(self, moments: np.ndarray, span: int) -> _Totals:
        """Of the events in a window of so many seconds before each moment."""
        begin, end = self._before(moments - span), self._before(moments)
        count = _inside(self.events, begin, end)
        if self.label_delay:
            begin, end = (self._before(moments - s - self.label_delay) for s in (span, 0))
        averages = [
            (_inside(positive, begin, end) + 1) / (_inside(known, begin, end) + 2)
            for positive, known in zip(self.positive, self.known, strict=True)
        ]
        for array in (self.time, self.events, *self.positive, *self.known):
            release(array)
        return _Totals(count, averages)

    def _before(self, time: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.time, _seconds(time))

    def _first_of(self, field: str, value: np.ndarray) -> np.ndarray:
        """Unix seconds of the first event of values; -1 of one that has none."""
        return self._first[field][np.minimum(value, len(self._first[field]) - 1)]

    @functools.cached_property
    def _first(self) -> dict[str, np.ndarray]:
        """Of each field, the first time of each value, or -1, which stands at the end as well."""
        known = self.first or {field: events.first_times() for field, events in self.fields.items()}
        return {field: np.append(first, -1) for field, first in known.items()}

    @functools.cached_property
    def _sorted_first(self) -> dict[str, np.ndarray]:
        """Of each field, the first times of the values that have one, ascending."""
        return {field: np.sort(first[first >= 0]) for field, first in self._first.items()}


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


def count_seconds(
    time: Int[np.ndarray, " events"],
) -> tuple[UInt32[np.ndarray, " n"], Int[np.ndarray, " n+1"]]:
    """The distinct seconds of events, and how many there were in the first 0 … n of them."""
    seconds, count = np.unique(_seconds(time), return_counts=True)
    return seconds, np.append(0, np.cumsum(count))


def cumulative(flags: np.ndarray) -> Int[np.ndarray, " n+1"]:
    """How many of the first 0 … n are set."""
    found = np.zeros(len(flags) + 1, np.int32)
    np.cumsum(flags, out=found[1:])
    return found


def _inside(cumulated: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of the events from `begin` to `end`, as float64."""
    return cumulated[end].astype(np.float64) - cumulated[begin]


def _distinct(time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct times, and the place of each one among them; quick where equal ones are together."""
    begins = np.flatnonzero(np.diff(time, prepend=-1))
    distinct, place = np.unique(time[begins], return_inverse=True)
    return distinct, np.repeat(place, np.diff(np.append(begins, len(time))))


def _keys(value: np.ndarray, time: np.ndarray) -> UInt64[np.ndarray, " q"]:
    """Values and Unix seconds as events have them; a value below 0 counts as 0."""
    return np.maximum(value, 0).astype(np.uint64) << np.uint64(32) | _seconds(time)


def _seconds(time: np.ndarray) -> UInt32[np.ndarray, " q"]:
    """Unix seconds as events have them; a search among other types would copy all events."""
    return np.clip(time, 0, 2**32 - 1).astype(np.uint32)
