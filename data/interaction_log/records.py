"""From a shard's requests to users' records, with features encoded as planned."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stca_jax.data import request_building as rb
from stca_jax.data.interaction_log.encoders import encode_column, positions
from stca_jax.data.interaction_log.plan import LABELS, Plan
from stca_jax.data.interaction_log.requests import Shard
from stca_jax.input.arrays import offsets
from stca_jax.input.trends import user_trend


def build_user_logs(plan: Plan, shard: Shard, index: int) -> rb.UserLogs:
    """Records of all users of a shard.

    Args:
      plan: Of the log.
      shard: Its events.
      index: Which shard it is.
    """
    requests = shard.requests
    in_history, event_time, _ = shard.history
    events = shard.events.take(pa.array(in_history))
    event_item = positions(events["item"], plan.items)
    targets, label = find_targets(plan, shard)
    num_users, num_requests = len(shard.user_ids), len(requests.time)
    columns = plan.source.config.feature_columns
    item_features = [c.name for c in columns["item"]]
    history = {n: plan.item_columns[n][event_item] for n in ("item", *item_features)}
    for column in (*columns["target"], *columns["history"]):
        values = events[f"feature_{column.name}"]
        history[column.name] = encode_column(plan.encoders[column.name], values)
    history |= _label_features(shard)
    user_row = positions(shard.user_ids, plan.users)[requests.user]
    target = {n: plan.item_columns[n][targets.item] for n in ("item", *item_features)}
    target["log_popularity"] = plan.item_columns["log_popularity"][targets.item]
    shown = shard.events.take(pa.array(requests.target_row))
    for column in columns["target"]:
        values = shown[f"feature_{column.name}"]
        target[column.name] = encode_column(plan.encoders[column.name], values)
    if plan.trends is not None:
        values = plan.trend_values(targets.item)
        target |= plan.trends.encode(values, requests.time[targets.request])
    return rb.UserLogs(
        user_id=plan.first_user[index] + np.arange(num_users),
        event_offset=offsets(shard.user[in_history], num_users),
        event_time=event_time - plan.time_origin,
        history=history,
        request_offset=offsets(requests.user, num_users),
        request_id=plan.first_request[index] + np.arange(num_requests),
        request_time=requests.time - plan.time_origin,
        request_split=rb.time_split(requests.time, plan.validation_start, plan.test_start),
        history_end=requests.history_end,
        request=({} if shard.config.is_ordered else plan.clock.encode(requests.time))
        | {n: column[user_row] for n, column in plan.user_columns.items()}
        | _user_trends(shard),
        target_offset=offsets(targets.request, num_requests),
        target=target,
        label=label,
    )


def _user_trends(shard: Shard) -> dict[str, np.ndarray]:
    """Half the log of 1 + events of the history in windows before each request."""
    requests, (row, time, _) = shard.requests, shard.history
    found = {}
    for name, seconds in shard.config.user_windows.items():
        start = requests.time - seconds
        before = rb.history_end(shard.user[row], time, requests.user, start)
        found[name] = user_trend(requests.history_end - before)
    return found


def find_targets(plan: Plan, shard: Shard) -> tuple[rb.Targets, np.ndarray]:
    """Targets by request, and their labels, [t, tasks]; NaN where one is missing."""
    requests, config = shard.requests, plan.source.config
    item = positions(shard.events["item"], plan.items)[requests.target_row]
    if config.labels:
        label = shard.labels[requests.target_row].astype(np.float32)
        label[label < 0] = np.nan
        return rb.Targets(requests.of_target, item, label[:, 0]), label
    targets = rb.next_item_targets(
        requests.of_target,
        item,
        request_key=requests.key,
        item_key=plan.item_key,
        sampler=plan.sampler(requests.time),
        max_positives=config.max_positives,
        negatives_per_positive=config.negatives_per_positive,
        seed=config.seed,
    )
    return targets, targets.label[:, None]


def _label_features(shard: Shard) -> dict[str, np.ndarray]:
    """What came of earlier events: 0, 1, or 2 where it is unknown."""
    columns = shard.config.feature_columns["label"]
    if not columns:
        return {}
    row, _, is_known = shard.history
    label = shard.labels[row]
    label = np.where((label < 0) | ~is_known[:, None], LABELS.missing_id, label)
    return {c.name: label[:, k] for k, c in enumerate(columns)}
