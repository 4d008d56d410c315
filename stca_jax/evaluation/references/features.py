"""How a target's ids occur in the last events before its request: what the references count."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Shaped

from stca_jax.evaluation.references.history import HistoryView
from stca_jax.schema import SECONDS_PER_DAY

DECAYS = (1.0, 7.0, 28.0, 90.0)  # days
_COUNT_DECAY = 28.0  # days, of `count_features`
_LONGEST_AGE = 3_650.0  # days; stands for the age of a match where there is none
# The same in `count_features`. The fit is free to move it, by the weight of "any match"; log1p of
# 664 days only puts it past most ages.
_NO_MATCH_LOG_AGE = 6.5


def repeat_counts(
    history: HistoryView, lengths: Sequence[int]
) -> dict[int, Float32[np.ndarray, " t"]]:
    """Counts each target's item in the last events before its request: the simplest reference.

    Args:
      history: one user's log and requests.
      lengths: numbers L of most recent events to look at.

    Returns:
      For each length the count of each target, usable as its score.

    Raises:
      ValueError: if a length is below 1.
    """
    end, start = _windows(history, lengths)
    counts = _Matches(history, (history.item_field,), start, end).count[0]
    return dict(zip(lengths, counts.astype(np.float32), strict=True))


def count_features(
    history: HistoryView, lengths: Sequence[int]
) -> dict[int, Float32[np.ndarray, "t f"]]:
    """Describes how each target's ids occur in the last events before its request.

    With F id fields there are 3F + 6 features, or 2F + 4 without popularity, in this order:

    - for each field of `event_ids`, log1p of the number of events that share the target's id;
    - for the item: whether any does; log1p of their count with weight exp(-age / 28 days); log1p
      of the age in days of the latest one;
    - log of the number of events in the window, and the target's log popularity;
    - each log count times the log of the window, each log count times popularity, and the log of
      the window times popularity.

    Args:
      history: one user's log and requests.
      lengths: numbers L of most recent events to look at.

    Returns:
      For each length the features of each target. Without history all counts are 0, and so is the
      log of the window.

    Raises:
      ValueError: if a length is below 1.
    """
    end, start = _windows(history, lengths)
    matches = _Matches(history, tuple(history.event_ids), start, end)
    log_counts = list(np.log1p(matches.count))
    item = list(history.event_ids).index(history.item_field)
    any_match = matches.count[item] > 0
    log_age = np.where(any_match, np.log1p(matches.age[item]), _NO_MATCH_LOG_AGE)

    context = [np.log(np.maximum(end - start, 1))]
    if history.target_log_popularity is not None:
        context.append(history.target_log_popularity)
    products = [left * right for left, right in itertools.product(context, log_counts)]
    products += [left * right for left, right in itertools.combinations(context, 2)]
    decayed = np.log1p(matches.decayed((_COUNT_DECAY,))[0, item])
    return _by_length(lengths, [*log_counts, any_match, decayed, log_age, *context, *products])


def match_features(
    history: HistoryView, lengths: Sequence[int]
) -> dict[int, Float32[np.ndarray, "t f"]]:
    """All that exact matches tell of each target: 7 numbers for every id field, and the window.

    With F id fields there are 7F + 1 features. For each field of `event_ids`, of the events that
    share the target's id: log1p of their number, their share of the window, log1p of the latest
    one's age in days (3,650 if there is none), and log1p of their number with weight
    exp(-age / days) for each of `DECAYS`. At the end the log of the window.

    Arguments and errors are those of `count_features`.
    """
    end, start = _windows(history, lengths)
    size = np.maximum(end - start, 1)
    matches = _Matches(history, tuple(history.event_ids), start, end)
    # The latest match before the range's end may lie before its start.
    age = np.where(matches.count > 0, matches.age[:, None], np.inf)
    log_age = np.log1p(np.minimum(age, _LONGEST_AGE))
    # A difference of sums may come out below 0 by a rounding.
    decayed = np.log1p(np.maximum(matches.decayed(DECAYS), 0))
    columns = []
    for field, count in enumerate(matches.count):
        columns += [np.log1p(count), count / size, log_age[field], *decayed[:, field]]
    return _by_length(lengths, [*columns, np.log(size)])


def _by_length(
    lengths: Sequence[int],
    columns: Sequence[Shaped[np.ndarray, "*l t"]],
) -> dict[int, Float32[np.ndarray, "t f"]]:
    """The columns, each of all lengths or the same at every length, as features of each length."""
    shape = np.broadcast_shapes(*(np.shape(values) for values in columns))
    features = np.empty((*shape, len(columns)), np.float32)
    for column, values in enumerate(columns):
        features[..., column] = values
    return dict(zip(lengths, features, strict=True))


def _windows(
    history: HistoryView, lengths: Sequence[int]
) -> tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, "l t"]]:
    """Returns the range of events of each target: its end, and its start at each length."""
    if min(lengths) < 1:
        raise ValueError(f"A length is {min(lengths)}, expected at least 1 event.")
    end = np.repeat(history.history_end.astype(np.int64), np.diff(history.target_offset))
    return end, np.maximum(end - np.asarray(lengths, np.int64)[:, None], 0)


class _Matches:
    """The events that share the target's id, in each target's ranges, for each of F fields.

    Events are sorted by the integer (field, id, position), so that those of one id lie together,
    oldest first, and a binary search counts them up to a position. The count in a range is the
    difference of two searches: its cost does not depend on the length of the range.

    Attributes:
      count: int64 [F, l, t], how many there are in each range.
      age: float64 [F, t], days since the latest one before the range's end, even if it lies before
        the range's start; infinite if there is none.
    """

    def __init__(
        self,
        history: HistoryView,
        fields: Sequence[str],
        start: Int64[np.ndarray, "l t"],
        end: Int64[np.ndarray, " t"],
    ):
        stride = history.event_time.size + 1  # positions 0 to n: a range may end after the last
        keys = _keys(history.event_ids, fields, stride)
        keys = np.sort((keys + np.arange(stride - 1)).ravel())
        self._ids, position = np.divmod(keys, stride)
        self._days = history.event_time[position] / SECONDS_PER_DAY
        self._request_days = np.repeat(
            history.request_time / SECONDS_PER_DAY, np.diff(history.target_offset)
        )
        # Entry r is about the sorted event before rank r; there is none before rank 0.
        self._days_before = np.append(-np.inf, self._days)
        target = _keys(history.target_ids, fields, stride)[:, None]
        begin, self._last = np.moveaxis(
            np.searchsorted(keys, target + np.stack([np.zeros_like(end), end])), 1, 0
        )
        self._begin = begin[:, None]
        self._first = np.searchsorted(keys, target + start)
        self.count = self._last[:, None] - self._first
        self.age = self._age(self._last[:, None])[:, 0]

    def decayed(self, decays: Sequence[float]) -> Float64[np.ndarray, "decays f l t"]:
        """The counts with weight exp(-age / decay), for each of some numbers of days."""
        decay = np.asarray(decays)[:, None]
        running = _decayed_running_count(self._ids, self._days, decay)
        running = np.concatenate([np.zeros((len(decay), 1)), running], axis=-1)

        def before(rank: Int64[np.ndarray, "f l t"]) -> Float64[np.ndarray, "decays f l t"]:
            return running[:, rank] * np.exp(-self._age(rank) / decay[..., None, None])

        return before(self._last[:, None]) - before(self._first)

    def _age(self, rank: Int64[np.ndarray, "f l t"]) -> Float64[np.ndarray, "f l t"]:
        """Days since the latest match before a rank."""
        age = self._request_days - self._days_before[rank]
        return np.where(rank > self._begin, age, np.inf)


def _keys(
    ids: Mapping[str, Int32[np.ndarray, " n"]], fields: Sequence[str], stride: int
) -> Int64[np.ndarray, "f n"]:
    """An integer for each id of each field, `stride` apart from the next."""
    values = np.stack([ids[field] for field in fields]).astype(np.int64)
    return (values + (np.arange(len(fields))[:, None] << 32)) * stride


def _decayed_running_count(
    ids: Int64[np.ndarray, " n"],
    days: Float64[np.ndarray, " n"],
    decay: Float64[np.ndarray, "decays 1"],
) -> Float64[np.ndarray, "decays n"]:
    """Counts the events of the same id up to each one, with weight exp(-days before it / decay).

    `ids` are sorted, and `days` within an id. Each sum is relative to its own event: prefix sums of
    exp(days / decay) would lose the early years of a long log to rounding. The window of each sum
    doubles, so that log2 of the largest count is the number of steps.
    """
    count = np.ones((len(decay), ids.size))
    step = 1
    while (same := np.flatnonzero(ids[step:] == ids[:-step])).size:
        later = same + step
        count[:, later] += count[:, same] * np.exp((days[same] - days[later]) / decay)
        step *= 2
    return count
