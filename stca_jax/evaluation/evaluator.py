"""Scores a split of a dataset with one state of a model, at any history length."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from stca_jax.batch import RequestBatch
from stca_jax.evaluation.metrics import ranking_metrics
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import InputConfig, make_input
from stca_jax.training.distributed import is_main_process
from stca_jax.training.sharding import device_batch, input_share
from stca_jax.training.train_step import Predictions, Program, TrainState

Row = dict[str, Any]
_log = logging.getLogger(__name__)


def evaluate_split(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    config: ExperimentConfig,
    *,
    split: str,
    length: int,
    max_requests: int | None,
    max_targets: int | None = None,
) -> Predictions:
    """Predictions of a split's requests at one history length.

    Args:
      program: The model's compiled functions; one compilation per length.
      state: Its parameters.
      dataset: A prepared dataset.
      config: How its requests are packed, and which of them are evaluated.
      split: "train", "validation" or "test".
      length: Events that each request may read, the most recent ones.
      max_requests: Only a sample of so many requests, the same at each call; None is all of them.
      max_targets: Likewise, only so many requests as have so many targets.
    """
    mesh = program.batch_shardings.history_time.mesh
    share, num_shares = input_share(mesh)
    batches = make_input(
        dataset,
        config.input.for_evaluation(
            split,
            length,
            min_history=config.evaluation.min_history,
            max_requests=max_requests,
            max_targets=max_targets,
            rows_per_batch=rows_that_fit(config.input, length, mesh.shape["data"]),
        ),
        process_index=share,
        process_count=num_shares,
    )
    shown = tqdm(
        batches,
        desc=f"Scoring {split} at length {length:,}",
        unit="batch",
        leave=False,
        delay=2,
        disable=None if is_main_process() else True,
    )
    return predict_all(program, state, (element.batch for element in shown))


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
        started = program.predict(state, device_batch(batch, program.batch_shardings))
        if running is not None:
            yield jax.device_get(running)
        running = started
    if running is not None:
        yield jax.device_get(running)


def selection_columns(config: ExperimentConfig, split: str) -> dict[str, Any]:
    """The columns that say which requests a row of results is of."""
    settings = config.evaluation
    return {
        "split": split,
        "min_history": settings.min_history,
        "max_requests": settings.max_requests,
    }


def score_lengths(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    config: ExperimentConfig,
    *,
    split: str,
    step: int,
) -> list[Row]:
    """Rows of ranking metrics of one checkpoint, at every length of `config.evaluation`."""
    rows: list[Row] = []
    for length in config.evaluation.lengths:
        started = time.perf_counter()
        predictions = evaluate_split(
            program, state, dataset, config,
            split=split, length=length, max_requests=config.evaluation.max_requests,
        )  # fmt: skip
        columns = {**selection_columns(config, split), "step": step, "length": length}
        rows += metric_rows(predictions, dataset.schema.tasks, **columns, model="stca")
        _log.info("length %d: %.1f s", length, time.perf_counter() - started)
    return rows


def metric_rows(
    predictions: Predictions,
    tasks: tuple[str, ...],
    *,
    on_failure: Callable[[str, Exception], None] | None = None,
    **columns: Any,
) -> list[Row]:
    """One row of ranking metrics per task.

    Args:
      predictions: From `predict_all`.
      tasks: Names of the tasks; a column "task" is added if there are several.
      on_failure: See `ranking_metrics`.
      **columns: Put first in each row, such as `model="stca"`.
    """
    rows = []
    for k, task in enumerate(tasks):
        metrics = ranking_metrics(
            predictions.label[:, k],
            predictions.logit[:, k],
            predictions.user_id,
            predictions.request_id,
            on_failure=on_failure,
        )
        named = {"task": task} if len(tasks) > 1 else {}
        rows.append({**columns, **named, **metrics})
    return rows
