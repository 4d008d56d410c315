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

import numpy as np
from jaxtyping import Float64, Int

from stca_jax.data.synthetic_interests.catalogue import Catalogue, GeneratorConfig, make_catalogue
from stca_jax.data.synthetic_interests.drawing import (
    EPISODE_SHARE,
    LIFELONG_SHARE,
    draw_below,
    draw_episodes,
    draw_mixture,
    draw_zipf,
)
from stca_jax.data.synthetic_interests.users import make_users
from stca_jax.input.records import UserRecord
from stca_jax.schema import SECONDS_PER_DAY


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

_FAVOURITE_SHARE = 0.5  # of events on a user's own ranking of items; others are on everybody's
# Exponents of Zipf's law: how much more often the first choice is taken than the k-th.
_TOPIC_ZIPF, _CATEGORY_ZIPF, _ITEM_ZIPF = 0.8, 1.0, 1.0
# Of candidates: items met before, other items of categories met before; others are of any category.
_TARGET_SHARES = 0.4, 0.2


CONFIGS = {
    "default": GeneratorConfig(
        num_users=640, min_events=512, max_events=10_240, counts_events=True
    ),
    "long": GeneratorConfig(
        num_users=200,
        min_events=4_096,
        max_events=16_384,
        events_per_request=128,
        counts_events=True,
    ),
    "topics": GeneratorConfig(
        num_users=3_000,
        min_events=64,
        max_events=1_024,
        events_per_request=32,
        seed=1,
        counts_events=True,
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


def generate_users(config: GeneratorConfig) -> Iterator[UserRecord]:
    """Yields the users in order, each from a random stream of its own."""
    return make_users(config, _Interests(config, make_catalogue(config)))


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


@dataclasses.dataclass(frozen=True)
class _Interests:
    """A `World` of interests in topics and categories."""

    config: GeneratorConfig
    catalogue: Catalogue

    @property
    def category_of_item(self) -> Int[np.ndarray, " items"]:
        return self.catalogue.category_of_item

    def logit(self, record: UserRecord) -> Float64[np.ndarray, " t"]:
        return true_logit(record, self.catalogue)

    def draw_items(
        self, time: Int[np.ndarray, " n"], session: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """The user's favourites of the categories of the events, and everybody's."""
        category = self._draw_categories(time, session, rng)
        num_categories, num_ranks = self.catalogue.items.shape
        rotation = draw_below(num_ranks, num_categories, rng)
        is_favourite = rng.random(len(category)) < _FAVOURITE_SHARE
        rank = draw_zipf(num_ranks, _ITEM_ZIPF, len(category), rng)
        rank += np.where(is_favourite, rotation[category], 0)
        return self.catalogue.items[category, rank % num_ranks]

    def _draw_categories(
        self, time: Int[np.ndarray, " n"], session: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """Categories of a user's events, from interests of three time scales."""
        num_topics, num_ranks = self.catalogue.categories.shape
        days, n = time / SECONDS_PER_DAY, len(time)
        tastes = np.stack([rng.permutation(num_topics), rng.permutation(num_topics)])
        is_new = rng.random(n) < days / self.config.num_days
        lifelong = tastes[is_new.astype(np.int64), draw_zipf(num_topics, _TOPIC_ZIPF, n, rng)]
        episode = draw_episodes(time, rng)
        episodic = draw_below(num_topics, episode[-1] + 1, rng)[episode]

        scale = rng.random(n)
        topic = np.where(scale < LIFELONG_SHARE, lifelong, episodic)
        # Each user ranks a topic's categories in an order of their own: a rotation of everybody's.
        rotation = draw_below(num_ranks, num_topics, rng)
        rank = rotation[topic] + draw_zipf(num_ranks, _CATEGORY_ZIPF, n, rng)
        category = self.catalogue.categories[topic, rank % num_ranks]
        of_session = draw_below(len(self.catalogue.items), session.max() + 1, rng)[session]
        is_lasting = scale < LIFELONG_SHARE + EPISODE_SHARE
        return np.where(is_lasting, category, of_session).astype(np.int32)

    def draw_targets(
        self, history: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " m"]:
        """Distinct candidates: items of the history, of its categories, and of any category."""
        catalogue = self.catalogue
        num_categories, num_ranks = catalogue.items.shape
        size = 3 * self.config.targets_per_request  # enough for the repeats that fall away
        category = draw_below(num_categories, size, rng)
        rank = draw_zipf(num_ranks, _ITEM_ZIPF, size, rng)
        random = catalogue.items[category, rank]
        past = history[draw_below(len(history), size, rng)] if len(history) else random
        related = catalogue.items[catalogue.category_of_item[past], rank]
        item = draw_mixture(past, related, random, _TARGET_SHARES, rng)
        return item[: self.config.targets_per_request]
