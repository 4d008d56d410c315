"""How many events a request may read: samplers of the history length.

Length-extrapolative training draws a length per request, mostly short and now and then full, keeps
the most recent events (`suffix`), and serves at full length.  A short draw is not masked but cut:
the tokens are never packed, so it costs less.

A sampler maps uniform numbers to lengths.  The numbers come from `uniform`, a hash of
(seed, epoch, request): a request draws the same length in any order, process or thread.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.special import betainc

Window: TypeAlias = Literal["suffix", "random", "prefix"]
Epoch: TypeAlias = Float[np.ndarray, " n"] | float

_MULTIPLE = 8  # drawn lengths are multiples of it, as in the paper


@dataclasses.dataclass(frozen=True)
class LengthSampler(abc.ABC):
    """What the config of a length sampler has; one of one's own is named by its import path."""

    @property
    @abc.abstractmethod
    def longest(self) -> int:
        """The longest length that can be drawn."""

    @abc.abstractmethod
    def lengths(self, uniform: Float[np.ndarray, " n"], epoch: Epoch = 0) -> Int[np.ndarray, " n"]:
        """Lengths at the given quantiles.

        Args:
          uniform: Quantiles in [0, 1).
          epoch: When each request is read, in epochs; may be fractional.
        """


@dataclasses.dataclass(frozen=True)
class FixedLength(LengthSampler):
    """Every request reads up to `length` events.

    Attributes:
      length: Events, at least 1.
    """

    length: int

    def __post_init__(self) -> None:
        """Raises ValueError for a length below 1."""
        if not self.length >= 1:  # nor NaN
            raise ValueError(f"length must be at least 1 event, got {self.length}")

    @property
    def longest(self) -> int:
        """The longest length that can be drawn."""
        return self.length

    def lengths(self, uniform: Float[np.ndarray, " n"], epoch: Epoch = 0) -> Int[np.ndarray, " n"]:
        """`length` for each request."""
        del epoch
        return np.full(len(uniform), self.length, np.int32)


@dataclasses.dataclass(frozen=True)
class UniformLength(LengthSampler):
    """Every multiple of 8 from `minimum` to `maximum` is equally likely.

    Attributes:
      minimum: Shortest length, a positive multiple of 8.
      maximum: Longest length, a multiple of 8.
    """

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        """Raises ValueError unless 8 <= minimum <= maximum, both multiples of 8."""
        _check_bounds(self.minimum, self.maximum)

    @property
    def longest(self) -> int:
        """The longest length that can be drawn."""
        return self.maximum

    def lengths(self, uniform: Float[np.ndarray, " n"], epoch: Epoch = 0) -> Int[np.ndarray, " n"]:
        """Lengths at the given quantiles, in [0, 1)."""
        del epoch
        count = (self.maximum - self.minimum) // _MULTIPLE + 1
        return (self.minimum + _MULTIPLE * (uniform * count).astype(np.int32)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class BetaLength(LengthSampler):
    """The paper's stochastic length: Beta-distributed between two bounds, with a given mean.

    s ~ Beta(alpha, beta), length = minimum + s (maximum - minimum), rounded to a multiple of 8;
    beta = alpha (maximum - average) / (average - minimum) gives the mean.  A small alpha is
    U-shaped: mostly short, now and then full.

    Attributes:
      minimum: Shortest length, a positive multiple of 8.
      maximum: Longest length, a multiple of 8.
      average: Mean length before rounding, strictly between the two.
      alpha: Shape, positive.
      curriculum: Knots (epoch, average) of a piecewise-linear schedule that replaces `average`;
        epochs may be fractional and increase.  Empty: `average` throughout.
    """

    minimum: int
    maximum: int
    average: float
    alpha: float
    curriculum: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for bounds, averages, shapes or knots outside their domain."""
        _check_bounds(self.minimum, self.maximum)
        if not 0 < self.alpha < np.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        for average in (self.average, *(average for _, average in self.curriculum)):
            if not self.minimum < average < self.maximum:
                raise ValueError(
                    f"average length {average} must lie strictly between minimum {self.minimum} "
                    f"and maximum {self.maximum}"
                )
        epochs = [epoch for epoch, _ in self.curriculum]
        if not (np.isfinite(epochs).all() and all(a < b for a, b in itertools.pairwise(epochs))):
            raise ValueError(
                f"the epochs of the curriculum must be finite and increase, got {epochs}"
            )

    @property
    def longest(self) -> int:
        """The longest length that can be drawn."""
        return self.maximum

    def lengths(self, uniform: Float[np.ndarray, " n"], epoch: Epoch = 0) -> Int[np.ndarray, " n"]:
        """Lengths at the given quantiles.

        Args:
          uniform: Quantiles in [0, 1).
          epoch: When each request is read, in epochs; only a curriculum looks at it.
        """
        if not self.curriculum:
            return self._quantiles(uniform, self.average)
        average = np.interp(epoch, *np.transpose(self.curriculum)) + np.zeros(len(uniform))
        # One table serves all averages that round to the same event.
        step = np.clip(np.round(average), self.minimum + 0.5, self.maximum - 0.5)
        lengths = np.empty(len(uniform), np.int32)
        for value in np.unique(step):
            drawn = step == value
            lengths[drawn] = self._quantiles(uniform[drawn], float(value))
        return lengths

    def _quantiles(self, uniform: np.ndarray, average: float) -> Int[np.ndarray, " n"]:
        """Exact quantiles of the rounded length: it has few values, so its CDF is a small table."""
        span = self.maximum - self.minimum
        beta = self.alpha * (self.maximum - average) / (average - self.minimum)
        upper = (np.arange(0, span, _MULTIPLE) + _MULTIPLE / 2) / span
        cdf = betainc(self.alpha, beta, upper)
        value = np.searchsorted(cdf, uniform, side="right")
        return (self.minimum + _MULTIPLE * value).astype(np.int32)


LengthConfig: TypeAlias = FixedLength | UniformLength | BetaLength | LengthSampler


def window_start(
    history_end: Int[np.ndarray, " n"],
    length: Int[np.ndarray, " n"],
    window: Window,
    uniform: Float[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """First event of each request's window; it holds `min(length, history_end)` events.

    Args:
      history_end: Events before each request.
      length: Drawn lengths.
      window: "suffix" keeps the most recent events, "prefix" the oldest, "random" any run.
      uniform: Numbers in [0, 1) that place the random run.
    """
    spare = np.maximum(history_end - length, 0)
    if window == "suffix":
        return spare
    if window == "prefix":
        return np.zeros_like(spare)
    return (uniform * (spare + 1)).astype(spare.dtype)


def _check_bounds(minimum: int, maximum: int) -> None:
    for name, value in (("minimum", minimum), ("maximum", maximum)):
        if not value >= _MULTIPLE or value % _MULTIPLE:
            raise ValueError(
                f"{name} length must be a positive multiple of {_MULTIPLE}, got {value}"
            )
    if minimum > maximum:
        raise ValueError(f"minimum length {minimum} exceeds maximum length {maximum}")
