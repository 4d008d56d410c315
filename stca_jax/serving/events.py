"""Events of one user, as a caller gives them and as a store gives them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from stca_jax.errors import UserError

MISSING = "\0missing"  # in a column of texts
_INT64 = np.iinfo(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
    """n events of one user, in any order.

    Attributes:
      time: Unix seconds.
      columns: Features by name, n values each: integers, numbers or texts; None where missing.
      ids: n texts or integers that name the events, so that an event that is sent twice counts
        once and can be rewritten later; None for events without names.
      sequence: The order in which a store got them, a number of the event's own; set by the store.
    """

    time: Int[np.ndarray, " n"]
    columns: Mapping[str, np.ndarray]
    ids: Sequence[Any] | None = None
    sequence: Int[np.ndarray, " n"] | None = None

    def __post_init__(self) -> None:
        """Makes arrays of what was given.

        Raises:
          UserError: a column has another length or kind than it should; names it.
        """
        time = as_times("time", self.time)
        columns = {name: as_column(name, v, len(time)) for name, v in self.columns.items()}
        object.__setattr__(self, "time", time)
        object.__setattr__(self, "columns", columns)
        if self.ids is not None:
            ids = [str(i) for i in self.ids]
            if len(ids) != len(time):
                raise UserError(f"ids has {len(ids)} entries for {len(time)} events")
            object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        """N."""
        return len(self.time)

    def select(self, which: np.ndarray) -> Events:
        """The events that a mask, or an array of places, picks."""
        places = np.arange(len(self))[which]
        return Events(
            self.time[places],
            {name: column[places] for name, column in self.columns.items()},
            None if self.ids is None else [self.ids[i] for i in places],
            None if self.sequence is None else self.sequence[places],
        )


def as_array(name: str, values: Any) -> np.ndarray:
    """`np.asarray` of what a client sent.

    Raises:
      UserError: lists of unequal lengths in it, or numbers that no array holds.
    """
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name!r} makes no array of numbers or texts: {error}") from None


def as_times(name: str, values: Any) -> Int[np.ndarray, " n"]:
    """Unix seconds as int64; fractions of a second are left out.

    Raises:
      UserError: they are no numbers.
    """
    array = as_array(name, values)
    if array.ndim != 1:
        raise UserError(f"{name} has shape {array.shape}; give one number for each event")
    if array.dtype.kind not in "iuf" and array.size:
        raise UserError(f"{name} has values like {array.tolist()[0]!r}; give Unix seconds")
    with np.errstate(invalid="ignore"):
        whole = np.floor(array).astype(np.int64) if array.dtype.kind == "f" else array
    bad = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(len(array), bool)
    if bad.any():
        raise UserError(f"{name} has {array[bad][0]}; give Unix seconds")
    return whole.astype(np.int64)


def as_column(name: str, values: Any, size: int) -> np.ndarray:
    """A column as int64, float64 or text; None becomes NaN, or `MISSING` among texts.

    Raises:
      UserError: another length than `size`, or values of no such kind.
    """
    array = as_array(name, values)
    if array.shape != (size,):
        raise UserError(f"{name!r} has shape {array.shape}, but there are {size} values of time")
    if array.dtype.kind == "O":
        given = [v for v in array.tolist() if v is not None]
        if given and all(isinstance(v, str) for v in given):
            return np.array([MISSING if v is None else v for v in array.tolist()])
        if all(isinstance(v, int | float) for v in given):
            return np.array([np.nan if v is None else v for v in array.tolist()], np.float64)
    if array.dtype.kind in "bi" or (array.dtype.kind == "u" and (array <= _INT64.max).all()):
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.dtype.kind == "U" or not size:
        return array.astype(str)
    raise UserError(
        f"{name!r} has values like {array.tolist()[0]!r}: give integers, numbers or texts, all of "
        "one kind"
    )
