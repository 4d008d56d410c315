"""What a log holds: counted shard by shard, added up, and shown as the profile."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import zoneinfo
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from stca_jax.data.interaction_log.event_sql import LEFT_OUT
from stca_jax.data.interaction_log.events import DUPLICATE, LogSource
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.interaction_log.odd_rows import PartSummary, lines_of_profile
from stca_jax.data.interaction_log.requests import Shard
from stca_jax.errors import UserError
from stca_jax.input.records import SPLITS
from stca_jax.schema import SECONDS_PER_DAY

_MINUTE = 60

Histogram = collections.Counter[int]


@dataclasses.dataclass
class ShardStatistics:
    """Counts over the events of one shard; adding up gives those of the log.

    Attributes:
      num_users: Users.
      num_events: Events.
      num_requests: Requests.
      num_tied: Events with the same user and time as another.
      first_time: Of all events, in seconds since 1970.
      last_time: Likewise.
      log_length: Users by their number of events.
      history_length: Requests by the length of their history.
      event_minute: Events by minute since 1970.
      request_minute: Requests by minute.
      num_targets: Labelled events.
      num_positive: Of them, those with label 1, by task.
      num_cut: Requests and sessions that were cut in two.
      longest_span: Seconds between two targets of a request, at most.
      fewest_items: Distinct items of a training request, at least; None if there is none.
    """

    num_users: int
    num_events: int
    num_tied: int
    first_time: int
    last_time: int
    log_length: Histogram
    event_minute: Histogram
    num_targets: int
    num_positive: list[int]
    num_requests: int = 0
    history_length: Histogram = dataclasses.field(default_factory=collections.Counter)
    request_minute: Histogram = dataclasses.field(default_factory=collections.Counter)
    num_cut: int = 0
    longest_span: int = 0
    fewest_items: int | None = None

    @classmethod
    def of(cls, shard: Shard) -> ShardStatistics:
        """Counts a shard that has events, but not its requests, which need times of splits."""
        targets = shard.is_target
        same = (shard.user[1:] == shard.user[:-1]) & (shard.time[1:] == shard.time[:-1])
        tied = np.append(same, False) | np.insert(same, 0, False)
        positive = (shard.labels[targets] == 1).sum(0).tolist() if shard.config.labels else []
        return cls(
            num_users=len(shard.user_ids),
            num_events=len(shard.time),
            num_tied=int(tied.sum()),
            first_time=int(shard.time.min()),
            last_time=int(shard.time.max()),
            log_length=_histogram(np.bincount(shard.user)),
            event_minute=_histogram(shard.time // _MINUTE),
            num_targets=int(targets.sum()),
            num_positive=positive,
        )

    def with_requests(self, shard: Shard) -> ShardStatistics:
        """These, and counts of the shard's requests."""
        requests = shard.requests
        return dataclasses.replace(
            self,
            num_requests=len(requests.time),
            history_length=_histogram(requests.history_end),
            request_minute=_histogram(requests.time // _MINUTE),
            num_cut=requests.num_cut,
            longest_span=int(requests.span.max(initial=0)),
            fewest_items=_fewest_items(shard),
        )


def add_up(shards: Sequence[ShardStatistics]) -> ShardStatistics:
    """Statistics of the log, of one shard with events or more."""
    total: dict[str, Any] = {}
    for field in dataclasses.fields(ShardStatistics):
        values = [getattr(s, field.name) for s in shards]
        if field.name in ("first_time", "fewest_items"):
            total[field.name] = min((v for v in values if v is not None), default=None)
        elif field.name in ("last_time", "longest_span"):
            total[field.name] = max(values)
        elif field.name == "num_positive":
            total[field.name] = [sum(task) for task in zip(*values, strict=True)]
        elif field.type == "Histogram":
            total[field.name] = sum(values, collections.Counter())
        else:
            total[field.name] = sum(values)
    return ShardStatistics(**total)


def split_times(source: LogSource, total: ShardStatistics) -> tuple[int, int]:
    """Where validation and test begin, in seconds since 1970.

    Shares of events are rounded to whole minutes.

    Raises:
      UserError: a value is no share and no date.
    """
    config = source.config
    return (
        _split_time("validation_start", config, total),
        _split_time("test_start", config, total),
    )


def check_splits(source: LogSource, total: ShardStatistics, times: Sequence[int]) -> list[str]:
    """Checks that each split has requests.

    Returns:
      Warnings: of requests that last long, and of a log without histories.

    Raises:
      UserError: a split has none.
    """
    config = source.config
    if not total.num_requests:
        raise UserError("the log has no requests, since no row has labels")
    for split, count in zip(SPLITS, split_counts(total, times), strict=True):
        if not count:
            raise UserError(
                f"no requests are left for {split}: validation_start={config.validation_start} is "
                f"{_date(times[0])}, test_start={config.test_start} is {_date(times[1])}, and "
                f"requests run from {_date(min(total.request_minute) * _MINUTE)} to "
                f"{_date(max(total.request_minute) * _MINUTE)}"
            )
    warnings = []
    if not any(total.history_length.keys()):
        warnings.append("no request has a history: no user has an event that is one, before it")
    if total.longest_span > SECONDS_PER_DAY:
        warnings.append(
            f"a request spans {total.longest_span / SECONDS_PER_DAY:.1f} days: events between its "
            "targets are in no history of theirs. Give a finer --request_id, or a smaller "
            "--session_gap"
        )
    return warnings


def split_counts(total: ShardStatistics, times: Sequence[int]) -> list[int]:
    """Requests of train, validation and test; exact if the times are whole minutes."""
    counts = [0, 0, 0]
    for minute, count in total.request_minute.items():
        counts[int(np.searchsorted(times, minute * _MINUTE, side="right"))] += count
    return counts


def _split_time(name: str, config: LogConfig, total: ShardStatistics) -> int:
    value = getattr(config, name)
    try:
        share = float(value)
    except ValueError:
        return _parse_date(name, value, config.time_zone)
    if not 0 < share < 1:
        raise UserError(f"{name} is {value}; give a share of the events between 0 and 1, or a date")
    minutes = sorted(total.event_minute)
    before = np.cumsum([total.event_minute[m] for m in minutes])
    return int(minutes[np.searchsorted(before, share * before[-1])]) * _MINUTE


def _parse_date(name: str, value: str, time_zone: str) -> int:
    try:
        date = datetime.datetime.fromisoformat(value)
    except ValueError:
        raise UserError(
            f"{name} is {value!r}; give a share of the events, such as 0.8, or a date, such "
            "as 2024-03-01 or '2024-03-01 06:00'"
        ) from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=zoneinfo.ZoneInfo(time_zone))
    return int(date.timestamp()) // _MINUTE * _MINUTE


