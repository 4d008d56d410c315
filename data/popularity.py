"""How well popularity alone tells positives from negatives: .5 if negatives are as popular."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from stca_jax.input.records import SPLITS

Counts = collections.Counter[tuple[int, int, int, int]]
"""Targets by split, task, label, and training events of the item."""


def count_targets(
    split: Int[np.ndarray, " t"], label: Float[np.ndarray, "t tasks"], count: Int[np.ndarray, " t"]
) -> Counts:
    """Counts targets; those without a label of a task are none of that task's.

    Args:
      split: Index into `SPLITS`.
      label: 0, 1 or NaN.
      count: Training events of each target's item.
    """
    found: Counts = collections.Counter()
    for task, column in enumerate(label.T):
        known = ~np.isnan(column)
        # One number for the three: NumPy takes ten times as long to find equal columns.
        keys = (count[known] * 2 + column[known].astype(np.int64)) * len(SPLITS) + split[known]
        distinct, number = np.unique(keys, return_counts=True)
        pairs, splits = np.divmod(distinct, len(SPLITS))
        for s, y, c, n in np.stack([splits, pairs % 2, pairs // 2, number], axis=1).tolist():
            found[s, task, y, c] += n
    return found


def describe(counts: Counts, tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Lines of a profile: the AUC in each split, of each task."""
    lines = []
    for k, task in enumerate(tasks):
        found = {s: auc(counts, split=i, task=k) for i, s in enumerate(SPLITS)}
        shown = ", ".join(f"{s} {value:.3f}" for s, value in found.items())
        of_task = f" ({task})" if len(tasks) > 1 else ""
        lines.append((f"AUC of popularity alone{of_task}", shown))
    return lines


def auc(counts: Mapping[tuple[int, int, int, int], int], *, split: int, task: int) -> float:
    """Of the items' training events as a score; NaN if there is one class only."""
    of_label = [collections.Counter[int](), collections.Counter[int]()]
    for (s, t, label, count), number in counts.items():
        if (s, t) == (split, task):
            of_label[label][count] += number
    scores = sorted({*of_label[0], *of_label[1]})
    negative, positive = (np.array([c[score] for score in scores], float) for c in of_label)
    total = negative.sum() * positive.sum()
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / total) if total else float("nan")
