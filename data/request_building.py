"""From sorted logs to requests and targets: the NumPy code that every dataset builder shares.

    log          user    7  7  7  7  7  7 | 9  9  9        sorted by (user, time)
                 time    1  1  4  4  4  8 | 2  2  5
                 item    a  b  a  c  d  a | b  e  a
    requests     ├─────┤├────────┤├──┤    ├─────┤├──┤      runs of equal (user, time)
    history_end     0       2      5         0     2       events of the user strictly before

Nothing here draws from a sequential random generator.  Every random choice is a hash of a seed and
of what is chosen (`counter_hash`), so that records do not depend on the order in which users are
processed, or on how they are spread over files and processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int, UInt64

from stca_jax.input.arrays import ragged_arange, rank_in_run
from stca_jax.input.hashing import counter_hash
from stca_jax.input.records import UserRecord

_POSITIVE, _NEGATIVE, _ORDER = 1, 2, 3  # separate streams of one seed


def history_end(
    event_user: Int[np.ndarray, " n"],
    event_time: Int[np.ndarray, " n"],
    request_user: Int[np.ndarray, " q"],
    request_time: Int[np.ndarray, " q"],
) -> Int[np.ndarray, " q"]:
    """How many events each request's user has strictly before the request.

    Events that share the request's timestamp are not its history.

    Args:
      event_user: Ascending.
      event_time: Ascending within each user.
      request_user: In any order.
      request_time: Same unit as `event_time`.
    """
    first = np.searchsorted(event_user, request_user, side="left")
    if not len(event_time):
        return first
    # One search over (user, time) pairs: ranks of the times keep the pairs within 64 bits.
    times = np.unique(event_time)
    width = np.int64(len(times) + 1)
    events = event_user.astype(np.int64) * width + np.searchsorted(times, event_time)
    requests = np.asarray(request_user, np.int64) * width + np.searchsorted(times, request_time)
    return np.searchsorted(events, requests, side="left") - first


def time_split(
    time: Int[np.ndarray, " n"], validation_start: int, test_start: int
) -> Int[np.ndarray, " n"]:
    """Index into `records.SPLITS`: 0 before `validation_start`, 2 from `test_start` on."""
    return np.searchsorted([validation_start, test_start], time, side="right").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Targets:
    """Candidates of requests.

    Attributes:
      request: Index of the target's request, ascending.
      item: The candidate.
      label: 1 for a positive, 0 for a sampled negative.
    """

    request: Int[np.ndarray, " t"]
    item: Int[np.ndarray, " t"]
    label: Float[np.ndarray, " t"]


class ItemSampler(Protocol):
    """Where negatives come from."""

    @property
    def num_items(self) -> int:
        """How many items there are."""

    def draw(
        self, request: Int[np.ndarray, " n"], hashed: UInt64[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """An item for each request and uniform number; -1 where the request can have none."""


def next_item_targets(
    request: Int[np.ndarray, " n"],
    item: Int[np.ndarray, " n"],
    *,
    request_key: UInt64[np.ndarray, " q"],
    item_key: Int[np.ndarray, " items"],
    sampler: ItemSampler,
    max_positives: int,
    negatives_per_positive: int,
    seed: int,
) -> Targets:
    """Positives are the distinct items of a request; negatives are drawn by a sampler.

    A negative is never an item of its own request (one cut by `max_positives` neither) and never
    repeats within a request.  A request gets fewer negatives
    than wanted when its draws, four for each one wanted and 16 more, do not suffice.

    Args:
      request: The request that each event belongs to.
      item: The event's item.
      request_key: Identifies each request, whatever else is in the data.
      item_key: Identifies each item, whatever else is in the data.
      sampler: Where negatives come from.
      max_positives: Requests with more distinct items keep a random subset.
      negatives_per_positive: How many negatives are wanted for each positive kept.
      seed: Of all choices.

    Raises:
      ValueError: a number is below its minimum.
    """
    if max_positives < 1 or negatives_per_positive < 0:
        raise ValueError(
            f"max_positives={max_positives} must be at least 1 and "
            f"negatives_per_positive={negatives_per_positive} at least 0"
        )
    num_items = sampler.num_items
    bought = np.unique(request.astype(np.int64) * num_items + item)
    owner, candidate = np.divmod(bought, num_items)
    order = np.lexsort(
        (counter_hash(seed, _POSITIVE, request_key[owner], item_key[candidate]), owner)
    )
    positive = bought[order][rank_in_run(owner[order]) < max_positives]
    wanted = negatives_per_positive * np.bincount(positive // num_items, minlength=len(request_key))
    negative = _sample_negatives(bought, wanted, request_key, sampler, seed)
    return arrange_targets(
        positive, negative, request_key=request_key, item_key=item_key, seed=seed
    )


def arrange_targets(
    positive: Int[np.ndarray, " p"],
    negative: Int[np.ndarray, " s"],
    *,
    request_key: UInt64[np.ndarray, " q"],
    item_key: Int[np.ndarray, " items"],
    seed: int,
) -> Targets:
    """Sorts targets by request, and within a request in an order independent of labels.

    Args:
      positive: Pairs, written request * items + item.
      negative: Likewise; disjoint from `positive`.
      request_key: Identifies each request.
      item_key: Identifies each item.
      seed: Of the order.
    """
    owner, candidate = np.divmod(np.concatenate([positive, negative]), len(item_key))
    label = np.repeat(np.array([1, 0], np.float32), [len(positive), len(negative)])
    order = np.lexsort((counter_hash(seed, _ORDER, request_key[owner], item_key[candidate]), owner))
    return Targets(owner[order], candidate[order], label[order])


def _sample_negatives(
    bought: np.ndarray,
    wanted: np.ndarray,
    request_key: np.ndarray,
    sampler: ItemSampler,
    seed: int,
) -> np.ndarray:
    """Up to `wanted[k]` distinct (request, item) pairs of request k that are not in `bought`."""
    num_items = sampler.num_items

    def draw(request: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """What so many draws give each request, the first ones it can use."""
        owner, count = np.repeat(request, draws), ragged_arange(draws)
        hashed = counter_hash(seed, _NEGATIVE, request_key[owner], count)
        item = sampler.draw(owner, hashed)
        pair = (owner * num_items + item)[item >= 0]
        pair = pair[np.sort(np.unique(pair, return_index=True)[1])]
        position = np.minimum(np.searchsorted(bought, pair), len(bought) - 1)
        pair = pair[bought[position] != pair]
        owner = pair // num_items
        return pair[rank_in_run(owner) < wanted[owner]]

    # Few draws do for most requests; the others start again with all of theirs.
    request = np.flatnonzero(wanted)
    few = draw(request, wanted[request] + 2)
    found = np.bincount(few // num_items, minlength=len(wanted))
    short = np.flatnonzero(found < wanted)
    rest = draw(short, 4 * wanted[short] + 16)
    enough = few[found[few // num_items] >= wanted[few // num_items]]
    return np.concatenate([enough, rest])


@dataclasses.dataclass(frozen=True)
class UserLogs:
    """Logs, requests and targets of many users, flat; iterating yields one `UserRecord` a user.

    Attributes:
      user_id: One number per user.
      event_offset: Events of user u are `[event_offset[u], event_offset[u + 1])`; likewise below.
      event_time: Seconds since the dataset's origin, ascending within a user.
      history: Event features by name.
      request_offset: Requests of user u.
      request_id: The requests' indices in the dataset.
      request_time: Ascending within a user.
      request_split: Index into `records.SPLITS`.
      history_end: Events of the user strictly before the request.
      request: Request features by name.
      target_offset: Targets of request k, counted over all users.
      target: Target features by name.
      label: 0 or 1, or NaN where it is missing.
    """

    user_id: Int[np.ndarray, " users"]
    event_offset: Int[np.ndarray, " users+1"]
    event_time: Int[np.ndarray, " n"]
    history: Mapping[str, np.ndarray]
    request_offset: Int[np.ndarray, " users+1"]
    request_id: Int[np.ndarray, " q"]
    request_time: Int[np.ndarray, " q"]
    request_split: Int[np.ndarray, " q"]
    history_end: Int[np.ndarray, " q"]
    request: Mapping[str, np.ndarray]
    target_offset: Int[np.ndarray, " q+1"]
    target: Mapping[str, np.ndarray]
    label: Float[np.ndarray, "t tasks"]

    def __len__(self) -> int:
        """The number of users."""
        return len(self.user_id)

    def __iter__(self) -> Iterator[UserRecord]:
        """Records of the users, in order; their columns are views."""
        return (self.record(u) for u in range(len(self)))

    def record(self, u: int) -> UserRecord:
        """The record of the u-th user."""
        events = slice(*self.event_offset[u : u + 2])
        requests = slice(*self.request_offset[u : u + 2])
        offset = self.target_offset[requests.start : requests.stop + 1]
        targets = slice(offset[0], offset[-1])
        return UserRecord(
            user_id=int(self.user_id[u]),
            event_time=self.event_time[events],
            history={n: v[events] for n, v in self.history.items()},
            request_id=self.request_id[requests],
            request_time=self.request_time[requests],
            request_split=self.request_split[requests],
            history_end=self.history_end[requests],
            target_offset=offset - offset[0],
            request={n: v[requests] for n, v in self.request.items()},
            target={n: v[targets] for n, v in self.target.items()},
            label=self.label[targets],
        )


def log_popularity(train_count: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """log(1 + count) / 4 - 1: float32, about -1 … 2 for items seen 0 … 100,000 times."""
    return (np.log1p(train_count) / 4 - 1).astype(np.float32)