@dataclasses.dataclass(frozen=True)
class ValueCounts:
    """How often values occur in training events.

    Attributes:
      columns: For each categorical column, "value", "count" (of training events; 0 for values first
        seen later) and "later" (of the others).
      moments: Of each numeric column.
      later_moments: Likewise, of events after training.
      users: Likewise "value", "count" and "later" of each user's events.
      classes: Targets that are 0 and that are 1, [splits, tasks, 2]; no tasks without labels.
    """

    columns: dict[str, pa.Table]
    moments: dict[str, Moments]
    later_moments: dict[str, Moments]
    users: pa.Table
    classes: Int[np.ndarray, "splits tasks 2"]

    @classmethod
    def of(cls, shard: Shard, times: Sequence[int]) -> ValueCounts:
        """Counts a shard's columns "item" and "feature_…", and labels; `times` start the splits."""
        is_train = shard.time < times[0]
        in_train, later = pa.array(is_train), pa.array(~is_train)
        columns: dict[str, pa.Table] = {}
        moments: dict[str, Moments] = {}
        later_moments: dict[str, Moments] = {}
        for name in shard.events.column_names:
            if name != "item" and not name.startswith("feature_"):
                continue
            column = shard.events[name]
            if pa.types.is_floating(column.type):
                moments[name] = Moments.of(column.filter(in_train))
                later_moments[name] = Moments.of(column.filter(later))
            else:
                counted = pa.table({"value": column, "is_train": in_train})
                columns[name] = _count(counted.filter(pc.is_valid(column)))
        num_users = len(shard.user_ids)
        of_user = {
            "value": shard.user_ids,
            "count": np.bincount(shard.user[is_train], minlength=num_users),
            "later": np.bincount(shard.user[~is_train], minlength=num_users),
        }
        classes = _count_classes(shard, times)
        return cls(columns, moments, later_moments, pa.table(of_user), classes)

    def __add__(self, other: ValueCounts) -> ValueCounts:
        """The counts of two shards together."""
        tables = {n: [t, other.columns[n]] for n, t in self.columns.items()}
        return ValueCounts(
            {n: sum_counts(pa.concat_tables(pair)) for n, pair in tables.items()},
            {n: m + other.moments[n] for n, m in self.moments.items()},
            {n: m + other.later_moments[n] for n, m in self.later_moments.items()},
            pa.concat_tables([self.users, other.users]),
            self.classes + other.classes,
        )


def sum_counts(table: pa.Table) -> pa.Table:
    """Adds up "count" and "later" of equal values."""
    return (
        table.group_by("value", use_threads=False)
        .aggregate([("count", "sum"), ("later", "sum")])
        .rename_columns(["value", "count", "later"])
        .combine_chunks()
    )


