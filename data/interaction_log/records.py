"""From a shard's requests to users' records, with features encoded by fitted vocabularies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data import request_building as rb
from stca_jax.data.interaction_log.events import LogSource, id_keys, read_side_table
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.interaction_log.requests import Shard
from stca_jax.data.interaction_log.statistics import ShardStatistics, ValueCounts
from stca_jax.input.arrays import offsets
from stca_jax.schema import Schema

_HOUR, _DAY = 3_600, 86_400
_THURSDAY = 3  # of 1970-01-01, when Monday is 0
_LABEL_IDS = 3  # 0, 1, and unknown
_FARTHEST = 1e6  # deviations, beyond which float32 would not hold the squares of many


@dataclasses.dataclass(frozen=True)
class Encoder:
    """From the values of a categorical column to ids.

    Attributes:
      values: Every value of the log.
      ids: The id of each: its own, or an out-of-vocabulary one.
      vocabulary: Gives ids to these values and to all others.
    """

    values: pa.Array
    ids: np.ndarray
    vocabulary: rb.Vocabulary

    @classmethod
    def fit(
        cls, values: pa.Array, train_count: np.ndarray, min_count: int, num_oov: int
    ) -> Encoder:
        """Gives ids to values that training events have often enough."""
        distinct = values.to_numpy(zero_copy_only=False)
        if pa.types.is_string(values.type):
            distinct = distinct.astype(str)
        frequent = train_count >= min_count
        vocabulary = rb.Vocabulary(np.sort(distinct[frequent]), num_oov)
        return cls(values, vocabulary.encode(distinct), vocabulary)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.vocabulary.size

    @property
    def missing(self) -> int:
        """The id of a missing value: the first out-of-vocabulary one."""
        return len(self.vocabulary.known)

    def encode(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int32 ids; a value that the log does not have gets what the vocabulary gives it."""
        place = positions(column, self.values)
        ids = np.append(self.ids, self.missing)[place].astype(np.int32)
        new = place < 0
        if new.any():
            new &= np.asarray(pc.is_valid(column))
            values = column.filter(pa.array(new)).to_pylist()
            ids[new] = self.vocabulary.encode(np.array(values, self._dtype))
        return ids

    @property
    def _dtype(self) -> type:
        return str if pa.types.is_string(self.values.type) else np.int64


