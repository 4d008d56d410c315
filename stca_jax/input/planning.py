"""Planning: from the request index to the global sequence of batches, before any record is read.

    requests ── filter, draw lengths, split, chunk, shuffle ──> units      once per epoch
    units    ── pack, a look-ahead of W at a time ───────────> rows
    rows     ── G at a time ─────────────────────────────────> batches

The sequence is a pure function of (index, config): every draw is a hash of the seed, the epoch and
the request, never the next number of a generator.  So a position in it is three integers, and any
process or thread can start anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestIndex
from stca_jax.input.hashing import uniform
from stca_jax.input.length import FixedLength, LengthConfig, Window, window_start
from stca_jax.input.packing import chunk_starts, group_starts, pack_rows, split_requests
from stca_jax.input.records import SPLITS

# Of the sequence of batches: raised whenever equal configs come to give another one.
PLANNER_VERSION = 2

_SAMPLE, _LENGTH, _PLACE, _SHUFFLE, _ROWS = range(5)  # separate streams of one seed


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """Which requests are read, how long their histories are, and how they are packed.

    Attributes:
      length: Sampler of the history length, in events.
      row_length: L, tokens of a row.
      targets_per_row: M, target slots of a row.
      rows_per_batch: G, rows of a global batch, over all processes.
      rows: "request": each request brings its own tokens.  "user": consecutive requests of a user
        form a group, which draws one length and stores the tokens that its windows share once.
      targets_per_chunk: Most targets of a group, for rows="user"; None is a quarter of
        `targets_per_row`.  Large groups store fewer tokens, small ones mix more users in a row.
      window: Which events of the history are kept; rows="user" needs "suffix".
      split: "train", "validation" or "test".
      min_history: Requests with fewer earlier events are left out.
      max_requests: Use only so many requests: a fixed sample, the same for any seed and length.
      max_targets: Likewise, but as many of them as have so many targets, and one at least.
      shuffle: Whether each epoch has its own random order; else the dataset's order, but for
        packing within the look-ahead.
      epochs: Passes over the requests; None never ends.
      look_ahead: W, units packed together.  More fill rows better, at 100 bytes of memory each.
      num_threads: Threads that read records and fill batches; 0 does it when a batch is asked for.
      prefetch: Batches that each thread prepares ahead.
      seed: Determines order and lengths.
    """

    length: LengthConfig
    row_length: int
    targets_per_row: int
    rows_per_batch: int
    rows: Literal["request", "user"] = "request"
    targets_per_chunk: int | None = None
    window: Window = "suffix"
    split: str = "train"
    min_history: int = 0
    max_requests: int | None = None
    shuffle: bool = True
    epochs: int | None = None
    look_ahead: int = 4096
    num_threads: int = 1
    prefetch: int = 2
    seed: int = 0
    max_targets: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for values that cannot work, saying which would."""
        for name, least in (
            ("row_length", 1), ("targets_per_row", 1), ("rows_per_batch", 1), ("look_ahead", 1),
            ("min_history", 0), ("num_threads", 0), ("prefetch", 1),
        ):  # fmt: skip
            if not getattr(self, name) >= least:  # nor NaN
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("max_requests", "max_targets", "epochs", "targets_per_chunk"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        for name, choices in (
            ("rows", ("request", "user")), ("window", ("suffix", "random", "prefix")),
            ("split", SPLITS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.length.longest > self.row_length:
            raise ValueError(
                f"a length of up to {self.length.longest} events does not fit row_length "
                f"{self.row_length}: shorten the length or lengthen the rows"
            )
        if self.rows == "user" and self.window != "suffix":
            raise ValueError(
                "rows='user' shares the most recent events and needs window='suffix', got "
                f"{self.window!r}; use rows='request'"
            )
        if (self.targets_per_chunk or 1) > self.targets_per_row:
            raise ValueError(
                f"targets_per_chunk {self.targets_per_chunk} exceeds targets_per_row "
                f"{self.targets_per_row}"
            )

    @property
    def row_shape(self) -> tuple[int, int]:
        """L, M."""
        return self.row_length, self.targets_per_row

    def for_evaluation(self, split: str, length: int, **changes: Any) -> InputConfig:
        """One ordered pass over `split` at a fixed length, in rows at least that long.

        Chunks are as large as a row allows: nothing is gained by mixing users.

        Args:
          split: "train", "validation" or "test".
          length: Events each request may read.
          **changes: Other fields to replace, such as `max_requests` or `min_history`.
        """
        return dataclasses.replace(
            self,
            **{
                "split": split,
                "length": FixedLength(length),
                "row_length": max(length, self.row_length),
                "targets_per_chunk": self.targets_per_row,
                "window": "suffix",
                "shuffle": False,
                "epochs": 1,
                **changes,
            },
        )


@dataclasses.dataclass(frozen=True)
class Position:
    """The first row not yet delivered.

    Attributes:
      epoch: Pass over the requests.
      window: Look-ahead window of the epoch.
      row: Row of the window.
      step: Global batches delivered before it, in all epochs.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Units:
    """An epoch's units, in the order in which they are packed, and the pieces they are made of.

    Attributes:
      first_piece: Unit u holds pieces `[first_piece[u], first_piece[u] + num_pieces[u])`.
      num_pieces: At least 1.
      log_start: First event of the user's log that the unit stores.
      tokens: Events it stores; at most L.
      targets: At most M.
      piece_request: Of each piece, its request's place in the planner's index.
      piece_first_target: Of each piece, its first target within the request.
      piece_targets: Of each piece, its number of targets.
      piece_start: Of each piece, the first event of its window.
      piece_stop: Of each piece, one past the last event of its window.
    """

    first_piece: Int[np.ndarray, " u"]
    num_pieces: Int[np.ndarray, " u"]
    log_start: Int[np.ndarray, " u"]
    tokens: Int[np.ndarray, " u"]
    targets: Int[np.ndarray, " u"]
    piece_request: Int[np.ndarray, " p"]
    piece_first_target: Int[np.ndarray, " p"]
    piece_targets: Int[np.ndarray, " p"]
    piece_start: Int[np.ndarray, " p"]
    piece_stop: Int[np.ndarray, " p"]


class BatchPlan(NamedTuple):
    """A global batch before any record is read.

    Attributes:
      units: The epoch's units.
      rows: Units of each row; fewer than G rows only in the last batch of an epoch.
      after: Where the next batch begins.
    """

    units: Units
    rows: list[list[int]]
    after: Position


class Planner:
    """Plans batches; one planner serves many threads.

    Attributes:
      config: The config.
      index: The requests that the config selects.
    """

    def __init__(self, index: RequestIndex, config: InputConfig):
        """Selects the requests.

        Raises:
          ValueError: the filters leave none.
        """
        self.config = config
        self.index = select_requests(index, config)
        self._lock = threading.RLock()
        self._cached_units = functools.lru_cache(maxsize=2)(self._make_units)
        self._cached_rows = functools.lru_cache(maxsize=4)(self._pack_window)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        """Itself: Grain copies a pipeline for each thread, and the plans should be shared."""
        return self

    def units(self, epoch: int) -> Units:
        """The epoch's units."""
        with self._lock:
            return self._cached_units(epoch)

    def num_windows(self, epoch: int) -> int:
        """Look-ahead windows of an epoch."""
        return -(-len(self.units(epoch).tokens) // self.config.look_ahead)

    def rows(self, epoch: int, window: int) -> list[list[int]]:
        """Rows packed from one look-ahead window, each a list of units."""
        with self._lock:
            return self._cached_rows(epoch, window)

    def batches(self, position: Position) -> Iterator[BatchPlan]:
        """Global batches from `position` on; a batch never mixes epochs.

        So the last batch of an epoch has as many rows as are left.  A loss that is a mean over the
        targets of a batch weighs those of such a batch more.
        """
        epoch, window, row, step = dataclasses.astuple(position)
        while self.config.epochs is None or epoch < self.config.epochs:
            units, num_windows = self.units(epoch), self.num_windows(epoch)
            rows: list[list[int]] = []
            while len(rows) < self.config.rows_per_batch and window < num_windows:
                packed = self.rows(epoch, window)
                taken = packed[row : row + self.config.rows_per_batch - len(rows)]
                rows += taken
                row += len(taken)
                if row == len(packed):
                    window, row = window + 1, 0
            if window == num_windows:
                epoch, window = epoch + 1, 0
            step += 1
            yield BatchPlan(units, rows, Position(epoch, window, row, step))

    def _make_units(self, epoch: int) -> Units:
        config, index = self.config, self.index
        pieces = split_requests(index.num_targets, config.targets_per_row)
        request_id = index.request_id[pieces.request]
        end = index.history_end[pieces.request]

        def draw(stream: int, *more: np.ndarray) -> np.ndarray:
            return uniform(config.seed, stream, epoch, request_id, *more)

        # A group's place in the epoch is a hash of its first piece: known, for a curriculum's sake,
        # before its length is drawn.  What it is cut into keeps the place.
        first_of_group = np.arange(len(end))
        if config.rows == "user":
            first_of_group = group_starts(
                index.record[pieces.request],
                pieces.num_targets,
                config.targets_per_chunk or max(1, config.targets_per_row // 4),
            )
        place = np.zeros(len(end))
        if config.shuffle:
            place = draw(_SHUFFLE, pieces.first_target)
        length = config.length.lengths(draw(_LENGTH)[first_of_group], epoch + place[first_of_group])
        group_size = np.diff(first_of_group, append=len(end))
        length = np.repeat(length, group_size)
        place = np.repeat(place[first_of_group], group_size)
        first = chunk_starts(first_of_group, end, length, config.row_length)
        num_pieces = np.diff(first, append=len(end))
        start = window_start(end, length, config.window, draw(_PLACE))
        stop = start + np.minimum(length, end)
        order = np.argsort(place[first], kind="stable")
        return Units(
            first_piece=first[order],
            num_pieces=num_pieces[order],
            log_start=start[first][order],
            tokens=(stop[first + num_pieces - 1] - start[first])[order],
            targets=np.add.reduceat(pieces.num_targets, first)[order],
            piece_request=pieces.request,
            piece_first_target=pieces.first_target,
            piece_targets=pieces.num_targets,
            piece_start=start,
            piece_stop=stop,
        )

    def _pack_window(self, epoch: int, window: int) -> list[list[int]]:
        config, units, num_windows = self.config, self.units(epoch), self.num_windows(epoch)
        first, last = (w * len(units.tokens) // num_windows for w in (window, window + 1))
        rows = pack_rows(
            units.tokens[first:last],
            units.targets[first:last],
            row_length=config.row_length,
            targets_per_row=config.targets_per_row,
        )
        rows = [[first + unit for unit in row] for row in rows]
        if not config.shuffle:
            return rows
        # Packing begins with the longest histories.
        order = np.argsort(uniform(config.seed, _ROWS, epoch, window, np.arange(len(rows))))
        return [rows[i] for i in order]


def select_requests(index: RequestIndex, config: InputConfig) -> RequestIndex:
    """The requests that the config's filters leave, in the index's order.

    Raises:
      ValueError: there are none.
    """
    selected = index.of_split(config.split)
    selected = selected.select(selected.history_end >= config.min_history)
    if not len(selected):
        raise UserError(
            f"no request of split {config.split!r} has min_history={config.min_history} or more "
            f"earlier events{_most_events(index, config.split)}"
        )
    if config.max_requests is not None:
        selected = selected.select(np.sort(_sample_order(selected)[: config.max_requests]))
    if config.max_targets is not None:
        order = _sample_order(selected)
        targets = np.cumsum(selected.num_targets[order], dtype=np.int64)
        count = np.searchsorted(targets, config.max_targets, side="right")
        selected = selected.select(np.sort(order[: max(1, count)]))
    return selected


def _sample_order(index: RequestIndex) -> Int[np.ndarray, " q"]:
    """Places of the requests in a random order, of which samples are the beginning."""
    return np.argsort(uniform(0, _SAMPLE, index.request_id), kind="stable")


def _most_events(index: RequestIndex, split: str) -> str:
    of_split = index.of_split(split)
    if not len(of_split):
        return ": the split is empty; move its start, which was set when the data were prepared"
    return f": the longest history has {of_split.history_end.max():,}; lower min_history"
