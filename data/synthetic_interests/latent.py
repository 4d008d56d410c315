"""Users whose interests are directions of a latent space, which no count of an id can name.

Every item has a unit vector of many dimensions, drawn at random and hidden. A user's events mix
interests of three time scales, each a unit vector u, and an interest takes item i with probability
proportional to exp(CHOICE * u . v_i):

    lifelong   a few vectors; each moves to a new one at some time of the whole period
    episodes   one vector at a time, for about six weeks
    sessions   one vector at a time, for half an hour

A session has one interest of each scale, so that what is alike is met within minutes.

The label of target i at time t is Bernoulli(sigmoid(logit)), with

    logit(i, t) = BIAS + sum over TERMS of weight * lift(decay)
    lift(decay) = log(P + sum_j w_j k(i, j) / k0) - log(P + sum_j w_j)
    k(i, j) = exp(SHARPNESS * v_i . v_j),     w_j = exp(-(t - t_j) / decay)

over all events j of the history, with k0 the kernel's mean over pairs of items: how much more alike
than by chance the history is to the target, in all or of late. As all dimensions are alike,
vectors of fewer dimensions know less of it, whatever the ids that are counted. The category, a
feature, is which of some random directions an item's vector is nearest to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from stca_jax.data.synthetic_interests.drawing import (
    EPISODE_SHARE,
    LIFELONG_SHARE,
    LogConfig,
    draw_below,
    draw_episodes,
    draw_mixture,
)
from stca_jax.data.synthetic_interests.users import make_users
from stca_jax.input.records import UserRecord
from stca_jax.schema import SECONDS_PER_DAY

TERMS = {math.inf: 8.0, 28.0: 3.0, 1.0: 1.5}  # weight of each decay in days
BIAS = -1.6
_CHOICE, _SHARPNESS = 20.0, 5.0
_PRIOR = 10.0  # P, in events
_NUM_LIFELONG = 6
# Of candidates: items met before, neighbours of items met before; others are any items.
_TARGET_SHARES = 0.05, 0.35
_NUM_NEIGHBOURS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(LogConfig):
    """Size of a dataset.

    Attributes:
      num_items: Size of the catalogue.
      num_categories: Regions of the latent space.
      num_dimensions: Of the latent space.
    """

    num_items: int = 1_024
    num_categories: int = 64
    num_dimensions: int = 64


LATENT_CONFIGS = {
    "latent": LatentConfig(
        num_users=5_000, min_events=64, max_events=1_024, events_per_request=32, counts_events=True
    )
}


@dataclasses.dataclass(frozen=True)
class LatentCatalogue:
    """The items.

    Attributes:
      vectors: Of unit length.
      category: The direction that each is nearest to.
      neighbours: The nearest items of each, but for itself.
      chance: k0, the kernel's mean over pairs of different items.
    """

    vectors: Float32[np.ndarray, "items dims"]
    category: Int[np.ndarray, " items"]
    neighbours: Int[np.ndarray, "items k"]
    chance: float

    def projected(self, num_dimensions: int) -> LatentCatalogue:
        """The same items as known by the first dimensions only, scaled to unit length again."""
        vectors = _unit(self.vectors[:, :num_dimensions])
        return dataclasses.replace(self, vectors=vectors, chance=_chance(vectors))


def make_latent_catalogue(config: LatentConfig) -> LatentCatalogue:
    """Draws the items that all users of a configuration share."""
    rng = np.random.default_rng([config.seed, 0])
    vectors = _unit(rng.normal(size=(config.num_items, config.num_dimensions)))
    directions = rng.normal(size=(config.num_dimensions, config.num_categories))
    category = (vectors @ directions).argmax(-1).astype(np.int32)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    size = min(_NUM_NEIGHBOURS, config.num_items - 1)
    neighbours = np.argpartition(-similarity, size - 1, axis=-1)[:, :size].astype(np.int32)
    return LatentCatalogue(vectors, category, neighbours, _chance(vectors))


def generate_latent_users(config: LatentConfig) -> Iterator[UserRecord]:
    """Yields the users in order, each from a random stream of its own."""
    return make_users(config, _Directions(config, make_latent_catalogue(config)))


def latent_lifts(
    record: UserRecord, catalogue: LatentCatalogue, max_history: int | None = None
) -> Float64[np.ndarray, "t terms"]:
    """The lift of each of `TERMS` for each target, over the window's events.

    Args:
      record: A user; labels are not read.
      catalogue: The one the user was generated from, or a projection of it.
      max_history: Length of the window: the last events before each request; None is all of them.
    """
    events, targets = (
        catalogue.vectors[features["item"]] for features in (record.history, record.target)
    )
    lifts = np.empty((len(targets), len(TERMS)))
    for k, end in enumerate(record.history_end):
        window = slice(0 if max_history is None else max(0, end - max_history), end)
        rows = slice(record.target_offset[k], record.target_offset[k + 1])
        kernel = np.exp(_SHARPNESS * (targets[rows] @ events[window].T)) / catalogue.chance
        age_days = (record.request_time[k] - record.event_time[window]) / SECONDS_PER_DAY
        weight = np.exp(-age_days[:, None] / np.array(list(TERMS)))
        lifts[rows] = np.log(_PRIOR + kernel @ weight) - np.log(_PRIOR + weight.sum(0))
    return lifts


def latent_logit_of(lifts: Float64[np.ndarray, "t terms"]) -> Float64[np.ndarray, " t"]:
    """The true function, from what `latent_lifts` returns."""
    return lifts @ list(TERMS.values()) + BIAS


def _unit(vectors: Float[np.ndarray, "n dims"]) -> Float32[np.ndarray, "n dims"]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _chance(vectors: Float32[np.ndarray, "n dims"]) -> float:
    """The kernel's mean over pairs of different vectors."""
    kernel = np.exp(_SHARPNESS * (vectors @ vectors.T))
    n = len(vectors)
    return float((kernel.sum(dtype=np.float64) - np.trace(kernel)) / (n * max(n - 1, 1)))


