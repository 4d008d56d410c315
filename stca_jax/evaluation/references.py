"""What simple counting achieves on the same targets: the floor below a sequence model.

Two references, at each history length: how often the item occurs in the last L events, and a
logistic regression on a few features of such counts, fitted anew for each length. Both read whole
user logs from memory; NumPy only.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Integer, Shaped

from stca_jax.evaluation import metrics
from stca_jax.input.dataset import RequestDataset, RequestIndex

_SECONDS_PER_DAY = 86_400
_DECAY_DAYS = 28.0
# Stands for the age of a match where there is none. The fit is free to move it, by the weight of
# "any match"; log1p of 664 days only puts it past most ages.
_NO_MATCH_LOG_AGE = 6.5
_MAX_NEWTON_STEPS = 100
# Of the squared Newton decrement, about twice the gap to the minimum, relative to the objective.
_NEWTON_TOLERANCE = 1e-16

LabelledView = tuple["HistoryView", Shaped[np.ndarray, " t"]]


@dataclasses.dataclass(frozen=True)
class HistoryView:
    """One user's log with all requests made against it.

    Request k saw the first `history_end[k]` events and ranks the targets
    `[target_offset[k], target_offset[k + 1])`.

        event_time      10 20 20 30 40 50      6 events, oldest first
        history_end      3  5                  request 0 saw 3 of them, request 1 saw 5
        request_time    25 50                  its own second is not history
        target_offset    0  2  5               request 0 ranks 2 targets, request 1 ranks 3

    Attributes:
      event_ids: int32 [n] for each id field, such as "item" and "category".
      event_time: int64 [n], seconds, never decreasing.
      history_end: integers [q] in [0, n].
      request_time: int64 [q], seconds, later than every event of the request's history.
      target_offset: integers [q + 1] from 0 to t, never decreasing.
      target_ids: int32 [t] for each of the fields of `event_ids`.
      target_log_popularity: float32 [t], such as log1p of the item's count in training, or None.
      item_field: the field that identifies an item.

    Raises:
      ValueError: if a shape, an order or a type is another, or a history reaches its request.
    """

    event_ids: Mapping[str, Int32[np.ndarray, " n"]]
    event_time: Int64[np.ndarray, " n"]
    history_end: Integer[np.ndarray, " q"]
    request_time: Int64[np.ndarray, " q"]
    target_offset: Integer[np.ndarray, " q+1"]
    target_ids: Mapping[str, Int32[np.ndarray, " t"]]
    target_log_popularity: Float32[np.ndarray, " t"] | None = None
    item_field: str = "item"

    def __post_init__(self):
        self._check_shapes()
        self._check_order()

    @property
    def num_targets(self) -> int:
        """Number of targets of all requests."""
        return self.target_ids[self.item_field].size

    def _check_shapes(self):
        events, targets = list(self.event_ids), list(self.target_ids)
        if set(events) != set(targets) or self.item_field not in events:
            raise ValueError(
                f"event_ids has fields {events}, target_ids {targets} and item_field is "
                f"{self.item_field!r}; expected the same fields in both, the item's among them: "
                "drop the fields that only one has, and set item_field."
            )
        n, q, t = self.event_time.size, self.history_end.size, self.num_targets
        ids = [(f"event_ids[{field!r}]", self.event_ids[field], n) for field in events]
        ids += [(f"target_ids[{field!r}]", self.target_ids[field], t) for field in events]
        for name, array, _ in ids:
            if array.dtype != np.int32:
                raise ValueError(f"{name} is {array.dtype}, expected int32: cast the ids.")
        sized = [
            *ids,
            ("event_time", self.event_time, n),
            ("history_end", self.history_end, q),
            ("request_time", self.request_time, q),
            ("target_offset", self.target_offset, q + 1),
        ]
        if self.target_log_popularity is not None:
            sized += [("target_log_popularity", self.target_log_popularity, t)]
        for name, array, size in sized:
            if array.shape != (size,):
                raise ValueError(
                    f"{name} has shape {list(array.shape)}, expected [{size}] ({n} events, {q} "
                    f"requests, {t} targets): pass one value for each."
                )

    def _check_order(self):
        n, end, offset = self.event_time.size, self.history_end, self.target_offset
        if (self.event_time[1:] < self.event_time[:-1]).any():
            raise ValueError("event_time decreases, expected oldest first: sort the events by it.")
        if offset[0] != 0 or offset[-1] != self.num_targets or (offset[1:] < offset[:-1]).any():
            raise ValueError(
                f"target_offset is {offset}, expected to rise from 0 to {self.num_targets}: pass "
                "where each request's targets begin, then their number."
            )
        if ((end < 0) | (end > n)).any():
            raise ValueError(
                f"history_end spans [{end.min()}, {end.max()}], expected within [0, {n}]: count "
                "the events of this user before each request."
            )
        some = np.flatnonzero(end)
        late = some[self.event_time[end[some] - 1] >= self.request_time[some]]
        if late.size:
            raise ValueError(
                f"The history of request {late[0]} ends at time "
                f"{self.event_time[end[late[0]] - 1]}, expected before the request's time "
                f"{self.request_time[late[0]]}, or the answer leaks: lower history_end, as "
                "np.searchsorted(event_time, request_time) gives it."
            )


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
    index = _IdIndex(history, history.item_field)
    counts = index.rank(end) - index.rank(start)
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
    indexes = {field: _IdIndex(history, field) for field in history.event_ids}
    ranks = {field: (index.rank(start), index.rank(end)) for field, index in indexes.items()}
    log_counts = [np.log1p(last - first) for first, last in ranks.values()]

    first, last = ranks[history.item_field]
    decayed, age = _recency(history, indexes[history.item_field], first, last)
    any_match = last > first
    log_age = np.where(any_match, np.log1p(age), _NO_MATCH_LOG_AGE)

    context = [np.log(np.maximum(end - start, 1))]
    if history.target_log_popularity is not None:
        context.append(history.target_log_popularity)
    products = [left * right for left, right in itertools.product(context, log_counts)]
    products += [left * right for left, right in itertools.combinations(context, 2)]
    columns = [*log_counts, any_match, np.log1p(decayed), log_age, *context, *products]

    features = np.empty((*start.shape, len(columns)), np.float32)
    for column, values in enumerate(columns):
        features[..., column] = values
    return dict(zip(lengths, features, strict=True))


@dataclasses.dataclass(frozen=True)
class LogisticModel:
    """A fitted logistic regression on standardised features.

    Attributes:
      mean: float64 [f], subtracted from the features.
      scale: float64 [f], dividing them after.
      weight: float64 [f], of the standardised features.
      bias: the logit of average features.
    """

    mean: Float64[np.ndarray, " f"]
    scale: Float64[np.ndarray, " f"]
    weight: Float64[np.ndarray, " f"]
    bias: float

    def logit(self, features: Float32[np.ndarray, "n f"]) -> Float32[np.ndarray, " n"]:
        """Returns the log odds of a positive label for each row of features."""
        weight = self.weight / self.scale
        return (features @ weight + (self.bias - self.mean @ weight)).astype(np.float32)


def fit_logistic(
    features: Float32[np.ndarray, "n f"], label: Shaped[np.ndarray, " n"], c: float = 1.0
) -> LogisticModel:
    """Minimises c * (sum of log losses) + |weight|^2 / 2 by Newton's method.

    The objective is scikit-learn's, with its default c. The bias is not penalised.

    Args:
      features: [n, f] finite numbers.
      label: [n] of 0 or 1, both present.
      c: inverse strength of the penalty on the weights of standardised features.

    Returns:
      The fitted model.

    Raises:
      ValueError: if a feature is not finite or the labels do not have both classes.
    """
    label = np.asarray(label).astype(np.float64)
    if set(np.unique(label)) != {0.0, 1.0}:
        raise ValueError(f"Labels are {np.unique(label)[:5]}, expected 0 and 1, both present.")
    if not np.isfinite(features).all():
        column = np.flatnonzero(~np.isfinite(features).all(axis=0))[0]
        raise ValueError(f"Feature {column} has NaN or infinite values, expected finite ones.")

    mean = features.mean(axis=0, dtype=np.float64)
    scale = features.std(axis=0, dtype=np.float64)
    scale[np.ptp(features, axis=0) == 0] = 1.0  # a constant feature stays 0, as in scikit-learn
    standard = np.empty((len(features), len(mean) + 1))
    standard[:, :-1] = (features - mean) / scale
    standard[:, -1] = 1.0
    weight = _newton(standard, label, penalty=np.append(np.full(len(mean), 1 / c), 0.0))
    return LogisticModel(mean, scale, weight[:-1], float(weight[-1]))


def evaluate_references(
    train: Iterable[LabelledView], test: Iterable[LabelledView], lengths: Sequence[int]
) -> list[dict[str, str | float]]:
    """Scores the test targets with both references at each length.

    Args:
      train: pairs of one user's view and its int [t] labels of 0 or 1, to fit the regressions on.
      test: the same for the targets to score, one pair for each user.
      lengths: numbers L of most recent events to look at.

    Returns:
      Rows with `model` ("counting" or "logistic"), `length` and the values of
      `metrics.ranking_metrics`. Counts are no logits, so "counting" has ranking metrics only.

    Raises:
      ValueError: if a length is below 1, either side has no users, or `train` lacks a class.
    """
    train_features, train_label, *_ = _gather(train, lengths, count_features)
    test = list(test)
    test_features, label, user, request = _gather(test, lengths, count_features)
    test_counts = _gather(test, lengths, repeat_counts)[0]

    rows: list[dict[str, str | float]] = []
    for length in lengths:
        model = fit_logistic(train_features[length], train_label)
        scores = {"counting": test_counts[length], "logistic": model.logit(test_features[length])}
        for name, score in scores.items():
            values = metrics.ranking_metrics(label, score, user, request)
            if name == "counting":
                for key in ("log_loss", "calibration", "normalized_entropy"):
                    del values[key]
            rows.append({"model": name, "length": length, **values})
    return rows


def labelled_views(
    dataset: RequestDataset, requests: RequestIndex, *, task: int = 0
) -> Iterator[LabelledView]:
    """One view per user of the requests given, with the labels of one task.

    Args:
      dataset: a prepared dataset; its match fields and `log_popularity`, if any, are used.
      requests: some of its requests, grouped by record.
      task: index of the task.
    """
    schema = dataset.schema
    starts = np.flatnonzero(np.diff(requests.record, prepend=-1))
    for start, end in itertools.pairwise([*starts, len(requests)]):
        record = dataset.record(int(requests.record[start]))
        chosen = requests.position[start:end]
        first, last = record.target_offset[chosen], record.target_offset[chosen + 1]
        targets = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        popularity = record.target.get("log_popularity")
        yield (
            HistoryView(
                event_ids={n: record.history[n] for n in schema.match_fields},
                event_time=record.event_time.astype(np.int64),
                history_end=record.history_end[chosen],
                request_time=record.request_time[chosen].astype(np.int64),
                target_offset=np.append(0, np.cumsum(last - first)),
                target_ids={n: record.target[n][targets] for n in schema.match_fields},
                target_log_popularity=None if popularity is None else popularity[targets],
                item_field=schema.item,
            ),
            record.label[targets, task].astype(np.int64),
        )


def _windows(
    history: HistoryView, lengths: Sequence[int]
) -> tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, "l t"]]:
    """Returns the range of events of each target: its end, and its start at each length."""
    if min(lengths) < 1:
        raise ValueError(f"A length is {min(lengths)}, expected at least 1 event.")
    end = np.repeat(history.history_end.astype(np.int64), np.diff(history.target_offset))
    return end, np.maximum(end - np.asarray(lengths, np.int64)[:, None], 0)


class _IdIndex:
    """Finds the events that share each target's id.

    Events are sorted by the integer `id * stride + position`, so that those of one id lie together,
    oldest first, and a binary search counts them up to a position. The count in a range is the
    difference of two searches: its cost does not depend on the length of the range.
    """

    def __init__(self, history: HistoryView, field: str):
        ids = history.event_ids[field].astype(np.int64)
        self._stride = ids.size + 1  # positions 0 to n: a range may end after the last event
        self._keys = np.sort(ids * self._stride + np.arange(ids.size))
        self._target_key = history.target_ids[field].astype(np.int64) * self._stride

    def rank(self, position: Int64[np.ndarray, "*l t"]) -> Int64[np.ndarray, "*l t"]:
        """Returns where in the sorted events those of the target's id at `position` begin."""
        return np.searchsorted(self._keys, self._target_key + position)

    def sorted_ids_and_positions(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Returns the sorted events' ids and positions in the log."""
        return np.divmod(self._keys, self._stride)


def _recency(
    history: HistoryView,
    index: _IdIndex,
    first_rank: Int64[np.ndarray, "l t"],
    last_rank: Int64[np.ndarray, " t"],
) -> tuple[Float64[np.ndarray, "l t"], Float64[np.ndarray, " t"]]:
    """Returns the decayed count of matches in each range, and the last match's age in days.

    The age is that of the last match before `last_rank` even if it lies before `first_rank`, and
    infinite if there is none.
    """
    ids, position = index.sorted_ids_and_positions()
    days = history.event_time[position] / _SECONDS_PER_DAY
    request_days = np.repeat(
        history.request_time / _SECONDS_PER_DAY, np.diff(history.target_offset)
    )
    # Entry r is about the sorted event before rank r; there is none before rank 0.
    days_before = np.append(-np.inf, days)
    count_before = np.append(0.0, _decayed_running_count(ids, days))
    begin = index.rank(np.zeros_like(last_rank))

    def age(rank):
        return np.where(rank > begin, request_days - days_before[rank], np.inf)

    def decayed(rank):
        return count_before[rank] * np.exp(-age(rank) / _DECAY_DAYS)

    return decayed(last_rank) - decayed(first_rank), age(last_rank)


def _decayed_running_count(
    ids: Int64[np.ndarray, " n"], days: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Counts the events of the same id up to each one, with weight exp(-days before it / 28).

    `ids` are sorted, and `days` within an id. Each sum is relative to its own event: prefix sums of
    exp(days / 28) would lose the early years of a long log to rounding. The window of each sum
    doubles, so that log2 of the largest count is the number of steps.
    """
    count = np.ones(ids.size)
    step = 1
    while (same := np.flatnonzero(ids[step:] == ids[:-step])).size:
        later = same + step
        count[later] += count[same] * np.exp((days[same] - days[later]) / _DECAY_DAYS)
        step *= 2
    return count


def _gather(
    views: Iterable[LabelledView],
    lengths: Sequence[int],
    extract: Callable[[HistoryView, Sequence[int]], dict[int, np.ndarray]],
) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Extracts from the views of all users.

    Returns:
      The features of all targets by length, with their labels, users and requests, the latter two
      numbered from 0 in the order of the views.
    """
    parts, labels, users, requests = [], [], [], []
    num_requests = 0
    for user, (view, label) in enumerate(views):
        if np.shape(label) != (view.num_targets,):
            raise ValueError(
                f"Labels of user {user} have shape {list(np.shape(label))}, expected "
                f"[{view.num_targets}]: pass one for each target of the view."
            )
        parts.append(extract(view, lengths))
        labels.append(label)
        users.append(np.full(view.num_targets, user))
        request = num_requests + np.arange(view.history_end.size)
        requests.append(np.repeat(request, np.diff(view.target_offset)))
        num_requests += view.history_end.size
    if not parts:
        raise ValueError("No users, expected at least one: was the split empty?")
    features = {length: np.concatenate([part[length] for part in parts]) for length in lengths}
    return features, np.concatenate(labels), np.concatenate(users), np.concatenate(requests)


def _newton(
    features: Float64[np.ndarray, "n f"],
    label: Float64[np.ndarray, " n"],
    penalty: Float64[np.ndarray, " f"],
) -> Float64[np.ndarray, " f"]:
    """Minimises the sum of log losses + sum(penalty * weight^2) / 2."""

    def objective(weight):
        logit = features @ weight
        loss = np.logaddexp(0.0, np.where(label > 0, -logit, logit)).sum()
        return loss + penalty @ weight**2 / 2

    weight = np.zeros(features.shape[1])
    value = objective(weight)
    for _ in range(_MAX_NEWTON_STEPS):
        logit = features @ weight
        probability = np.exp(-np.logaddexp(0.0, -logit))
        gradient = features.T @ (probability - label) + penalty * weight
        curvature = probability * (1 - probability)
        hessian = (features * curvature[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step <= _NEWTON_TOLERANCE * value:
            return weight
        # Full steps may overshoot far from the minimum: halve until the objective falls.
        while (new_value := objective(weight - step)) > value:
            step /= 2
        weight, value = weight - step, new_value
    raise RuntimeError(
        f"No minimum after {_MAX_NEWTON_STEPS} Newton steps, expected about 10: the features "
        "separate the labels and the penalty is too weak to stop the weights; lower c."
    )
