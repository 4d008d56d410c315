"""Packing: which requests share a row of L tokens and M target slots.

    requests of the log      A(300 events, 8 targets)  B(120, 8)  C(4,000, 20)  …
    pieces                   requests of more than M targets are split; nothing is dropped
    groups                   consecutive pieces of a user, of so many targets: one length each
    units                    what is packed whole: one piece, or a chunk of a group
    rows                     units side by side, at most L tokens and M targets

A chunk is a run of consecutive pieces of one group whose windows overlap, stored once:

    log of the user   e0 e1 e2 e3 e4 e5 e6 e7 e8 …
    window of A             └────────┘
    window of B                └────────┘
    window of C                      └────────┘
    unit {A, B, C}          └─────────────────┘   tokens e2 … e7

Everything here is arithmetic on flat arrays: no event is read.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from stca_jax.input.arrays import ragged_arange, run_starts


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Requests cut to at most M targets.

    Attributes:
      request: Which request each piece belongs to.
      first_target: The piece's first target within its request.
      num_targets: At least 1 and at most M.
    """

    request: Int[np.ndarray, " p"]
    first_target: Int[np.ndarray, " p"]
    num_targets: Int[np.ndarray, " p"]


def split_requests(num_targets: Int[np.ndarray, " q"], targets_per_row: int) -> Pieces:
    """Splits requests of more than M targets into pieces of near-equal size.

    Args:
      num_targets: Targets of each request.
      targets_per_row: M.

    Returns:
      The pieces, in the order of their requests.
    """
    count = -(-num_targets // targets_per_row)
    request = np.repeat(np.arange(len(num_targets)), count)
    part = ragged_arange(count)
    size, pieces = num_targets[request], count[request]
    first = part * size // pieces
    return Pieces(request, first, (part + 1) * size // pieces - first)


def group_starts(
    user: Int[np.ndarray, " p"], num_targets: Int[np.ndarray, " p"], max_targets: int
) -> Int[np.ndarray, " groups"]:
    """Greedily groups each user's consecutive pieces, by their targets and nothing else.

    A group draws one length.  If its extent depended on the length, long draws would cover more
    requests than short ones, and requests would read longer windows than the sampler draws.

    Args:
      user: Runs of equal values are the users.
      num_targets: Targets of each piece; one of more than `max_targets` is a group by itself.
      max_targets: Most targets of a group.

    Returns:
      The first piece of each group.
    """
    targets = np.zeros(len(user), np.int64)  # of the piece's group, up to and with the piece
    starts = np.zeros(len(user), bool)
    for piece, is_first in _by_rank(run_starts(user), len(user)):
        before = 0 if is_first else targets[piece - 1]
        starts[piece] = is_first | (before + num_targets[piece] > max_targets)
        targets[piece] = np.where(starts[piece], 0, before) + num_targets[piece]
    return np.flatnonzero(starts)


def chunk_starts(
    group: Int[np.ndarray, " groups"],
    history_end: Int[np.ndarray, " p"],
    length: Int[np.ndarray, " p"],
    max_tokens: int,
) -> Int[np.ndarray, " chunks"]:
    """Cuts each group into chunks, runs of pieces that share their tokens.

    A chunk ends where the next piece would exceed `max_tokens` from the first window's start, or
    where its window does not overlap the one before, so that no uncovered token is ever stored.

    Args:
      group: First piece of each group, as `group_starts` returns them.
      history_end: Events before each piece's request, non-decreasing within a group.
      length: Window length, the same for all pieces of a group; at most `max_tokens`.
      max_tokens: Tokens of a row.

    Returns:
      The first piece of each chunk; every group's is one.
    """
    window_start = np.maximum(history_end - length, 0)
    chunk_start = window_start.copy()  # first token of the piece's chunk
    starts = np.zeros(len(history_end), bool)
    for piece, is_first in _by_rank(group, len(history_end)):
        if not is_first:
            end, previous_end = history_end[piece], history_end[piece - 1]
            is_apart = (window_start[piece] >= previous_end) & (end > previous_end)
            starts[piece] = is_apart | (end - chunk_start[piece - 1] > max_tokens)
            kept = piece[~starts[piece]]
            chunk_start[kept] = chunk_start[kept - 1]
        else:
            starts[piece] = True
    return np.flatnonzero(starts)


def _by_rank(
    first: Int[np.ndarray, " runs"], size: int
) -> Iterator[tuple[Int[np.ndarray, " some"], bool]]:
    """Yields the first elements of all runs, then the second ones, and so on.

    Args:
      first: Where each run begins.
      size: Where the last one ends.

    Yields:
      The elements, and whether they are the first of their runs.
    """
    count = np.diff(first, append=size)
    # Long runs first, so that the runs which have a k-th element are a prefix.
    order = np.argsort(-count, kind="stable")
    first, count = first[order], count[order]
    for k in range(count.max(initial=0)):
        yield first[: np.searchsorted(-count, -k)] + k, k == 0


def pack_rows(
    tokens: Int[np.ndarray, " u"],
    targets: Int[np.ndarray, " u"],
    *,
    row_length: int,
    targets_per_row: int,
) -> list[list[int]]:
    """Packs units into rows so that tokens and target slots run out together.

    A row starts with the unit of most tokens.  While the remaining units have more tokens than
    slots to go with, it goes on with the largest unit that fits: first-fit decreasing.  Otherwise
    it takes units whose mean is (free tokens) / (units that still fit by targets), so that a row
    which began with a long history goes on with short ones, and ends with the pair of units that
    leaves the fewest tokens free.  Takes a few microseconds per unit.

    Args:
      tokens: At most `row_length` each.
      targets: Between 1 and `targets_per_row` each.
      row_length: L.
      targets_per_row: M.

    Returns:
      The units of each row; every unit is in exactly one.
    """
    if not len(tokens):
        return []
    pool = _Pool(tokens, targets)
    mean_targets = float(targets.mean())
    tokens_left, targets_left = int(tokens.sum()), int(targets.sum())
    rows = []
    while pool.unit:
        many_tokens = tokens_left * targets_per_row > _MANY * targets_left * row_length
        free_tokens, free_slots = row_length, targets_per_row
        row: list[int] = []
        pick: int | None = len(pool.unit) - 1
        while pick is not None:
            free_tokens -= pool.tokens.pop(pick)
            free_slots -= pool.targets.pop(pick)
            row.append(pool.unit.pop(pick))
            units_to_go = 1.0 if many_tokens else free_slots / mean_targets
            pick = pool.choose(free_tokens, free_slots, units_to_go)
        tokens_left -= row_length - free_tokens
        targets_left -= targets_per_row - free_slots
        rows.append(row)
    return rows


# Packing by tokens alone is left for mixed rows when tokens outweigh slots by less than this.
_MANY = 1.05
# Units tried when the first choice has too many targets, and as the smaller of the last pair.
_MAX_TRIES, _MAX_PAIRS = 64, 8


class _Pool:
    """Units not yet packed, as parallel lists in ascending order of tokens."""

    def __init__(self, tokens: np.ndarray, targets: np.ndarray):
        order = np.lexsort((targets, tokens))
        self.unit: list[int] = order.tolist()
        self.tokens: list[int] = tokens[order].tolist()
        self.targets: list[int] = targets[order].tolist()
        self._all_tokens = list(self.tokens)
        self._mean_up_to = (np.cumsum(tokens[order]) / np.arange(1, len(order) + 1)).tolist()
        self._phase = 0.0

    def choose(self, free_tokens: int, free_slots: int, units_to_go: float) -> int | None:
        """Where the next unit of a row stands, or None if no candidate fits."""
        if not self.unit or not free_slots or self.tokens[0] > free_tokens:
            return None
        if units_to_go <= 1:
            pick = bisect_right(self.tokens, free_tokens) - 1
        elif units_to_go <= 2.5:
            pick = self._larger_of_best_pair(free_tokens)
        else:
            pick = self._with_mean(free_tokens / units_to_go, free_tokens)
        for candidate in range(pick, max(pick - _MAX_TRIES, -1), -1):
            if self.targets[candidate] <= free_slots:
                return candidate
        return None

    def _larger_of_best_pair(self, free_tokens: int) -> int:
        """The larger of two units that together leave the fewest tokens free."""
        best, least_free = bisect_right(self.tokens, free_tokens) - 1, free_tokens + 1
        middle = bisect_right(self.tokens, free_tokens / 2) - 1
        for smaller in range(middle, max(middle - _MAX_PAIRS, -1), -1):
            larger = bisect_right(self.tokens, free_tokens - self.tokens[smaller]) - 1
            free = free_tokens - self.tokens[smaller] - self.tokens[larger]
            if larger != smaller and free < least_free:
                best, least_free = larger, free
        return best

    def _with_mean(self, mean: float, at_most: int) -> int:
        """One of the smallest units, so many of them that they average `mean` tokens.

        Golden-ratio steps pick evenly among them, which keeps the mix of sizes in the pool.
        """
        last = min(bisect_right(self._mean_up_to, mean), len(self._all_tokens) - 1)
        candidates = bisect_right(self.tokens, min(self._all_tokens[last], at_most))
        self._phase = (self._phase + 0.6180339887) % 1
        return int(self._phase * candidates)


def balanced_order(tokens: Sequence[int]) -> list[int]:
    """An order of rows in which contiguous shares have near-equal tokens.

    Rows sorted by tokens are dealt in pairs into two halves, the larger of a pair to the half that
    has fewer tokens so far, and each half again: halves, quarters, eighths … are balanced, so the
    order serves any number of processes and devices that is a power of two.
    """

    def deal(rows: list[int]) -> list[int]:
        if len(rows) < 2:
            return rows
        left, right, lead = [], [], 0
        for row, other in zip(rows[::2], rows[1::2], strict=False):
            if lead > 0:
                row, other = other, row
            left.append(row)
            right.append(other)
            lead += tokens[row] - tokens[other]
        return deal(left + rows[len(rows) // 2 * 2 :]) + deal(right)

    return deal(sorted(range(len(tokens)), key=lambda row: -tokens[row]))
