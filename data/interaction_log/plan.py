"""What a log's records depend on besides their events: vocabularies, scales, side tables, times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data import request_building as rb
from stca_jax.data.interaction_log.encoders import (
    encode_column,
    fit_scale,
    fit_vocabulary,
    positions,
)
from stca_jax.data.interaction_log.event_stream import EventStream
from stca_jax.data.interaction_log.events import LogSource, SideTable, id_keys
from stca_jax.data.interaction_log.log_config import Column, LogConfig
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.interaction_log.statistics import ShardStatistics, ValueCounts
from stca_jax.data.negatives import make_sampler
from stca_jax.errors import UserError
from stca_jax.input.encoding import Clock, Encoder, Vocabulary
from stca_jax.input.features import Features, FeatureTable
from stca_jax.input.trends import Trends
from stca_jax.schema import SECONDS_PER_DAY, Schema

LABELS = Vocabulary(np.array([0, 1]), num_oov=1)
"""A label as a feature of the history: 0, 1, or 2 where it is unknown."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a shard's records depend on besides its events.

    Attributes:
      source: The log.
      schema: Features and vocabularies.
      time_origin: Unix seconds of time 0, a midnight.
      validation_start: Unix seconds.
      test_start: Unix seconds.
      encoders: Of all features, by name.
      items: Every item of the log, and then those that only the item table has.
      item_key: A number that identifies each.
      item_count: How many training events each has.
      item_columns: Features of each item and last those of an unknown one, by name, encoded.
      users: Every user of the user table.
      user_columns: Features of each, and last those of a user who is not there, encoded.
      clock: Of the request's hour and weekday.
      stream: All events in the order of time, and by item; None if nothing needs them.
      first_user: Users in the shards before each shard.
      first_request: Requests in the shards before each shard.
    """

    source: LogSource
    schema: Schema
    time_origin: int
    validation_start: int
    test_start: int
    encoders: dict[str, Encoder]
    items: pa.Array
    item_key: np.ndarray
    item_count: np.ndarray
    item_columns: dict[str, np.ndarray]
    users: pa.Array
    user_columns: dict[str, np.ndarray]
    clock: Clock
    stream: EventStream | None
    first_user: np.ndarray
    first_request: np.ndarray

    def sampler(self, request_time: np.ndarray) -> rb.ItemSampler:
        """Where requests of these times, in Unix seconds, get their negatives from."""
        none = np.empty(0, np.uint32)
        time, item = (none, none) if self.stream is None else (self.stream.time, self.stream.item)
        kind = self.source.config.sampling
        return make_sampler(kind, self.item_count, time, item, request_time)

    @functools.cached_property
    def trends(self) -> Trends | None:
        """Of items before a request; None if none are wanted."""
        config, stream = self.source.config, self.stream
        if stream is None or not config.trend_windows:
            return None
        return Trends(
            config.trend_windows,
            stream.labels,
            config.label_seconds,
            {field: stream.by_value(field) for field in stream.fields},
            *stream.totals,
        )

    def trend_values(self, item: np.ndarray) -> dict[str, np.ndarray]:
        """What the events of each field are counted by, for items."""
        fields = self.source.config.trends_of
        return {n: item if n == "item" else self.item_columns[n][item] for n in fields}


def make_plan(
    source: LogSource,
    statistics: Sequence[ShardStatistics | None],
    counts: ValueCounts,
    side_tables: Mapping[str, SideTable],
    first_time: int,
    times: Sequence[int],
    stream: EventStream | None,
) -> Plan:
    """Fits vocabularies and scales on training events.

    Args:
      source: The log.
      statistics: Of each shard, None for an empty one.
      counts: Of the whole log.
      side_tables: "items" and "users", where there are, as `events.read_side_table` gives them.
      first_time: Of all events, Unix seconds.
      times: Where validation and test begin, Unix seconds.
      stream: As in `Plan`.
    """
    config = source.config
    by_item = counts.columns["item"].sort_by("value").combine_chunks()
    items = by_item["value"].combine_chunks()
    item_count = by_item["count"].to_numpy()
    fit_on = (config.min_count, config.num_oov)
    encoders: dict[str, Encoder] = {
        name.removeprefix("feature_"): fit_vocabulary(
            table["value"].combine_chunks(), table["count"].to_numpy(), *fit_on
        )
        for name, table in counts.columns.items()
        if name != "item"
    }
    for name, moments in counts.moments.items():
        name = name.removeprefix("feature_")
        encoders[name] = fit_scale(moments, config.scalings.get(name, ""))
    encoders |= {c.name: LABELS for c in config.feature_columns["label"]}
    encoders["item"] = fit_vocabulary(items, item_count, *fit_on)
    side = {what: table.rows for what, table in side_tables.items()}
    items, item_count, item_columns, fitted = _fit_items(
        config, side.get("items"), items, item_count, encoders["item"]
    )
    encoders |= fitted
    users, user_columns, fitted = _fit_users(config, side.get("users"), counts.users)
    encoders |= fitted
    if numbers := [n for n in config.trends_of if not encoders[n].size]:
        raise UserError(f"trends_of has {numbers[0]}, a number; give categorical features")
    vocabularies = {n: e.size for n, e in encoders.items() if e.size}
    vocabularies |= {} if config.is_ordered else {"hour": 24, "weekday": 7}
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
        time_origin=first_time // SECONDS_PER_DAY * SECONDS_PER_DAY,
        validation_start=times[0],
        test_start=times[1],
        encoders=encoders,
        items=items,
        item_key=id_keys(items),
        item_count=item_count,
        item_columns=item_columns,
        users=users,
        user_columns=user_columns,
        clock=config.clock,
        stream=stream,
        first_user=_before([s.num_users if s else 0 for s in statistics]),
        first_request=_before([s.num_requests if s else 0 for s in statistics]),
    )


def _fit_items(
    config: LogConfig,
    table: pa.Table | None,
    items: pa.Array,
    item_count: np.ndarray,
    encoder: Encoder,
) -> tuple[pa.Array, np.ndarray, dict[str, np.ndarray], dict[str, Encoder]]:
    """Items, counts and columns as in `Plan`, and encoders of the item table's features."""
    if table is not None:
        others = table["id"].combine_chunks()
        others = others.filter(pa.array(positions(others, items) < 0))
        items = pa.concat_arrays([items, others])
        item_count = np.append(item_count, np.zeros(len(others), item_count.dtype))
    # One more item, which no one knows: its id is hashed where it occurs.
    columns = {
        "item": np.append(encode_column(encoder, items), 0).astype(np.int32),
        "log_popularity": rb.log_popularity(np.append(item_count, 0)),
    }
    if table is None:
        return items, item_count, columns, {}
    known = pa.concat_arrays([items, pa.nulls(1, items.type)])
    counts, fit_on = np.append(item_count, 0), (config.min_count, config.num_oov)
    of_table, encoders = _side_features(table, known, counts, fit_on, config.scalings)
    return items, item_count, columns | of_table, encoders