def _count(table: pa.Table) -> pa.Table:
    """Training events and all others of each value."""
    counted = (
        table.group_by("value", use_threads=False)
        .aggregate([("is_train", "sum"), ("is_train", "count")])
        .combine_chunks()
    )
    train = counted["is_train_sum"].cast(pa.int64())
    later = pc.subtract(counted["is_train_count"], train)
    return pa.table({"value": counted["value"], "count": train, "later": later})


def _fewest_items(shard: Shard) -> int | None:
    requests = shard.requests
    assert shard.times is not None
    in_train = np.flatnonzero(requests.time < shard.times[0])
    if not len(in_train):
        return None
    num_rows = np.bincount(requests.of_target, minlength=len(requests.time))[in_train]
    if num_rows.min() == 1:
        return 1
    code = shard.events["item"].combine_chunks().take(pa.array(requests.target_row))
    encoded = code.dictionary_encode()
    item = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    pairs = np.sort(requests.of_target * len(encoded.dictionary) + item)  # faster than np.unique
    pairs = pairs[np.flatnonzero(np.diff(pairs, prepend=-1))]
    distinct = np.bincount(pairs // len(encoded.dictionary), minlength=len(requests.time))
    return int(distinct[in_train].min())


def _count_classes(shard: Shard, times: Sequence[int]) -> Int[np.ndarray, "splits tasks 2"]:
    if not shard.config.labels:
        return np.zeros((len(SPLITS), 0, 2), np.int64)
    split = np.searchsorted(times, shard.time, side="right")
    of_split = [shard.labels[shard.is_target & (split == k)] for k in range(len(SPLITS))]
    return np.array([np.stack([(v == 0).sum(0), (v == 1).sum(0)], 1) for v in of_split], np.int64)


def format_profile(
    source: LogSource,
    read: PartSummary,
    total: ShardStatistics,
    reasons: Mapping[str, int],
    num_items: int,
    times: Sequence[int],
) -> str:
    """A page of text for people: what the log holds and what will be built from it."""
    config = source.config
    rejected = {r: n for r, n in sorted(reasons.items()) if r not in (DUPLICATE, LEFT_OUT)}
    num_rejected = sum(rejected.values())
    names = config.feature_names
    unused = sorted(set(source.log.all_columns) - set(source.log.columns))
    lines = [
        *lines_of_profile(source, read),
        ("columns not used", ", ".join(unused) or "none"),
        ("time", f"{_date(total.first_time)} to {_date(total.last_time)} UTC"),
        ("users, items", f"{total.num_users:,}, {num_items:,}"),
        ("events", f"{total.num_events:,}, {total.num_tied / total.num_events:.1%} of them at the "
                   "same second as another of the user"),
        ("users with one event", f"{total.log_length[1]:,}"),
        ("events per user", _percentiles(total.log_length)),
        ("rejected rows", f"{num_rejected:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in rejected.items()),
        *((r, f"{reasons[r]:,}") for r in (DUPLICATE, LEFT_OUT) if reasons.get(r)),
        ("requests", f"{total.num_requests:,}, the longest spans {total.longest_span:,} seconds"),
        ("requests cut", f"{total.num_cut:,}, after a long gap or where a split begins"),
        ("history of a request", _percentiles(total.history_length)),
        *_target_lines(source, total),
        *_split_lines(total, times),
        ("history features", ", ".join(names["history"])),
        ("target features", ", ".join(names["target"])),
        ("request features", ", ".join(names["request"])),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _target_lines(source: LogSource, total: ShardStatistics) -> list[tuple[str, str]]:
    config = source.config
    if not config.labels:
        sampled = config.negatives_per_positive
        return [("targets", f"the items of each request, {sampled} sampled for each")]
    tasks = zip(config.feature_names["tasks"], total.num_positive, strict=True)
    rates = [f"{task} {positive / max(total.num_targets, 1):.4f}" for task, positive in tasks]
    return [("targets", f"{total.num_targets:,}"), ("label rates", ", ".join(rates))]


def _split_lines(total: ShardStatistics, times: Sequence[int]) -> list[tuple[str, str]]:
    starts = [total.first_time, *times]
    counts = split_counts(total, times)
    return [
        (split, f"{count:,} requests from {_date(start)}")
        for split, count, start in zip(SPLITS, counts, starts, strict=True)
    ]


def _percentiles(histogram: Histogram) -> str:
    if not histogram:
        return "none"
    values = np.array(sorted(histogram))
    before = np.cumsum([histogram[v] for v in values])
    shown = [
        (f"p{p}", values[np.searchsorted(before, p / 100 * before[-1])]) for p in (10, 50, 90, 99)
    ]
    return ", ".join(f"{name} {value:,}" for name, value in [*shown, ("max", values[-1])])


def _histogram(values: np.ndarray) -> Histogram:
    distinct, counts = np.unique(values, return_counts=True)
    return collections.Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def _date(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")
