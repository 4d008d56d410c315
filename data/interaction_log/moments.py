"""How a numeric column is distributed, counted shard by shard and added up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
from jaxtyping import Float

_SAMPLE = 4_096
_DECILES = 2.563  # deviations between the first and the last decile of a normal distribution
_HEAVY = 1.5


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and squared deviations of values, which are finite.

    Sums of squares would lose the deviations of values that are large beside them; these are merged
    as Chan, Golub and LeVeque (1979) do.

    Attributes:
      count: Values.
      mean: Of them.
      squares: Sum of their squared deviations from the mean.
      least: The smallest; infinity if there is none.
      most: The largest; minus infinity if there is none.
      missing: Entries without a value.
      unreadable: Entries that are no finite number, which events hold as NaN.
      sample: Some of the values, ascending: all of a few.
      weight: How many values each of them stands for.
    """

    count: int
    mean: float
    squares: float
    least: float
    most: float
    missing: int
    unreadable: int
    sample: Float[np.ndarray, " s"]
    weight: Float[np.ndarray, " s"]

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> Moments:
        """Of a column of doubles: NULL is missing, NaN unreadable."""
        present = column.drop_null().to_numpy()
        values = present[np.isfinite(present)]
        mean = float(values.mean()) if len(values) else 0.0
        apart = values - mean  # not 0 in sum, since the mean is rounded
        sample = np.sort(values[:: -(-len(values) // _SAMPLE) or 1])
        return cls(
            count=len(values),
            mean=mean,
            squares=float(np.square(apart).sum() - apart.sum() ** 2 / max(len(values), 1)),
            least=float(values.min(initial=np.inf)),
            most=float(values.max(initial=-np.inf)),
            missing=column.null_count,
            unreadable=len(present) - len(values),
            sample=sample,
            weight=np.full(len(sample), len(values) / max(len(sample), 1)),
        )

    def __add__(self, other: Moments) -> Moments:
        """Of the values of both."""
        count = self.count + other.count
        apart, share = other.mean - self.mean, other.count / max(count, 1)
        sample = np.concatenate([self.sample, other.sample])
        order = np.argsort(sample, kind="stable")
        sample, weight = sample[order], np.concatenate([self.weight, other.weight])[order]
        if len(sample) > 8 * _SAMPLE:
            total = weight.sum()
            wanted = (np.arange(_SAMPLE) + 0.5) * total / _SAMPLE
            sample = sample[np.searchsorted(weight.cumsum(), wanted).clip(max=len(sample) - 1)]
            weight = np.full(_SAMPLE, total / _SAMPLE)
        return Moments(
            count=count,
            mean=self.mean + apart * share,
            squares=self.squares + other.squares + apart**2 * self.count * share,
            least=min(self.least, other.least),
            most=max(self.most, other.most),
            missing=self.missing + other.missing,
            unreadable=self.unreadable + other.unreadable,
            sample=sample,
            weight=weight,
        )

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 of a constant."""
        return float(np.sqrt(self.squares / self.count)) if self.least < self.most else 0.0

    @property
    def is_heavy_tailed(self) -> bool:
        """Whether the deviation is far above that of a normal distribution with these deciles."""
        if self.deviation == 0:
            return False
        return self.deviation > _HEAVY * (self.quantile(0.9) - self.quantile(0.1)) / _DECILES

    def quantile(self, share: float) -> float:
        """The value below which about this share is; exact of a few values."""
        before = self.weight.cumsum()
        place = np.searchsorted(before, share * before[-1])
        return float(self.sample[min(int(place), len(self.sample) - 1)])