def _fit_users(
    config: LogConfig, table: pa.Table | None, log_users: pa.Table
) -> tuple[pa.Array, dict[str, np.ndarray], dict[str, Encoder]]:
    """Users and columns as in `Plan`, and encoders of the user table's features."""
    if table is None:
        return pa.array([], log_users["value"].type), {}, {}
    users = table["id"].combine_chunks()
    in_training = log_users.filter(pc.greater(log_users["count"], 0))["value"].combine_chunks()
    trained = pc.is_in(users, in_training).to_numpy(zero_copy_only=False)
    # One more user, who is not in the table, has no features.
    known = pa.concat_arrays([users, pa.nulls(1, users.type)])
    counts = np.append(trained, 0).astype(np.int64)
    fit_on = (1, config.num_oov)
    columns, encoders = _side_features(table, known, counts, fit_on, config.scalings)
    return users, columns, encoders


def _side_features(
    table: pa.Table,
    ids: pa.Array,
    train_count: np.ndarray,
    fit_on: tuple[int, int],
    scalings: Mapping[str, str],
) -> tuple[dict[str, np.ndarray], dict[str, Encoder]]:
    """Features of the ids, encoded, and their encoders.

    Vocabularies and scales are fitted on ids that occur in training, each as often as it occurs.
    """
    row = positions(ids, table["id"].combine_chunks())
    columns, encoders = dict[str, np.ndarray](), dict[str, Encoder]()
    for field in table.schema:
        if field.name == "id":
            continue
        padded = pa.concat_arrays([table[field.name].combine_chunks(), pa.nulls(1, field.type)])
        column = padded.take(pa.array(np.where(row < 0, len(padded) - 1, row)))
        name = field.name.removeprefix("feature_")
        if pa.types.is_floating(field.type):
            moments = Moments.of(column.filter(pa.array(train_count > 0)))
            encoders[name] = fit_scale(moments, scalings.get(name, ""))
        else:
            encoded = column.dictionary_encode()
            code = encoded.indices.fill_null(-1).to_numpy()
            total = np.bincount(code[code >= 0], train_count[code >= 0], len(encoded.dictionary))
            encoders[name] = fit_vocabulary(encoded.dictionary, total, *fit_on)
        columns[name] = encode_column(encoders[name], column)
    return columns, encoders


