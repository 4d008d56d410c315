"""Scores a split of a dataset with one state of a model, at any history length."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from stca_jax.batch import RequestBatch
from stca_jax.evaluation.metrics import check_choice, ranking_metrics
from stca_jax.evaluation.tables import Row
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import RequestIterator, make_input
from stca_jax.input.planning import InputConfig
from stca_jax.training.distributed import is_main_process
from stca_jax.training.sharding import device_batch, input_share
from stca_jax.training.state import TrainState
from stca_jax.training.train_step import Predictions, Program

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which requests to score, and at which history lengths.

    Attributes:
      lengths: History lengths of the final evaluation, in events.
      min_history: Only requests with at least this many earlier events, whatever the length.
      max_requests: At most this many requests, drawn at random once; None is all of them.
      max_targets: Likewise requests of at most this many targets, on which the standard error
        depends.
      validation_length: History length of the validation at each checkpoint of a training run.
      validation_targets: That validation scores a sample of requests with at most so many targets,
        which its standard error depends on; None is all.
      validation_requests: Likewise at most so many requests.
      metric: Column that chooses the best checkpoint on the validation split.
      larger_is_better: Whether a larger value of the metric is better.
      patience: A training run ends early once so many validations in a row, one each
        `checkpoint.every_steps`, brought no better checkpoint; None goes on to the last step.
      extra_metrics: Metrics of one's own, functions of `metrics.ScoredTargets`, by import path.
    """

    lengths: tuple[int, ...] = (50, 100, 200, 500, 1_000, 2_000, 4_000)
    min_history: int = 0
    max_requests: int | None = None
    max_targets: int | None = None
    validation_length: int = 1_000
    validation_targets: int | None = 30_000
    validation_requests: int | None = None
    metric: str = "auc"
    larger_is_better: bool = True
    patience: int | None = None
    extra_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for lengths or numbers of requests below 1, or an unknown metric."""
        if not self.lengths or not all(n >= 1 for n in self.lengths):
            raise ValueError(f"lengths are {self.lengths}; give at least one, each at least 1")
        for name, least in {
            "min_history": 0, "max_requests": 1, "max_targets": 1, "validation_length": 1,
            "validation_requests": 1, "validation_targets": 1, "patience": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN is refused
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        check_choice(self.metric, larger_is_better=self.larger_is_better, own=self.extra_metrics)


def evaluate_split(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    config: InputConfig,
    *,
    split: str,
    length: int,
    **limits: int | None,
) -> Predictions:
    """Predictions of a split's requests at one history length.

    Args:
      program: The model's compiled functions; one compilation per length.
      state: Its parameters.
      dataset: A prepared dataset.
      config: How its requests are packed.
      split: "train", "validation" or "test".
      length: Events that each request may read, the most recent ones.
      **limits: `min_history`, `max_requests` and `max_targets` of `InputConfig`: which requests.
    """
    batches = _evaluation_batches(program, dataset, config, split, length, limits)
    shown = tqdm(
        batches,
        desc=f"Scoring {split} at length {length:,}",
        unit="batch",
        leave=False,
        delay=2,
        disable=None if is_main_process() else True,
    )
    return predict_all(program, state, (element.batch for element in shown))


def request_logits(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    config: InputConfig,
    *,
    split: str,
    length: int,
    **limits: int | None,
) -> Iterator[tuple[int, Float[np.ndarray, "m tasks"]]]:
    """The logits of `evaluate_split`, request by request, each with its id, in packed order.

    A request with more targets than a row has slots is cut into pieces, and left out.  Arguments as
    of `evaluate_split`; one process.
    """
    for element in _evaluation_batches(program, dataset, config, split, length, limits):
        batch = element.batch
        predictions = jax.device_get(
            program.predict(state, device_batch(batch, program.prediction_shardings))
        )
        for row, mask in enumerate(batch.target_mask):
            slots = np.flatnonzero(mask)
            ids = batch.request_id[row, slots]
            for piece in np.split(slots, np.flatnonzero(np.diff(ids)) + 1):
                if len(piece) and len(piece) == batch.num_request_targets[row, piece[0]]:
                    yield int(batch.request_id[row, piece[0]]), predictions.logit[row, piece]


def _evaluation_batches(
    program: Program,
    dataset: RequestDataset,
    config: InputConfig,
    split: str,
    length: int,
    limits: Mapping[str, int | None],
) -> RequestIterator:
    mesh = program.mesh
    share, num_shares = input_share(mesh)
    rows = rows_that_fit(config, length, mesh.shape["data"])
    return make_input(
        dataset,
        config.for_evaluation(split, length, rows_per_batch=rows, **limits),
        process_index=share,
        process_count=num_shares,
    )


def rows_that_fit(config: InputConfig, length: int, num_shares: int) -> int:
    """Rows of an evaluation's batch: no more tokens than a training batch, where rows are longer.

    Args:
      config: Of the training.
      length: Events that each request may read.
      num_shares: Devices that rows are divided over; each holds a row at least.
    """
    rows = config.rows_per_batch * config.row_length // max(length, config.row_length)
    return max(rows // num_shares, 1) * num_shares


def predict_all(
    program: Program, state: TrainState, batches: Iterable[RequestBatch]
) -> Predictions:
    """Predictions of every valid target, one batch in flight while the next is prepared.

    Args:
      program: The model's compiled functions.
      state: Its parameters.
      batches: Host batches of this process, all of one shape.

    Returns:
      NumPy arrays over the N valid targets: logit and label [N, tasks], the others [N].
    """
    fetched = [
        Predictions(*(values[p.target_mask] for values in p))
        for p in _fetched(program, state, batches)
    ]
    if not fetched:
        raise ValueError("there are no requests to evaluate: relax the split or min_history")
    return Predictions(*(np.concatenate(values) for values in zip(*fetched, strict=True)))


def _fetched(
    program: Program, state: TrainState, batches: Iterable[RequestBatch]
) -> Iterator[Predictions]:
    running: Predictions | None = None
    for batch in batches:
        started = program.predict(state, device_batch(batch, program.prediction_shardings))
        if running is not None:
            yield jax.device_get(running)
        running = started
    if running is not None:
        yield jax.device_get(running)


def selection_columns(config: EvaluationConfig, split: str) -> dict[str, Any]:
    """The columns that say which requests a row of results is of."""
    return {"split": split, **selection_limits(config)}


def selection_limits(config: EvaluationConfig) -> dict[str, Any]:
    """Which requests of a split are scored, as `evaluate_split` and `for_evaluation` take it."""
    names = ("min_history", "max_requests", "max_targets")
    return {name: getattr(config, name) for name in names}


def validation_limits(config: EvaluationConfig) -> dict[str, Any]:
    """Likewise, of the validation at a training's checkpoints."""
    return {
        "min_history": config.min_history,
        "max_requests": config.validation_requests,
        "max_targets": config.validation_targets,
    }


