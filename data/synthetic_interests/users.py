"""What the generators share: the schema, and records from a world's items, targets and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64, Int

from stca_jax.data.request_building import time_split
from stca_jax.data.synthetic_interests.drawing import (
    LogConfig,
    draw_labels,
    draw_requests,
    draw_sessions,
)
from stca_jax.input.records import UserRecord
from stca_jax.input.trends import user_trend
from stca_jax.schema import Schema


class CatalogueConfig(Protocol):
    """What a schema needs of a configuration."""

    @property
    def user_windows(self) -> dict[str, int]:
        """Features of requests."""

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""

    @property
    def num_categories(self) -> int:
        """Each item has one."""


class World(Protocol):
    """How users of one configuration behave."""

    @property
    def category_of_item(self) -> Int[np.ndarray, " items"]:
        """A feature of every item."""

    def draw_items(
        self, time: Int[np.ndarray, " n"], session: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """Items of a user's events, whose times and sessions are given."""

    def draw_targets(
        self, history: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " m"]:
        """Distinct candidates of a request, after so many items of the user."""

    def logit(self, record: UserRecord) -> Float64[np.ndarray, " t"]:
        """What the labels of a record are drawn from."""


def feature_names(config: CatalogueConfig) -> dict[str, Any]:
    """Item and category of events and targets; all else stays hidden."""
    return {
        "history": ("item", "category"),
        "target": ("item", "category"),
        "request": tuple(config.user_windows),
        "tasks": ("click",),
    }


def make_schema(config: CatalogueConfig) -> Schema:
    """`feature_names`, and how many items and categories there are."""
    vocabularies = {"item": config.num_items, "category": config.num_categories}
    return Schema(**feature_names(config), vocabularies=vocabularies)


def make_users(config: LogConfig, world: World) -> Iterator[UserRecord]:
    """Yields the users in order, each from a random stream of its own."""
    num_requests = 0
    for user_id in range(config.num_users):
        record = _make_user(config, world, user_id, num_requests)
        num_requests += len(record.request_id)
        yield record


def _make_user(config: LogConfig, world: World, user_id: int, first_request_id: int) -> UserRecord:
    rng = np.random.default_rng([config.seed, 1, user_id])
    time, session = draw_sessions(config, rng)
    item = world.draw_items(time, session, rng)
    request_time, history_end = draw_requests(config, time, rng)
    targets = [world.draw_targets(item[:end], rng) for end in history_end]
    target = np.concatenate(targets)
    record = UserRecord(
        user_id=user_id,
        event_time=time,
        history={"item": item, "category": world.category_of_item[item]},
        request_id=np.arange(first_request_id, first_request_id + len(targets), dtype=np.int32),
        request_time=request_time,
        request_split=time_split(request_time, config.validation_start, config.test_start),
        history_end=history_end.astype(np.int32),
        target_offset=np.cumsum([0, *map(len, targets)], dtype=np.int32),
        request={name: user_trend(history_end) for name in config.user_windows},
        target={"item": target, "category": world.category_of_item[target]},
        label=np.zeros((len(target), 1), np.float32),
    )
    return dataclasses.replace(record, label=draw_labels(world.logit(record), rng))
