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
from typing import Any, NamedTuple

import grain

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.input.assembly import Assembler, Dataset, Fill, fill_of
from stca_jax.input.planning import (
    PLANNER_VERSION,
    BatchPlan,
    InputConfig,
    Planner,
    Position,
)


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
    dataset: Dataset,
    config: InputConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    with_unlabelled: bool = False,
) -> RequestIterator:
    """The batches of one process.

    Args:
      dataset: A prepared dataset.
      config: What to read and how to pack it.
      process_index: This process.
      process_count: Processes that share each global batch; divides `config.rows_per_batch`.
      with_unlabelled: Batches have `history_unlabelled`.

    Raises:
      ValueError: the config's filters leave no request, or the rows cannot be divided.
    """
    return RequestIterator(dataset, config, process_index, process_count, with_unlabelled)


def epoch_fill(dataset: Dataset, config: InputConfig, epoch: int = 0) -> Fill:
    """Rows, tokens and targets of a whole epoch, exactly, without reading a record.

    Plans the epoch, in a few microseconds per request.  Epochs differ a little, because lengths are
    drawn anew.  Use it to choose `row_length` and `targets_per_row`: what the fuller of the two
    leaves empty in the other is paid for.
    """
    planner = Planner(dataset.index, config)
    units = planner.units(epoch)
    rows = [row for w in range(planner.num_windows(epoch)) for row in planner.rows(epoch, w)]
    return fill_of(units, rows, config)


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


class RequestIterator(Iterator[InputElement]):
    """Yields `InputElement`s; made by `make_input`."""

    def __init__(
        self,
        dataset: Dataset,
        config: InputConfig,
        process_index: int,
        process_count: int,
        with_unlabelled: bool,
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
        self._assembler = Assembler(dataset, self._planner, shares, with_unlabelled=with_unlabelled)
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
