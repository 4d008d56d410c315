"""Soft counts of one user's candidates: from how often the user has each id, not event by event.

Events of one id add the same to a soft count (`stca_jax.ops.soft_match`), so that the sum over a
history is one over its distinct ids, which the match index counts anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from stca_jax.serving.matches import MatchIndex

_EPSILON = 1e-12  # of a square norm, as in training
_AT_ONCE = 2**15  # pairs of a candidate and an id: as many as a core's cache holds


class SoftCounts:
    """Soft counts by field, from the tables of a model."""

    def __init__(
        self,
        tables: Mapping[str, Float[np.ndarray, "V W"]],
        sharpness: Float[np.ndarray, " S"],
    ):
        """Args: the table of each field that has soft counts, and each field's sharpness."""
        self._fields = tuple(zip(tables.items(), sharpness, strict=True))

    def look_up(
        self, matches: MatchIndex, columns: Mapping[str, Int[np.ndarray, " m"]]
    ) -> Float[np.ndarray, "m S"]:
        """log(1 + n) of candidates, field by field.

        Args:
          matches: Of the user.
          columns: Ids of the candidates by field.
        """
        totals = []
        for (field, table), sharpness in self._fields:
            ids, place = np.unique(columns[field], return_inverse=True)
            targets = sharpness * _unit_rows(table[ids])
            totals.append(_totals(targets, *_events(matches, field, table), sharpness)[place])
        return np.log1p(np.stack(totals, -1))


def _events(
    matches: MatchIndex, field: str, table: Float[np.ndarray, "V W"]
) -> tuple[Float[np.ndarray, "n W"], Float[np.ndarray, " n"]]:
    """Unit rows of the ids that a user's events carry, and how many carry each."""
    if field not in matches.derived:
        ids, places = matches.ids(field)
        matches.derived[field] = _unit_rows(table[ids]), places
    rows, places = matches.derived[field]
    return rows, matches.counts(places).astype(np.float32)


def _totals(
    targets: Float[np.ndarray, "m W"],
    rows: Float[np.ndarray, "n W"],
    count: Float[np.ndarray, " n"],
    sharpness: np.float32,
) -> Float[np.ndarray, " m"]:
    """The sum n of each target, whose rows are `sharpness` long."""
    total = np.empty(len(targets), np.float32)
    step = max(1, _AT_ONCE // max(1, len(count)))
    for first in range(0, len(targets), step):
        score = targets[first : first + step] @ rows.T
        score -= sharpness
        total[first : first + step] = np.exp(score, out=score) @ count
    return total


def _unit_rows(rows: Float[np.ndarray, "n W"]) -> Float[np.ndarray, "n W"]:
    return rows / np.sqrt(np.square(rows).sum(-1, keepdims=True) + _EPSILON)