def describe_features(plan: Plan, user_ids: pa.Array) -> Features:
    """What encodes raw values as the records' ones were.

    Args:
      plan: Of the log.
      user_ids: Every user of the log, in the order of the records.
    """
    config = plan.source.config
    others = plan.users.filter(pa.array(positions(plan.users, user_ids) < 0))
    users = pa.concat_arrays([user_ids, others])
    row = positions(users, plan.users)
    sizes = {n: len(plan.items) if n == "item" else plan.encoders[n].size for n in config.trends_of}
    return Features(
        encoders=plan.encoders,
        items=FeatureTable(
            id_array(plan.items),
            {n: column[:-1] for n, column in plan.item_columns.items()},
            {n: column[-1].item() for n, column in plan.item_columns.items()},
        ),
        users=FeatureTable(
            id_array(users),
            {n: column[row] for n, column in plan.user_columns.items()},
            {n: column[-1].item() for n, column in plan.user_columns.items()},
        ),
        clock=plan.clock,
        null_words=config.null_words,
        definitions=_definitions(config.feature_columns, config.key_columns["item"]),
        trends=plan.trends and plan.trends.tail(sizes),
        user_windows=config.user_windows,
        facts={"log": dataclasses.asdict(config)},
    )


def id_array(ids: pa.Array) -> np.ndarray:
    """Ids as int64, or as texts."""
    if pa.types.is_string(ids.type):
        return np.array(ids.to_pylist(), object)
    return ids.to_numpy(zero_copy_only=False).astype(np.int64)


def _definitions(columns: Mapping[str, Sequence[Column]], item: Column) -> dict[str, Any]:
    """Where each feature comes from."""
    found: dict[str, Any] = {
        "log_popularity": {"from": "training events"},
        "hour": {"from": "clock"},
        "weekday": {"from": "clock"},
    }
    tables = {"label": "events", "target": "events", "history": "events", "item": "items",
              "user": "users"}  # fmt: skip
    for level, table in tables.items():
        for column in columns[level]:
            found[column.name] = _definition(column, table)
    return found | {"item": _definition(item, "events")}


def _definition(column: Column, table: str) -> dict[str, str]:
    return {"from": table, "sql" if column.is_sql else "column": column.expression}


def _before(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])[:-1]
