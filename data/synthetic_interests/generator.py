"""Users with drifting interests, and labels drawn from a known function of the whole history.

The catalogue is a tree that is the same for every user; its ids are shuffled:

    topic (hidden)  >  category (feature)  >  item (feature)

A user's events mix interests of three time scales:

    lifelong   a taste over all topics, which moves from an old to a new one over the whole period
    episodes   one topic at a time, for about six weeks
    sessions   one category at a time, for half an hour

The label of target i at time t is Bernoulli(sigmoid(logit)), with

    logit(i, t) = BIAS + sum over TERMS of weight * lift(field, decay)
    lift(field, decay) = log(1 + sum_j w_j [field of j = field of i]) - log(1 + sum_j w_j / V)
    w_j = exp(-(t - t_j) / decay),     V = number of ids of the field

over all events j of the history: how much more often than by chance the target's item, category or
topic occurs, in all or of late.  Restricted to a window, the truth is the same formula over the
window's events (`true_logit`), so every AUC has a reference at every history length.  Below the
whole history it is a reference for ranking, neither calibrated nor a bound: all sums shrink with
the window.  Weights refitted on `true_lifts` give likelihoods too, and all but the same ranking.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from stca_jax.data import request_building as rb
from stca_jax.data.synthetic_interests.catalogue import Catalogue, GeneratorConfig, make_catalogue
from stca_jax.data.synthetic_interests.drawing import (
    SECONDS_PER_DAY,
    draw_below,
    draw_labels,
    draw_requests,
    draw_sessions,
    draw_zipf,
)
from stca_jax.input.records import UserRecord
from stca_jax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the true logit.

    Attributes:
      field: "item", "category" or "topic".
      decay_days: Time constant of the events' weights; infinite counts the whole history alike.
      weight: Of the lift, in the logit.
    """

    field: str
    decay_days: float
    weight: float


TERMS = (
    Term("item", math.inf, 1.6),
    Term("category", math.inf, 0.2),
    Term("category", 28.0, 0.3),
    Term("topic", math.inf, 1.6),
    Term("topic", 1.0, 0.4),
)
BIAS = -2.0

FEATURES: dict[str, Any] = {
    "history": ("item", "category"),
    "target": ("item", "category"),
    "request": (),
    "tasks": ("click",),
}

_LIFELONG_SHARE, _EPISODE_SHARE = 0.7, 0.2  # of events; sessions have the rest
_EPISODE_DAYS = 45
_FAVOURITE_SHARE = 0.5  # of events on a user's own ranking of items; others are on everybody's
# Exponents of Zipf's law: how much more often the first choice is taken than the k-th.
_TOPIC_ZIPF, _CATEGORY_ZIPF, _ITEM_ZIPF = 0.8, 1.0, 1.0
# Of candidates: items met before, other items of categories met before; others are of any category.
_PAST_SHARE, _RELATED_SHARE = 0.4, 0.2


CONFIGS = {
    "default": GeneratorConfig(num_users=640, min_events=512, max_events=10_240),
    "long": GeneratorConfig(
        num_users=200, min_events=4_096, max_events=16_384, events_per_request=128
    ),
    "topics": GeneratorConfig(
        num_users=3_000, min_events=64, max_events=1_024, events_per_request=32, seed=1
    ),
    "tiny": GeneratorConfig(
        num_users=96,
        min_events=64,
        max_events=512,
        num_topics=8,
        categories_per_topic=4,
        items_per_category=10,
        events_per_request=32,
    ),
}


def make_schema(config: GeneratorConfig) -> Schema:
    """Item and category of events and targets; the topic stays hidden."""
    num_categories = config.num_topics * config.categories_per_topic
    vocabularies = {
        "item": num_categories * config.items_per_category,
        "category": num_categories,
    }
    return Schema(**FEATURES, vocabularies=vocabularies)


def generate_users(config: GeneratorConfig) -> Iterator[UserRecord]:
    """Yields the users in order, each from a random stream of its own."""
    catalogue = make_catalogue(config)
    num_requests = 0
    for user_id in range(config.num_users):
        record = _generate_user(config, catalogue, user_id, num_requests)
        num_requests += len(record.request_id)
        yield record


def true_lifts(
    record: UserRecord, catalogue: Catalogue, max_history: int | None = None
) -> Float64[np.ndarray, "t terms"]:
    """The lift of each of `TERMS` for each target, over the window's events.

    Args:
      record: A user; labels are not read.
      catalogue: The one the user was generated from.
      max_history: Length of the window: the last events before each request; None is all of them.

    Raises:
      ValueError: `max_history` is negative, or the catalogue is another.
    """
    if max_history is not None and max_history < 0:
        raise ValueError(f"max_history is {max_history}; it must be at least 0, or None for all")
    events, targets = catalogue.fields_of(record.history), catalogue.fields_of(record.target)
    lifts = np.empty((len(record.target["item"]), len(TERMS)))
    for k, end in enumerate(record.history_end):
        window = slice(0 if max_history is None else max(0, end - max_history), end)
        rows = slice(record.target_offset[k], record.target_offset[k + 1])
        age_days = (record.request_time[k] - record.event_time[window]) / SECONDS_PER_DAY
        weight = {d: np.exp(-age_days / d) for d in {term.decay_days for term in TERMS}}
        for column, term in enumerate(TERMS):
            w, size = weight[term.decay_days], catalogue.num_ids(term.field)
            count = np.bincount(events[term.field][window], w, minlength=size)
            matches = count[targets[term.field][rows]]
            lifts[rows, column] = np.log1p(matches) - np.log1p(w.sum() / size)
    return lifts