@dataclasses.dataclass(frozen=True)
class Scale:
    """From the values of a numeric column to numbers around 0; a missing value is the mean.

    Attributes:
      mean: Of training events.
      deviation: Likewise, or 1 for a constant.
    """

    mean: float
    deviation: float

    @classmethod
    def fit(cls, moments: Moments) -> Scale:
        """Of training events."""
        return cls(moments.mean, moments.deviation or 1.0)

    def encode(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """float32 numbers; what lies beyond `_FARTHEST` deviations is put there."""
        values = pc.fill_null(column, self.mean).to_numpy()
        values = np.where(np.isnan(values), self.mean, values)
        with np.errstate(over="ignore"):
            scaled = (values - self.mean) / self.deviation
        return scaled.clip(-_FARTHEST, _FARTHEST).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a shard's records depend on besides its events.

    Attributes:
      source: The log.
      schema: Features and vocabularies.
      time_origin: Unix seconds of time 0, a midnight.
      validation_start: Unix seconds.
      test_start: Unix seconds.
      encoders: Of the log's own features, by name.
      items: Every item of the log.
      item_key: A number that identifies each.
      item_count: How many training events each has.
      item_columns: Features of each item, by name, encoded.
      users: Every user of the user table.
      user_columns: Features of each, and last those of a user who is not there, encoded.
      first_user: Users in the shards before each shard.
      first_request: Requests in the shards before each shard.
    """

    source: LogSource
    schema: Schema
    time_origin: int
    validation_start: int
    test_start: int
    encoders: dict[str, Encoder | Scale]
    items: pa.Array
    item_key: np.ndarray
    item_count: np.ndarray
    item_columns: dict[str, np.ndarray]
    users: pa.Array
    user_columns: dict[str, np.ndarray]
    first_user: np.ndarray
    first_request: np.ndarray


def make_plan(
    source: LogSource,
    statistics: Sequence[ShardStatistics | None],
    counts: ValueCounts,
    first_time: int,
    times: Sequence[int],
) -> Plan:
    """Fits vocabularies and scales on training events.

    Args:
      source: The log.
      statistics: Of each shard, None for an empty one.
      counts: Of the whole log.
      first_time: Of all events, Unix seconds.
      times: Where validation and test begin, Unix seconds.
    """
    config = source.config
    by_item = counts.columns["item"].sort_by("value").combine_chunks()
    items = by_item["value"].combine_chunks()
    item_count = by_item["count"].to_numpy()
    fit_on = (config.min_count, config.num_oov)
    encoders: dict[str, Encoder | Scale] = {
        name.removeprefix("feature_"): Encoder.fit(
            table["value"].combine_chunks(), table["count"].to_numpy(), *fit_on
        )
        for name, table in counts.columns.items()
        if name != "item"
    }
    encoders |= {n.removeprefix("feature_"): Scale.fit(m) for n, m in counts.moments.items()}
    item_encoder = Encoder.fit(items, item_count, *fit_on)
    item_columns = {"item": item_encoder.ids, "log_popularity": rb.log_popularity(item_count)}
    vocabularies = {"item": item_encoder.size, "hour": 24, "weekday": 7}
    vocabularies |= {c.name: _LABEL_IDS for c in config.feature_columns["label"]}
    vocabularies |= {n: e.size for n, e in encoders.items() if isinstance(e, Encoder)}
    users, user_columns = pa.array([], counts.users.type), dict[str, np.ndarray]()
    if source.items is not None:
        table = read_side_table(source, "items")
        found = _side_features(table, items, item_count, fit_on)
        item_columns |= {n: column for n, (column, _) in found.items()}
        vocabularies |= {n: size for n, (_, size) in found.items() if size}
    if source.users is not None:
        table = read_side_table(source, "users")
        users = table["id"].combine_chunks()
        trained = pc.is_in(users, counts.users).to_numpy(zero_copy_only=False)
        # One more user, who is not in the table, has no features.
        known = pa.concat_arrays([users, pa.nulls(1, users.type)])
        found = _side_features(table, known, np.append(trained, 0).astype(np.int64), (1, fit_on[1]))
        user_columns = {n: column for n, (column, _) in found.items()}
        vocabularies |= {n: size for n, (_, size) in found.items() if size}
    names = config.feature_names
    return Plan(
        source=source,
        schema=Schema(
            history=names["history"],
            target=names["target"],
            request=names["request"],
            tasks=names["tasks"],
            vocabularies=vocabularies,
        ),
        time_origin=first_time // _DAY * _DAY,
        validation_start=times[0],
        test_start=times[1],
        encoders=encoders,
        items=items,
        item_key=id_keys(items),
        item_count=item_count,
        item_columns=item_columns,
        users=users,
        user_columns=user_columns,
        first_user=_before([s.num_users if s else 0 for s in statistics]),
        first_request=_before([s.num_requests if s else 0 for s in statistics]),
    )


def _side_features(
    table: pa.Table, ids: pa.Array, train_count: np.ndarray, fit_on: tuple[int, int]
) -> dict[str, tuple[np.ndarray, int]]:
    """Features of the ids, and their number of values, 0 if numeric.

    Vocabularies and scales are fitted on ids that occur in training, each as often as it occurs.
    """
    row = positions(ids, table["id"].combine_chunks())
    columns: dict[str, tuple[np.ndarray, int]] = {}
    for field in table.schema:
        if field.name == "id":
            continue
        padded = pa.concat_arrays([table[field.name].combine_chunks(), pa.nulls(1, field.type)])
        column = padded.take(pa.array(np.where(row < 0, len(padded) - 1, row)))
        name = field.name.removeprefix("feature_")
        if pa.types.is_floating(field.type):
            scale = Scale.fit(Moments.of(column.filter(pa.array(train_count > 0))))
            columns[name] = scale.encode(column), 0
        else:
            encoded = column.dictionary_encode()
            code = encoded.indices.fill_null(-1).to_numpy()
            total = np.bincount(code[code >= 0], train_count[code >= 0], len(encoded.dictionary))
            encoder = Encoder.fit(encoded.dictionary, total, *fit_on)
            columns[name] = encoder.encode(column), encoder.size
    return columns


def build_user_logs(plan: Plan, shard: Shard, index: int) -> rb.UserLogs:
    """Records of all users of a shard.

    Args:
      plan: Of the log.
      shard: Its events.
      index: Which shard it is.
    """
    requests = shard.requests
    in_history = np.flatnonzero(shard.is_history)
    events = shard.events.take(pa.array(in_history))
    event_item = positions(events["item"], plan.items)
    targets, label = _targets(plan, shard)
    num_users, num_requests = len(shard.user_ids), len(requests.time)
    item_features = [c.name for c in plan.source.config.feature_columns["item"]]
    history = {n: plan.item_columns[n][event_item] for n in ("item", *item_features)}
    history |= {n: e.encode(events[f"feature_{n}"]) for n, e in plan.encoders.items()}
    history |= _label_features(shard, in_history)
    user_row = positions(shard.user_ids, plan.users)[requests.user]
    target = {n: plan.item_columns[n][targets.item] for n in ("item", *item_features)}
    target["log_popularity"] = plan.item_columns["log_popularity"][targets.item]
    shown = shard.events.take(pa.array(requests.target_row))
    for column in plan.source.config.feature_columns["target"]:
        target[column.name] = plan.encoders[column.name].encode(shown[f"feature_{column.name}"])
    return rb.UserLogs(
        user_id=plan.first_user[index] + np.arange(num_users),
        event_offset=offsets(shard.user[in_history], num_users),
        event_time=shard.time[in_history] - plan.time_origin,
        history=history,
        request_offset=offsets(requests.user, num_users),
        request_id=plan.first_request[index] + np.arange(num_requests),
        request_time=requests.time - plan.time_origin,
        request_split=rb.time_split(requests.time, plan.validation_start, plan.test_start),
        history_end=requests.history_end,
        request={
            "hour": requests.time // _HOUR % 24,
            "weekday": (requests.time // _DAY + _THURSDAY) % 7,
            **{n: column[user_row] for n, column in plan.user_columns.items()},
        },
        target_offset=offsets(targets.request, num_requests),
        target=target,
        label=label,
    )


def _targets(plan: Plan, shard: Shard) -> tuple[rb.Targets, np.ndarray]:
    """Targets by request, and their labels, [t, tasks]."""
    requests, config = shard.requests, plan.source.config
    item = positions(shard.events["item"], plan.items)[requests.target_row]
    if config.labels:
        label = shard.labels[requests.target_row].astype(np.float32)
        return rb.Targets(requests.of_target, item, label[:, 0]), label
    targets = rb.next_item_targets(
        requests.of_target,
        item,
        request_key=requests.key,
        item_key=plan.item_key,
        train_count=plan.item_count,
        max_positives=config.max_positives,
        negatives_per_positive=config.negatives_per_positive,
        seed=config.seed,
    )
    return targets, targets.label[:, None]


def _label_features(shard: Shard, row: np.ndarray) -> dict[str, np.ndarray]:
    """What came of earlier events: 0, 1, or 2 where it is unknown."""
    columns = shard.config.feature_columns["label"]
    if not columns:
        return {}
    label = np.where(shard.labels < 0, _LABEL_IDS - 1, shard.labels)[row]
    return {c.name: label[:, k] for k, c in enumerate(columns)}


def positions(column: pa.Array | pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Where each entry of the column stands among the values; -1 if nowhere, or missing."""
    found = pc.index_in(column, values, skip_nulls=True)
    return found.fill_null(-1).to_numpy().astype(np.int64)


def _before(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])[:-1]
