"""From raw values to ids and numbers, by the `features/` of the export: as in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stca_jax.errors import UserError
from stca_jax.input.features import Features
from stca_jax.input.trends import user_trend
from stca_jax.serving.events import MISSING, Events, as_column
from stca_jax.serving.model import ServingModel, check_encoded


def with_missing_texts(model: ServingModel, events: Events) -> Events:
    """The events, columns of texts that are all missing as texts, not as numbers that are."""
    encoders = model.features.encoders if model.features is not None else {}
    missing = {
        name: np.full(len(events), MISSING)
        for name, column in events.columns.items()
        if column.dtype.kind == "f" and np.isnan(column).all()
        if getattr(encoders.get(name), "is_text", False)  # others are of numbers
    }
    return dataclasses.replace(events, columns={**events.columns, **missing})


def encode_events(model: ServingModel, events: Events) -> dict[str, np.ndarray]:
    """History features of raw columns; those of the item table may be left out.

    Raises:
      UserError: a feature is missing, or a value is nothing of its kind; names both.
    """
    return _encode(model, "history", events.columns, len(events))


def encode_targets(
    model: ServingModel, columns: Mapping[str, Any], now: int
) -> dict[str, np.ndarray]:
    """Features of candidates; the item suffices where the item table has the others.

    Trends that are left out count the log's events before `now`, which must be after its end: of
    earlier moments the export does not know all of a window.

    Args:
      model: Whose features.
      columns: Raw values by name.
      now: Unix second of the request.

    Raises:
      UserError: see `encode_events`.
    """
    item = model.info.schema.item
    if item not in columns:
        raise UserError(f"targets lack {item!r}; they have {', '.join(columns) or 'nothing'}")
    size = len(columns[item])
    given = {name: as_column(name, values, size) for name, values in columns.items()}
    trends = _features(model).trends
    names = [n for n in trends.names if n in model.info.levels["target"].names] if trends else []
    known: dict[str, np.ndarray] = {}
    if trends is not None and not given.keys() >= set(names):
        end = int(trends.time[-1]) if len(trends.time) else -1
        if now <= end:
            missing = next(name for name in names if name not in given)
            raise UserError(
                f"targets lack {missing!r}, and time {now} is not after the end of the log, {end}, "
                "from which on the export knows it: give its values, or a later time"
            )
        known = _features(model).trend_features(_raw(given[item]), np.full(size, now))
    return _encode(model, "target", given, size, known)


def encode_request(
    model: ServingModel,
    values: Mapping[str, Any],
    user: str,
    now: int,
    count_since: Callable[[int], int],
) -> dict[str, np.ndarray]:
    """Features of a request; those of the user, the hour and the weekday may be left out.

    Args:
      model: Whose features.
      values: By name.
      user: Own id of the user.
      now: Unix second of the request.
      count_since: How many events the user had from a Unix second on, before the request.

    Raises:
      UserError: see `encode_events`.
    """
    features = _features(model)
    given = {name: as_column(name, [value], 1) for name, value in values.items()}
    known: dict[str, np.ndarray] = {}
    if len(features.users):
        known |= features.user_features([_own_id(user, features.users.is_text)])
    known |= features.clock.encode(np.array([now]))
    for name, seconds in features.user_windows.items():
        if name not in given:
            known[name] = user_trend(np.array([count_since(now - seconds)]))
    return _encode(model, "request", given, 1, known)


def _encode(
    model: ServingModel,
    level: str,
    columns: Mapping[str, np.ndarray],
    size: int,
    known: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    features, item = _features(model), model.info.schema.item
    names = model.info.levels[level].names
    found = dict(known or {})
    if item in columns and len(features.items):
        found |= features.item_features(_raw(columns[item]))
    for name in names:
        # The item table knows an item by its own id, which no vocabulary has.
        if name in columns and not (name == item and name in found):
            found[name] = features.encode(name, _raw(columns[name]))
    return check_encoded(model, level, {n: found[n] for n in names if n in found}, size)


def _raw(column: np.ndarray) -> np.ndarray | list[Any]:
    if column.dtype.kind == "U":
        return [None if text == MISSING else text for text in column.tolist()]
    return column


def _own_id(user: str, is_text: bool) -> str | int | None:
    """The name of a user as the user table has it; one it cannot have is unknown to it."""
    if is_text:
        return user
    try:
        return int(user)
    except ValueError:
        return -1


def _features(model: ServingModel) -> Features:
    assert model.features is not None  # Scorer has seen to it
    return model.features
