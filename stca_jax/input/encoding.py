"""From values as a log has them to the ids and numbers that a model reads; NumPy only.

Preparing a dataset and serving a model use these classes alike, so that a value means the same in
both: one that no training event had, too.  `stca_jax.input.features` writes them to files.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import zlib
import zoneinfo
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from stca_jax.errors import UserError
from stca_jax.input.hashing import counter_hash
from stca_jax.schema import SECONDS_PER_DAY

LARGEST = float(np.finfo(np.float32).max)
"""Larger numbers are none: they stand for something else, and records hold float32."""

_VOCABULARY = 4  # a stream of hashes of its own
_FARTHEST = 1e6  # deviations, beyond which float32 would not hold the squares of many
_HOUR = 3_600
_THURSDAY = 3  # of 1970-01-01, when Monday is 0


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of one categorical feature: `[0, len(known))` by value, then out-of-vocabulary rows.

    Attributes:
      known: The values that have an id of their own, ascending; integers or strings.
      num_oov: Rows that all other values are hashed into; 0 takes them for missing ones.
      missing: The value that a missing one is taken for; None gives it the first
        out-of-vocabulary row.
    """

    kind: ClassVar[str] = "vocabulary"
    known: np.ndarray
    num_oov: int
    missing: str | int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError: other values have no row and missing ones no known value."""
        if self.num_oov < 1 and self.missing not in self.known.tolist():
            raise ValueError(f"num_oov is {self.num_oov}, and missing={self.missing!r} is unknown")

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        counts: np.ndarray | None = None,
        *,
        min_count: int = 1,
        num_oov: int = 1,
        missing: str | int | None = None,
    ) -> Vocabulary:
        """Keeps the values that training events have often enough.

        Args:
          values: Integers or strings, repeated or not.
          counts: How many training events each entry of `values` stands for; by default 1.
          min_count: Training events that earn a value an id of its own, at least 1.
          num_oov: Rows for all other values, at least 1, since later data has new values.
          missing: As the attribute.

        Raises:
          ValueError: `num_oov` or `min_count` is below 1.
        """
        if num_oov < 1 or min_count < 1:
            raise ValueError(f"num_oov={num_oov} and min_count={min_count} must be at least 1")
        distinct, inverse = np.unique(np.asarray(values), return_inverse=True)
        total = np.bincount(inverse, weights=counts, minlength=len(distinct))
        return cls(distinct[total >= min_count], num_oov, missing)

    @property
    def size(self) -> int:
        """Number of ids, out-of-vocabulary rows included."""
        return len(self.known) + self.num_oov

    @property
    def is_text(self) -> bool:
        """Whether values are text, or else integers."""
        return self.known.dtype.kind == "U"

    def encode(self, values: ArrayLike | Sequence[Any]) -> Int[np.ndarray, " n"]:
        """int32 ids in `[0, size)`, the same in every run.

        Args:
          values: Integers or text; None, NaN and an empty text are missing.  An integer may be
            written as text or as a whole float, and a text may be an integer.

        Raises:
          UserError: a value is nothing of the kind.
        """
        values, absent = self._read(values)
        ids = self._hashed(values)
        if len(self.known):
            position = np.minimum(np.searchsorted(self.known, values), len(self.known) - 1)
            known = self.known[position] == values
            ids[known] = position[known]
        if absent is not None and absent.any():
            ids[absent] = self.missing_id
        return ids

    @functools.cached_property
    def missing_id(self) -> int:
        """The id of a missing value."""
        if self.missing is None:
            return len(self.known)
        return int(self.encode([self.missing])[0])

    def _read(self, values: ArrayLike | Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """The values as an array of the vocabulary's type, and which are missing, if any can be."""
        if isinstance(values, np.ndarray):
            if values.dtype.kind in "bi" and not self.is_text:
                return values.astype(np.int64), None
            if values.dtype.kind == "U" and self.is_text:
                return values, values == ""
        listed = values.tolist() if isinstance(values, np.ndarray) else list(values)  # type: ignore[arg-type]
        absent = np.array([is_missing(v) for v in listed], bool)
        read = as_text if self.is_text else as_integer
        present = [
            read(v) if not a else "" if self.is_text else 0
            for v, a in zip(listed, absent, strict=True)
        ]
        return np.array(present, str if self.is_text else np.int64), absent

    def _hashed(self, values: np.ndarray) -> np.ndarray:
        if not self.num_oov:
            place = int(np.flatnonzero(self.known == self.missing)[0])
            return np.full(len(values), place, np.int32)
        if values.dtype.kind not in "iu":
            distinct, inverse = np.unique(values, return_inverse=True)
            values = np.array([zlib.crc32(str(v).encode()) for v in distinct], np.int64)[inverse]
        bucket = counter_hash(_VOCABULARY, values) % np.uint64(self.num_oov)
        return (len(self.known) + bucket.astype(np.int64)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Ids:
    """Values that are ids already.

    Attributes:
      size: Number of ids.
    """

    kind: ClassVar[str] = "ids"
    size: int

    def encode(self, values: ArrayLike | Sequence[Any]) -> Int[np.ndarray, " n"]:
        """The values as int32.

        Raises:
          UserError: one is no integer in `[0, size)`.
        """
        ids = np.array([as_integer(v) for v in np.ravel(np.asarray(values)).tolist()], np.int64)
        bad = (ids < 0) | (ids >= self.size)
        if bad.any():
            raise UserError(f"{ids[bad][0]} is no id; give an integer from 0 to {self.size - 1}")
        return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ids of a number by its size: 0 below the first edge, then one for each edge reached.

    Attributes:
      edges: Ascending.
    """

    kind: ClassVar[str] = "buckets"
    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.edges) + 1

    def encode(self, values: ArrayLike | Sequence[Any]) -> Int[np.ndarray, " n"]:
        """int32 ids; a missing value is in the first bucket.

        Raises:
          UserError: a value is no number.
        """
        numbers = as_numbers(values)
        numbers = np.where(np.isnan(numbers), -np.inf, numbers)
        return np.searchsorted(self.edges, numbers, side="right").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Scale:
    """From the values of a numeric feature to numbers around 0; a missing value is the mean.

    Attributes:
      mean: Of training events, after the transform.
      deviation: Likewise, or 1 for a constant.
      transform: "linear", or "log": sign(x) log(1 + |x| / unit).
      unit: Magnitude up to which "log" is about linear.
    """

    kind: ClassVar[str] = "scale"
    size: ClassVar[int] = 0
    mean: float = 0.0
    deviation: float = 1.0
    transform: Literal["linear", "log"] = "linear"
    unit: float = 1.0

    def describe(self) -> str:
        """For people."""
        return "linearly" if self.transform == "linear" else f"by log(1 + |x| / {self.unit:g})"

    def transformed(self, numbers: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """What mean and deviation are of."""
        if self.transform == "linear":
            return numbers
        return np.sign(numbers) * np.log1p(np.abs(numbers) / self.unit)

    def encode(self, values: ArrayLike | Sequence[Any]) -> Float[np.ndarray, " n"]:
        """float32 numbers; what lies beyond a million deviations is put there.

        Raises:
          UserError: a value is no number.
        """
        numbers = self.transformed(as_numbers(values))
        numbers = np.where(np.isnan(numbers), self.mean, numbers)
        with np.errstate(over="ignore"):
            scaled = (numbers - self.mean) / self.deviation
        return scaled.clip(-_FARTHEST, _FARTHEST).astype(np.float32)


Encoder = Vocabulary | Ids | Buckets | Scale
"""How the values of a feature become ids, or numbers where its `size` is 0."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Hours and weekdays of a place.

    Attributes:
      zone: Name of a time zone, such as "UTC" or "Europe/Paris".
    """

    zone: str = "UTC"

    def __post_init__(self) -> None:
        """Raises UserError: there is no such zone."""
        try:
            zoneinfo.ZoneInfo(self.zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise UserError(
                f"time_zone is {self.zone!r}; give a name such as UTC, Europe/Paris or "
                "America/New_York (on a machine without time zones: pip install tzdata)"
            ) from None

    def local(self, unix: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Seconds that the place's clocks show since 1970-01-01 00:00, for Unix seconds."""
        unix = np.asarray(unix, np.int64)
        if self.zone == "UTC" or not len(unix):
            return unix
        start, offset = self._offsets(int(unix.min()), int(unix.max()))
        return unix + offset[np.searchsorted(start, unix, side="right") - 1]

    def encode(self, unix: Int[np.ndarray, " n"]) -> dict[str, Int[np.ndarray, " n"]]:
        """The features "hour", 0 to 23, and "weekday", Monday is 0, of Unix seconds."""
        local = self.local(unix)
        return {
            "hour": (local // _HOUR % 24).astype(np.int32),
            "weekday": ((local // SECONDS_PER_DAY + _THURSDAY) % 7).astype(np.int32),
        }

    def _offsets(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the distance to UTC changes, and what it is from there on, in seconds."""
        zone = zoneinfo.ZoneInfo(self.zone)

        def offset(unix: int) -> int:
            found = datetime.datetime.fromtimestamp(unix, zone).utcoffset()
            return round(found.total_seconds()) if found else 0

        start, found = [first], [offset(first)]
        for day in range(first, last + SECONDS_PER_DAY, SECONDS_PER_DAY):
            low, high = day, day + SECONDS_PER_DAY  # no zone changes its clocks twice in a day
            if offset(high) == found[-1]:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if offset(middle) == found[-1] else (low, middle)
            start.append(high)
            found.append(offset(high))
        return np.array(start), np.array(found)


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or an empty text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def as_numbers(values: ArrayLike | Sequence[Any]) -> Float[np.ndarray, " n"]:
    """float64 numbers, NaN where they are missing or beyond `LARGEST`.

    Raises:
      UserError: a value is no number.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        listed = array.tolist() if array.dtype.kind == "U" else list(values)  # type: ignore[arg-type]
        try:
            array = np.array([math.nan if is_missing(v) else float(v) for v in listed], np.float64)
        except (TypeError, ValueError):
            bad = next(v for v in listed if not _is_number(v))
            raise UserError(f"{bad!r} is no number") from None
    numbers = array.astype(np.float64)
    return np.where(np.abs(numbers) <= LARGEST, numbers, np.nan)


def _is_number(value: Any) -> bool:
    try:
        return is_missing(value) or float(value) is not None
    except (TypeError, ValueError):
        return False


def as_text(value: Any) -> str:
    """A text, or an integer as text; raises UserError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{value!r} is a {type(value).__name__}; give a text, as the log had it")


def as_integer(value: Any) -> int:
    """An integer, also if written as text or a whole float; raises UserError for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    is_text = isinstance(value, str)
    if number is None or (not is_text and number != value) or not -(2**63) <= number < 2**63:
        raise UserError(f"{value!r} is no integer of 64 bits, as the log had them")
    return number