@dataclasses.dataclass(frozen=True)
class _Directions:
    """A `World` of interests in directions."""

    config: LatentConfig
    catalogue: LatentCatalogue

    @property
    def category_of_item(self) -> Int[np.ndarray, " items"]:
        return self.catalogue.category

    def logit(self, record: UserRecord) -> Float64[np.ndarray, " t"]:
        return latent_logit_of(latent_lifts(record, self.catalogue))

    def draw_items(
        self, time: Int[np.ndarray, " n"], session: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """Items of a user's events, from interests of three time scales."""
        config, n = self.config, len(time)
        # A session has one interest of each scale, and mixes the scales.
        lifelong = draw_below(_NUM_LIFELONG, session.max(initial=0) + 1, rng)[session]
        moves = rng.random(_NUM_LIFELONG) * config.num_days
        lifelong += _NUM_LIFELONG * (time / SECONDS_PER_DAY > moves[lifelong])
        episode = draw_episodes(time, rng)
        scale = rng.random(n)
        is_lifelong, is_lasting = scale < LIFELONG_SHARE, scale < LIFELONG_SHARE + EPISODE_SHARE
        first_session = 2 * _NUM_LIFELONG + episode[-1] + 1
        others = [2 * _NUM_LIFELONG + episode, first_session + session]
        interest = np.select([is_lifelong, is_lasting], [lifelong, others[0]], others[1])
        used, interest = np.unique(interest, return_inverse=True)
        vectors = _unit(rng.normal(size=(len(used), config.num_dimensions)))
        logit = _CHOICE * (vectors @ self.catalogue.vectors.T)
        cumulative = np.cumsum(np.exp(logit - logit.max(-1, keepdims=True)), -1, dtype=np.float64)
        cumulative /= cumulative[:, -1:]
        # One search in all rows at once: row r lies in [r, r + 1].
        rows = (cumulative + np.arange(len(used))[:, None]).ravel()
        found = np.searchsorted(rows, interest + rng.random(n), side="right")
        item = np.minimum(found - interest * config.num_items, config.num_items - 1)
        return item.astype(np.int32)

    def draw_targets(
        self, history: Int[np.ndarray, " n"], rng: np.random.Generator
    ) -> Int[np.ndarray, " m"]:
        """Distinct candidates: items of the history, neighbours of such items, and any items."""
        config, neighbours = self.config, self.catalogue.neighbours
        size = 2 * config.targets_per_request  # enough for the repeats that fall away
        random = draw_below(config.num_items, size, rng).astype(np.int32)
        past = history[draw_below(len(history), size, rng)] if len(history) else random
        related = neighbours[past, draw_below(neighbours.shape[1], size, rng)]
        item = draw_mixture(past, related, random, _TARGET_SHARES, rng)
        return item[: config.targets_per_request]