def true_logit(
    record: UserRecord, catalogue: Catalogue, max_history: int | None = None
) -> Float64[np.ndarray, " t"]:
    """The true function of each target, over the window's events.

    Arguments and errors are those of `true_lifts`.
    """
    return logit_of(true_lifts(record, catalogue, max_history))


def logit_of(lifts: Float64[np.ndarray, "t terms"]) -> Float64[np.ndarray, " t"]:
    """The true function, from what `true_lifts` returns."""
    return lifts @ [term.weight for term in TERMS] + BIAS


def _generate_user(
    config: GeneratorConfig, catalogue: Catalogue, user_id: int, first_request_id: int
) -> UserRecord:
    rng = np.random.default_rng([config.seed, 1, user_id])
    time, session = draw_sessions(config, rng)
    category = _draw_categories(config, catalogue, time, session, rng)
    item = _draw_items(catalogue, category, rng)

    request_time, history_end = draw_requests(config, time, rng)
    num_requests = len(request_time)
    targets = [_draw_targets(config, catalogue, item[:end], rng) for end in history_end]
    target = np.concatenate(targets)

    record = UserRecord(
        user_id=user_id,
        event_time=time,
        history={"item": item, "category": category},
        request_id=np.arange(first_request_id, first_request_id + num_requests, dtype=np.int32),
        request_time=request_time,
        request_split=rb.time_split(request_time, config.validation_start, config.test_start),
        history_end=history_end.astype(np.int32),
        target_offset=np.cumsum([0, *map(len, targets)], dtype=np.int32),
        request={},
        target={"item": target, "category": catalogue.category_of_item[target]},
        label=np.zeros((len(target), 1), np.float32),
    )
    return dataclasses.replace(record, label=draw_labels(true_logit(record, catalogue), rng))


def _draw_categories(
    config: GeneratorConfig,
    catalogue: Catalogue,
    time: Int[np.ndarray, " n"],
    session: Int[np.ndarray, " n"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " n"]:
    """Categories of a user's events, from interests of three time scales."""
    num_topics, num_ranks = catalogue.categories.shape
    days, n = time / SECONDS_PER_DAY, len(time)
    tastes = np.stack([rng.permutation(num_topics), rng.permutation(num_topics)])
    is_new = rng.random(n) < days / config.num_days
    lifelong = tastes[is_new.astype(np.int64), draw_zipf(num_topics, _TOPIC_ZIPF, n, rng)]
    episode = (days / _EPISODE_DAYS + rng.random()).astype(np.int64)
    episodic = draw_below(num_topics, episode[-1] + 1, rng)[episode]

    scale = rng.random(n)
    topic = np.where(scale < _LIFELONG_SHARE, lifelong, episodic)
    # Each user ranks a topic's categories in an order of their own: a rotation of everybody's.
    rotation = draw_below(num_ranks, num_topics, rng)
    rank = rotation[topic] + draw_zipf(num_ranks, _CATEGORY_ZIPF, n, rng)
    category = catalogue.categories[topic, rank % num_ranks]
    of_session = draw_below(len(catalogue.items), session.max() + 1, rng)[session]
    is_lasting = scale < _LIFELONG_SHARE + _EPISODE_SHARE
    return np.where(is_lasting, category, of_session).astype(np.int32)


def _draw_items(
    catalogue: Catalogue, category: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Items of a user's events: the user's favourites of the category, and everybody's."""
    num_categories, num_ranks = catalogue.items.shape
    rotation = draw_below(num_ranks, num_categories, rng)
    is_favourite = rng.random(len(category)) < _FAVOURITE_SHARE
    rank = draw_zipf(num_ranks, _ITEM_ZIPF, len(category), rng)
    rank += np.where(is_favourite, rotation[category], 0)
    return catalogue.items[category, rank % num_ranks]


def _draw_targets(
    config: GeneratorConfig,
    catalogue: Catalogue,
    history: Int[np.ndarray, " n"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " m"]:
    """Distinct candidates: items of the history, of its categories, and of any category."""
    num_categories, num_ranks = catalogue.items.shape
    size = 3 * config.targets_per_request  # enough for the repeats that fall away
    category = draw_below(num_categories, size, rng)
    rank = draw_zipf(num_ranks, _ITEM_ZIPF, size, rng)
    random = catalogue.items[category, rank]
    past = history[draw_below(len(history), size, rng)] if len(history) else random
    related = catalogue.items[catalogue.category_of_item[past], rank]
    origin = rng.random(size)
    is_past, is_related = origin < _PAST_SHARE, origin < _PAST_SHARE + _RELATED_SHARE
    item = np.select([is_past, is_related], [past, related], random)
    first = np.unique(item, return_index=True)[1]
    return item[np.sort(first)[: config.targets_per_request]]
