"""Turns a plan into a batch: which event and target of which record stands where in which row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.input.arrays import ragged_arange, ragged_ranges, sum_before
from stca_jax.input.dataset import RequestIndex
from stca_jax.input.packing import balanced_order
from stca_jax.input.planning import BatchPlan, InputConfig, Planner, Position, Units
from stca_jax.input.record_cache import RecordCache
from stca_jax.input.records import UserRecord, unlabelled_events
from stca_jax.schema import Schema


class Dataset(Protocol):
    """What the pipeline needs of a dataset; `stca_jax.input.dataset.RequestDataset` has it."""

    @property
    def schema(self) -> Schema:
        """Features and vocabularies."""

    @property
    def index(self) -> RequestIndex:
        """All requests."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the record files."""

    def check_fingerprint(self, expected: Mapping[str, str]) -> None:
        """Raises ValueError, naming the file, if a digest differs."""

    def record(self, i: int) -> UserRecord:
        """Reads a user's record; called from several threads."""


@dataclasses.dataclass(frozen=True)
class Fill:
    """How much of the static shapes is used; of global batches, the same in every process.

    Attributes:
      rows: Rows that hold any request.
      tokens: History tokens that stand in a row.
      targets: Valid targets.
      requests: Requests; one split over several rows counts once for each.
      max_rows: G, or G times the batches of an epoch.
      max_tokens: Token slots of those rows.
      max_targets: Target slots of those rows.
    """

    rows: int
    tokens: int
    targets: int
    requests: int
    max_rows: int
    max_tokens: int
    max_targets: int

    def metrics(self) -> dict[str, float]:
        """Used shares, by the names under which they are logged."""
        return {
            "token_fill": self.tokens / self.max_tokens,
            "target_fill": self.targets / self.max_targets,
        }


