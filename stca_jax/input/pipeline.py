"""The input pipeline: a dataset's requests become an endless, resumable sequence of batches.

    Planner     which units stand in which rows of the k-th global batch     (planning.py)
    Assembler   reads their records and fills this process's share of rows   (threads, by Grain)

The global sequence is a pure function of (dataset, config), and each process cuts its share from
it.  A position is therefore a few integers that hold for any number of processes and threads.
Every target of the selected requests is in exactly one batch of an epoch.

Memory: about 60 bytes per selected request, 100 bytes per unit of the look-ahead, 256 MiB of
records read last, and up to `num_threads * (prefetch + 1) + 1` batches.  Events are
read only when their batch is filled.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from jaxtyping import Int

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.errors import UserError
from stca_jax.input.dataset import RequestIndex
from stca_jax.input.packing import balanced_order, ragged_arange
from stca_jax.input.planning import (
    PLANNER_VERSION,
    BatchPlan,
    InputConfig,
    Planner,
    Position,
    Units,
    select_requests,
)
from stca_jax.input.record_cache import RecordCache
from stca_jax.input.records import UserRecord
from stca_jax.schema import Schema

__all__ = [
    "Fill",
    "InputConfig",
    "InputElement",
    "RequestIterator",
    "count_batches",
    "count_steps",
    "epoch_fill",
    "make_input",
    "select_requests",
]


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


class InputElement(NamedTuple):
    """What the iterator yields.

    Attributes:
      batch: This process's rows of the global batch, NumPy arrays.
      fill: Of the global batch.
      state: Where to go on after this batch: the argument of `RequestIterator.set_state`.
    """

    batch: RequestBatch
    fill: Fill
    state: dict[str, Any]


def make_input(
    dataset: Dataset, config: InputConfig, *, process_index: int = 0, process_count: int = 1
) -> RequestIterator:
    """The batches of one process.

    Args:
      dataset: A prepared dataset.
      config: What to read and how to pack it.
      process_index: This process.
      process_count: Processes that share each global batch; divides `config.rows_per_batch`.

    Raises:
      ValueError: the config's filters leave no request, or the rows cannot be divided.
    """
    return RequestIterator(dataset, config, process_index, process_count)


def epoch_fill(dataset: Dataset, config: InputConfig, epoch: int = 0) -> Fill:
    """Rows, tokens and targets of a whole epoch, exactly, without reading a record.

    Plans the epoch, in a few microseconds per request.  Epochs differ a little, because lengths are
    drawn anew.  Use it to choose `row_length` and `targets_per_row`: what the fuller of the two
    leaves empty in the other is paid for.
    """
    planner = Planner(dataset.index, config)
    units = planner.units(epoch)
    rows = [row for w in range(planner.num_windows(epoch)) for row in planner.rows(epoch, w)]
    return _fill(units, rows, config)


def count_batches(
    dataset: Dataset, config: InputConfig, epoch: int = 0, at_most: int | None = None
) -> int:
    """Global batches of an epoch, exactly, up to `at_most`: it plans no further than that."""
    planner = Planner(dataset.index, config)
    num_rows = 0
    for window in range(planner.num_windows(epoch)):
        num_rows += len(planner.rows(epoch, window))
        if at_most is not None and num_rows >= at_most * config.rows_per_batch:
            return at_most
    return -(-num_rows // config.rows_per_batch)


def count_steps(
    dataset: Dataset, config: InputConfig, num_epochs: int, max_steps: int | None = None
) -> int:
    """Steps of a training: the batches of the first epoch, times the number of epochs.

    Plans the first epoch and no other.  Later epochs draw other lengths, and their batches differ
    by a few: the training ends with as many batches more or less of its last epoch.

    Args:
      dataset: A prepared dataset.
      config: Of its input.
      num_epochs: Passes over the requests.
      max_steps: Most steps; None is no limit.
    """
    steps = count_batches(dataset, config, at_most=max_steps) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)


def _fill(units: Units, rows: list[list[int]], config: InputConfig) -> Fill:
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


class RequestIterator(Iterator[InputElement]):
    """Yields `InputElement`s; made by `make_input`."""

    def __init__(
        self, dataset: Dataset, config: InputConfig, process_index: int, process_count: int
    ):
        """See `make_input`."""
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
        if config.rows_per_batch % process_count:
            raise UserError(
                f"rows_per_batch={config.rows_per_batch} cannot be divided among {process_count} "
                f"processes; make it a multiple of {process_count}"
            )
        self._dataset = dataset
        self._config = config
        self._planner = Planner(dataset.index, config)
        share = config.rows_per_batch // process_count
        shares = slice(process_index * share, (process_index + 1) * share)
        self._assembler = Assembler(dataset, self._planner, shares)
        self._position = Position()
        self._start()

    @property
    def num_requests(self) -> int:
        """Requests of an epoch, after the config's filters."""
        return len(self._planner.index)

    def __next__(self) -> InputElement:
        """The next batch.

        Raises:
          StopIteration: after the last epoch.
          ValueError: the iterator is closed.
        """
        if not self._elements:
            raise ValueError("the input is closed; set_state starts it again")
        batch, fill, self._position = next(self._elements[0])
        return InputElement(batch, fill, self.get_state())

    def get_state(self) -> dict[str, Any]:
        """Where to go on after the last batch yielded, as a small JSON-serialisable dict."""
        return {
            **dataclasses.asdict(self._position),
            "planner": PLANNER_VERSION,
            "config": _sequence_config(self._config),
            "fingerprint": dict(self._dataset.fingerprint),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, whatever the number of processes or threads then.

        Raises:
          ValueError: a record file, the config or the planner changed since then; says which.
        """
        # Versions before the second saved none.
        if (planner := state.get("planner", 1)) != PLANNER_VERSION:
            raise UserError(
                f"the run began with version {planner} of the input planner, which drew other "
                f"lengths and orders than this one, version {PLANNER_VERSION}: go on with the "
                "version of stca_jax that began it, or train anew in another --workdir (its "
                "checkpoints can be evaluated as they are)"
            )
        self._dataset.check_fingerprint(state["fingerprint"])
        here = _sequence_config(self._config)
        # Fields that came since then have the default, which is what was done before them.
        saved = {**{k: v for k, v in _DEFAULTS.items() if k in here}, **state["config"]}
        changed = [k for k in {**saved, **here} if saved.get(k) != here.get(k)]
        if changed:
            changes = ", ".join(f"{k}: {saved.get(k)} -> {here.get(k)}" for k in changed)
            raise UserError(
                f"the input position was saved with another input config ({changes}); restore "
                "that config, or start without the position"
            )
        fields = dataclasses.fields(Position)
        self._position = Position(**{f.name: state[f.name] for f in fields})
        self.close()
        self._start()

    def close(self) -> None:
        """Stops the threads; no batch can be asked for until `set_state`."""
        self._finalize()

    def _start(self) -> None:
        plans = _PlanDataset(self._planner, self._position).map(self._assembler)
        batches = grain.experimental.multithread_prefetch(
            plans, num_threads=self._config.num_threads, buffer_size=self._config.prefetch
        )
        self._elements = [iter(batches)]
        # At exit too: Grain's threads do not survive the end of the interpreter quietly.
        self._finalize = weakref.finalize(self, _close, self._elements)


def _close(elements: list[grain.DatasetIterator]) -> None:
    elements.pop().close()


_DEFAULTS = {
    f.name: f.default
    for f in dataclasses.fields(InputConfig)
    if f.default is not dataclasses.MISSING
}


def _sequence_config(config: InputConfig) -> dict[str, Any]:
    """The part of the config that the sequence of batches depends on, JSON-serialisable."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("num_threads", "prefetch", "epochs"):
        del fields[name]
    return {**fields, "length": repr(config.length)}


class _PlanDataset(grain.IterDataset):
    """The planner's batches as a Grain source, of which each of n threads takes every n-th."""

    def __init__(self, planner: Planner, position: Position):
        super().__init__()
        self._planner = planner
        self._position = position
        self._first, self._step = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's protocol for dividing a source among threads."""
        del sequential_slice
        self._first, self._step = sl.start, sl.step

    def __iter__(self) -> grain.DatasetIterator:
        """Starts at the position."""
        return _PlanIterator(self._planner.batches(self._position), self._first, self._step)


class _PlanIterator(grain.DatasetIterator):
    """Every `step`-th plan from the `first` on."""

    def __init__(self, plans: Iterator[BatchPlan], first: int, step: int):
        super().__init__()
        self._plans = plans
        self._skip = first
        self._step = step

    def __next__(self) -> BatchPlan:
        """The next plan."""
        for _ in range(self._skip):
            next(self._plans)
        self._skip = self._step - 1
        return next(self._plans)

    def get_state(self) -> dict[str, Any]:
        """Nothing: the position that outlives the number of threads is `RequestIterator`'s."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `get_state`."""


class Assembler:
    """Turns a plan into a batch: reads the records and fills this process's rows."""

    def __init__(self, dataset: Dataset, planner: Planner, rows: slice):
        """Fills `rows` of each global batch."""
        self._dataset = dataset
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
        )
        layout = _lay_out(units, rows)
        self._fill_slots(batch, layout)
        self._fill_features(batch, layout)
        return batch, _fill(units, plan.rows, config), plan.after

    def _fill_slots(self, batch: RequestBatch, layout: _Layout) -> None:
        """Fills what the request index knows, all slots at once."""
        index, request = self._index, layout.piece_request
        for name, values in (
            ("history_start", layout.piece_start),
            ("history_end", layout.piece_stop),
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
            _copy_events(batch, layout, unit, record)
            self._copy_targets(batch, layout, unit, record)

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
            target = np.repeat(first, count) + ragged_arange(count)
        slot = layout.first_slot[unit]
        slots = (layout.unit_row[unit], slice(slot, slot + total))
        batch.label[slots] = record.label[target]
        for name, column in batch.target.items():
            column[slots] = record.target[name][target]
        for name, column in batch.request.items():
            column[slots] = np.repeat(record.request[name][position], count)


def _copy_events(batch: RequestBatch, layout: _Layout, unit: int, record: UserRecord) -> None:
    first, size = layout.history_start[unit], layout.tokens[unit]
    events = slice(first, first + size)
    token = layout.first_token[unit]
    tokens = (layout.unit_row[unit], slice(token, token + size))
    batch.history_time[tokens] = record.event_time[events]
    for name, column in batch.history.items():
        column[tokens] = record.history[name][events]


class _Layout(NamedTuple):
    """Where the u units, p pieces and s targets of some rows stand.

    Attributes:
      unit_row: Row of each unit.
      tokens: Events of each unit.
      history_start: Its first event, in the user's log …
      first_token: … and in the row.
      first_slot: Its first target slot.
      first_piece: Its pieces are `[first_piece[u], first_piece[u + 1])`.
      piece_request: Request of each piece, in the planner's index.
      piece_first_target: First target within that request.
      piece_targets: Number of targets.
      piece_start: Start of its range in the row.
      piece_stop: End of its range.
      slot_piece: Piece of each target.
      slot_row: Row of each target.
      slot: Slot of each target.
    """

    unit_row: Int[np.ndarray, " u"]
    tokens: Int[np.ndarray, " u"]
    history_start: Int[np.ndarray, " u"]
    first_token: Int[np.ndarray, " u"]
    first_slot: Int[np.ndarray, " u"]
    first_piece: Int[np.ndarray, " u+1"]
    piece_request: Int[np.ndarray, " p"]
    piece_first_target: Int[np.ndarray, " p"]
    piece_targets: Int[np.ndarray, " p"]
    piece_start: Int[np.ndarray, " p"]
    piece_stop: Int[np.ndarray, " p"]
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
    history_start = units.history_start[unit]
    first_token = _sum_before(tokens, per_row)
    piece = np.repeat(units.first_piece[unit], num_pieces) + ragged_arange(num_pieces)
    piece_targets = units.piece_targets[piece]
    piece_row = np.repeat(unit_row, num_pieces)
    shift = np.repeat(first_token - history_start, num_pieces)
    slots_of_row = np.bincount(piece_row, piece_targets, len(rows)).astype(np.int64)
    return _Layout(
        unit_row=unit_row,
        tokens=tokens,
        history_start=history_start,
        first_token=first_token,
        first_slot=_sum_before(units.targets[unit], per_row),
        first_piece=np.append(0, np.cumsum(num_pieces)),
        piece_request=units.piece_request[piece],
        piece_first_target=units.piece_first_target[piece],
        piece_targets=piece_targets,
        piece_start=units.piece_start[piece] + shift,
        piece_stop=units.piece_stop[piece] + shift,
        slot_piece=np.repeat(np.arange(len(piece)), piece_targets),
        slot_row=np.repeat(piece_row, piece_targets),
        slot=ragged_arange(slots_of_row),
    )


def _sum_before(
    values: Int[np.ndarray, " n"], run_lengths: Int[np.ndarray, " runs"]
) -> Int[np.ndarray, " n"]:
    """Within each run of consecutive values, the sum of those before each."""
    before = np.append(0, np.cumsum(values))
    first = np.cumsum(run_lengths) - run_lengths
    return before[:-1] - np.repeat(before[first], run_lengths)