def score_lengths(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    input_config: InputConfig,
    config: EvaluationConfig,
    *,
    split: str,
    step: int,
) -> list[Row]:
    """Rows of ranking metrics of one checkpoint, at every length of `config`."""
    rows: list[Row] = []
    for length in config.lengths:
        started = time.perf_counter()
        predictions = evaluate_split(
            program,
            state,
            dataset,
            input_config,
            split=split,
            length=length,
            **selection_limits(config),
        )
        columns = {**selection_columns(config, split), "step": step, "length": length}
        tasks, own = dataset.schema.tasks, config.extra_metrics
        rows += metric_rows(predictions, tasks, own=own, **columns, model="stca")
        _log.info("length %d: %.1f s", length, time.perf_counter() - started)
    return rows


def metric_rows(
    predictions: Predictions,
    tasks: tuple[str, ...],
    *,
    own: Sequence[str] = (),
    on_failure: Callable[[str, Exception], None] | None = None,
    **columns: Any,
) -> list[Row]:
    """One row of ranking metrics per task, over the targets that have a label of it.

    Args:
      predictions: From `predict_all`.
      tasks: Names of the tasks; a column "task" is added if there are several.
      own: Import paths of further metrics.
      on_failure: See `ranking_metrics`.
      **columns: Put first in each row, such as `model="stca"`.
    """
    rows: list[Row] = []
    for k, task in enumerate(tasks):
        known = ~np.isnan(predictions.label[:, k])
        metrics = ranking_metrics(
            predictions.label[known, k],
            predictions.logit[known, k],
            predictions.user_id[known],
            predictions.request_id[known],
            own=own,
            on_failure=on_failure,
        )
        named = {"task": task} if len(tasks) > 1 else {}
        rows.append({**columns, **named, **metrics})
    return rows