def fill_of(units: Units, rows: list[list[int]], config: InputConfig) -> Fill:
    """Statistics of some rows of a plan."""
    used = np.array([unit for row in rows for unit in row])
    max_rows = -(-len(rows) // config.rows_per_batch) * config.rows_per_batch
    return Fill(
        rows=len(rows),
        tokens=int(units.tokens[used].sum()),
        targets=int(units.targets[used].sum()),
        requests=int(units.num_pieces[used].sum()),
        max_rows=max_rows,
        max_tokens=max_rows * config.row_length,
        max_targets=max_rows * config.targets_per_row,
    )


class Assembler:
    """Turns a plan into a batch: reads the records and fills this process's rows."""

    def __init__(
        self, dataset: Dataset, planner: Planner, rows: slice, *, with_unlabelled: bool = False
    ):
        """Fills `rows` of each global batch, and `history_unlabelled` if asked to."""
        self._dataset = dataset
        self._training_end = dataset.index.training_end if with_unlabelled else None
        self._records = RecordCache(dataset.record)
        self._index = planner.index
        self._config = planner.config
        self._rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Assembler:
        """Itself: Grain copies a pipeline for each thread, and the dataset should be shared."""
        return self

    def __call__(self, plan: BatchPlan) -> tuple[RequestBatch, Fill, Position]:
        """Returns the batch, the statistics of the global batch, and where the next begins."""
        config, units = self._config, plan.units
        rows = plan.rows + [[]] * (config.rows_per_batch - len(plan.rows))
        order = balanced_order([int(units.tokens[row].sum()) if row else 0 for row in rows])
        rows = [rows[i] for i in order[self._rows]]
        batch = empty_batch(
            self._dataset.schema,
            len(rows),
            config.row_length,
            config.targets_per_row,
            shared_history=config.rows == "user",
            with_unlabelled=self._training_end is not None,
        )
        layout = _lay_out(units, rows)
        self._fill_slots(batch, layout)
        self._fill_features(batch, layout)
        return batch, fill_of(units, plan.rows, config), plan.after

    def _fill_slots(self, batch: RequestBatch, layout: _Layout) -> None:
        """Fills what the request index knows, all slots at once."""
        index, request = self._index, layout.piece_request
        for name, values in (
            ("history_start", layout.row_start),
            ("history_end", layout.row_stop),
            ("request_time", index.request_time[request]),
            ("request_id", index.request_id[request]),
            ("user_id", index.user_id[request]),
            ("num_request_targets", index.num_targets[request]),
            ("target_mask", np.ones(len(request), bool)),
        ):
            getattr(batch, name)[layout.slot_row, layout.slot] = values[layout.slot_piece]

    def _fill_features(self, batch: RequestBatch, layout: _Layout) -> None:
        """Copies what only the records hold, reading each record once."""
        record_of_unit = self._index.record[layout.piece_request[layout.first_piece[:-1]]]
        held = -1
        for unit in np.argsort(record_of_unit, kind="stable").tolist():
            if held != record_of_unit[unit]:
                held = int(record_of_unit[unit])
                record = self._records.record(held)
                unlabelled = self._unlabelled(record)
            _copy_events(batch, layout, unit, record, unlabelled)
            self._copy_targets(batch, layout, unit, record)

    def _unlabelled(self, record: UserRecord) -> Bool[np.ndarray, " n"] | None:
        if self._training_end is None:
            return None
        return unlabelled_events(record, self._dataset.schema.item, self._training_end)

    def _copy_targets(
        self, batch: RequestBatch, layout: _Layout, unit: int, record: UserRecord
    ) -> None:
        pieces = slice(layout.first_piece[unit], layout.first_piece[unit + 1])
        position = self._index.position[layout.piece_request[pieces]]
        count = layout.piece_targets[pieces]
        first = record.target_offset[position] + layout.piece_first_target[pieces]
        total = int(count.sum())
        target: np.ndarray | slice = slice(first[0], first[0] + total)
        if first[-1] + count[-1] != first[0] + total:  # a filter left out requests in between
            target = ragged_ranges(first, count)
        slot = layout.first_slot[unit]
        slots = (layout.unit_row[unit], slice(slot, slot + total))
        batch.label[slots] = record.label[target]
        for name, column in batch.target.items():
            column[slots] = record.target[name][target]
        for name, column in batch.request.items():
            column[slots] = np.repeat(record.request[name][position], count)


def _copy_events(
    batch: RequestBatch,
    layout: _Layout,
    unit: int,
    record: UserRecord,
    unlabelled: Bool[np.ndarray, " n"] | None,
) -> None:
    first, size = layout.log_start[unit], layout.tokens[unit]
    events = slice(first, first + size)
    token = layout.first_token[unit]
    tokens = (layout.unit_row[unit], slice(token, token + size))
    batch.history_time[tokens] = record.event_time[events]
    for name, column in batch.history.items():
        column[tokens] = record.history[name][events]
    if batch.history_unlabelled is not None and unlabelled is not None:
        batch.history_unlabelled[tokens] = unlabelled[events]


class _Layout(NamedTuple):
    """Where the u units, p pieces and s targets of some rows stand.

    Attributes:
      unit_row: Row of each unit.
      tokens: Events of each unit.
      log_start: Its first event, in the user's log …
      first_token: … and in the row.
      first_slot: Its first target slot.
      first_piece: Its pieces are `[first_piece[u], first_piece[u + 1])`.
      piece_request: Request of each piece, in the planner's index.
      piece_first_target: First target within that request.
      piece_targets: Number of targets.
      row_start: Start of its range in the row.
      row_stop: End of its range.
      slot_piece: Piece of each target.
      slot_row: Row of each target.
      slot: Slot of each target.
    """

    unit_row: Int[np.ndarray, " u"]
    tokens: Int[np.ndarray, " u"]
    log_start: Int[np.ndarray, " u"]
    first_token: Int[np.ndarray, " u"]
    first_slot: Int[np.ndarray, " u"]
    first_piece: Int[np.ndarray, " u+1"]
    piece_request: Int[np.ndarray, " p"]
    piece_first_target: Int[np.ndarray, " p"]
    piece_targets: Int[np.ndarray, " p"]
    row_start: Int[np.ndarray, " p"]
    row_stop: Int[np.ndarray, " p"]
    slot_piece: Int[np.ndarray, " s"]
    slot_row: Int[np.ndarray, " s"]
    slot: Int[np.ndarray, " s"]


def _lay_out(units: Units, rows: list[list[int]]) -> _Layout:
    """Places units side by side, in the order in which each row lists them.

    So a target's range never begins or ends before that of the slot before it.
    """
    per_row = np.array([len(row) for row in rows])
    unit = np.array([unit for row in rows for unit in row], np.int64)
    unit_row = np.repeat(np.arange(len(rows)), per_row)
    tokens, num_pieces = units.tokens[unit], units.num_pieces[unit]
    log_start = units.log_start[unit]
    first_token = sum_before(tokens, per_row)
    piece = ragged_ranges(units.first_piece[unit], num_pieces)
    piece_targets = units.piece_targets[piece]
    piece_row = np.repeat(unit_row, num_pieces)
    shift = np.repeat(first_token - log_start, num_pieces)
    slots_of_row = np.bincount(piece_row, piece_targets, len(rows)).astype(np.int64)
    return _Layout(
        unit_row=unit_row,
        tokens=tokens,
        log_start=log_start,
        first_token=first_token,
        first_slot=sum_before(units.targets[unit], per_row),
        first_piece=np.append(0, np.cumsum(num_pieces)),
        piece_request=units.piece_request[piece],
        piece_first_target=units.piece_first_target[piece],
        piece_targets=piece_targets,
        row_start=units.piece_start[piece] + shift,
        row_stop=units.piece_stop[piece] + shift,
        slot_piece=np.repeat(np.arange(len(piece)), piece_targets),
        slot_row=np.repeat(piece_row, piece_targets),
        slot=ragged_arange(slots_of_row),
    )
