"""What the generators share: sizes and times of logs, and random draws."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32, Float64, Int

from stca_jax.schema import SECONDS_PER_DAY

WARM_UP = 0.1  # of a user's events come before the first request
# Of events, by what they follow: a lasting interest, one of some weeks; sessions have the rest.
LIFELONG_SHARE, EPISODE_SHARE = 0.7, 0.2
_EPISODE_DAYS = 45
_SESSION_SECONDS = 1_800
_EVENTS_PER_SESSION = 10
_VALIDATION_START, _TEST_START = 0.7, 0.8  # of the period


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Sizes of users' logs.

    Attributes:
      num_users: How many records.
      min_events: Shortest log. Lengths n follow Zipf's law, a density in 1 / n.
      max_events: Longest log.
      events_per_request: A log of n events has n / events_per_request requests.
      targets_per_request: Distinct candidates of each; fewer if the catalogue is tiny.
      num_days: Period that all logs span.
      seed: Of everything. Equal seeds and catalogue sizes give equal catalogues.
      counts_events: Requests have the number of the user's earlier events, as a feature.
    """

    num_users: int
    min_events: int
    max_events: int
    events_per_request: int = 64
    targets_per_request: int = 16
    num_days: int = 720
    seed: int = 0
    counts_events: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below 1 or no possible length."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if type(value) is not bool and value < least:
                raise ValueError(f"{field.name} is {value}; it must be at least {least}")
        if self.min_events > self.max_events:
            raise ValueError(f"min_events {self.min_events} is above max_events {self.max_events}")

    @property
    def num_seconds(self) -> int:
        """The period that all logs span."""
        return self.num_days * SECONDS_PER_DAY

    @property
    def user_windows(self) -> dict[str, int]:
        """Features of requests that count the user's earlier events: seconds by name."""
        name = f"user_events_{self.num_days}d"
        return {name: self.num_seconds} if self.counts_events else {}

    @property
    def validation_start(self) -> int:
        """Time of the first validation requests."""
        return int(_VALIDATION_START * self.num_seconds)

    @property
    def test_start(self) -> int:
        """Time of the first test requests."""
        return int(_TEST_START * self.num_seconds)


def draw_requests(
    config: LogConfig, time: Int[np.ndarray, " n"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " q"]]:
    """Times of a user's requests, in order, and the number of events before each."""
    num_requests = -(-len(time) // config.events_per_request)
    position = len(time) * (WARM_UP + (1 - WARM_UP) * rng.random(num_requests))
    request_time = time[np.sort(position.astype(np.int64))]
    # The events at the request's own time are not history.
    return request_time, np.searchsorted(time, request_time)


def draw_sessions(
    config: LogConfig, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Times of a user's events, in order, and the session each belongs to."""
    ratio = config.max_events / config.min_events
    num_events = round(config.min_events * ratio ** rng.random())
    num_sessions = -(-num_events // _EVENTS_PER_SESSION)
    start = draw_below(config.num_seconds - _SESSION_SECONDS, num_sessions, rng)
    session = draw_below(num_sessions, num_events, rng)
    time = start[session] + draw_below(_SESSION_SECONDS, num_events, rng)
    order = np.argsort(time, kind="stable")
    return time[order].astype(np.int32), session[order]


def draw_episodes(time: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Which episode of some weeks each event falls into, from 0 on."""
    return (time / SECONDS_PER_DAY / _EPISODE_DAYS + rng.random()).astype(np.int64)


def draw_mixture(
    past: Int[np.ndarray, " n"],
    related: Int[np.ndarray, " n"],
    random: Int[np.ndarray, " n"],
    shares: tuple[float, float],
    rng: np.random.Generator,
) -> Int[np.ndarray, " m"]:
    """Distinct candidates in random order, of three origins.

    Args:
      past: Items of the history.
      related: Items that have to do with those.
      random: Any items.
      shares: Of past and of related ones; the others are random.
      rng: Draws each candidate's origin.
    """
    origin = rng.random(len(past))
    is_past, is_related = origin < shares[0], origin < sum(shares)
    item = np.select([is_past, is_related], [past, related], random)
    return item[np.sort(np.unique(item, return_index=True)[1])]


def draw_labels(
    logit: Float64[np.ndarray, " t"], rng: np.random.Generator
) -> Float32[np.ndarray, "t 1"]:
    """Labels [t, 1] that are 1 with probability sigmoid(logit)."""
    probability = 1 / (1 + np.exp(-logit))
    return (rng.random(len(logit)) < probability).astype(np.float32)[:, None]


def draw_below(bound: int, size: int, rng: np.random.Generator) -> Int[np.ndarray, " size"]:
    """Uniform integers in [0, bound)."""
    return (rng.random(size) * bound).astype(np.int64)


def draw_zipf(
    num: int, exponent: float, size: int, rng: np.random.Generator
) -> Int[np.ndarray, " size"]:
    """Ranks k in [0, num), with probability proportional to 1 / (k + 1)^exponent."""
    cumulative = np.cumsum(np.arange(1, num + 1) ** -exponent)
    return np.searchsorted(cumulative[:-1], rng.random(size) * cumulative[-1], side="right")
