"""A config to begin with on any dataset, from the numbers of its request index.

A starting point: lengths and rows follow the histories, epochs the number of steps.  What is better
on a dataset, only its validation says.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.length import BetaLength, LengthConfig, UniformLength
from stca_jax.input.pipeline import epoch_fill
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import similarity_config
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.train_step import TrainingConfig

LONGEST = 10_240  # events of a window
_COVERED = 0.99  # share of requests whose whole history fits into the longest window
_ENOUGH_STEPS, _MOST_EPOCHS = 1_500, 10
_VALIDATIONS, _PATIENCE = 12, 3


def recommended_config(dataset: RequestDataset, name: str) -> ExperimentConfig:
    """Windows, rows, steps and evaluation that suit a dataset; the model is `similarity_config`.

    Windows reach the 99th percentile of the requests' histories, in rows a little longer,
    whose targets fill as their tokens do.  Epochs are repeated up to 1,500 steps, and end early
    where validation no longer improves.

    Args:
      dataset: A prepared dataset.
      name: By which `prepare` finds it.

    Raises:
      UserError: the dataset has no training request.
    """
    if not len(dataset.index.of_split("train")):
        raise UserError(f"{name} has no training request: let validation and test begin later")
    earlier = int(np.quantile(dataset.index.history_end, _COVERED, method="higher"))
    longest = min(max(_round_up(earlier, 8), 16), LONGEST)
    inputs, steps = _input(dataset, longest)
    epochs = min(math.ceil(_ENOUGH_STEPS / steps), _MOST_EPOCHS)
    total = steps * epochs
    return ExperimentConfig(
        dataset=name,
        input=inputs,
        model=similarity_config(),
        optimizer=OptimizerConfig(
            table_learning_rate=0.01, warmup_steps=min(100, max(total // 10, 1))
        ),
        training=TrainingConfig(num_epochs=epochs, ema_decay=0.98),
        evaluation=EvaluationConfig(
            lengths=_lengths(longest), validation_length=longest, patience=_PATIENCE
        ),
        checkpoint=CheckpointConfig(every_steps=max(total // _VALIDATIONS, 1)),
    )


def _input(dataset: RequestDataset, longest: int) -> tuple[InputConfig, int]:
    """Rows that hold several windows, and as many targets as come with a row of tokens.

    Returns:
      The config, and about how many batches an epoch has.
    """
    row_length = _round_up(max(longest * 9 // 8, 2_048), 512)
    most = InputConfig(
        length=_length(longest),
        row_length=row_length,
        targets_per_row=row_length,
        targets_per_chunk=256,
        rows_per_batch=1,
        rows="user",
    )
    fill = epoch_fill(dataset, most)
    targets = _round_up(math.ceil(row_length * fill.targets / max(fill.tokens, 1)), 64)
    targets = min(max(targets, 256), row_length)
    steps = max(fill.tokens / row_length, fill.targets / targets)
    return dataclasses.replace(most, targets_per_row=targets), math.ceil(steps)


def _length(longest: int) -> LengthConfig:
    """Short windows by far the most, now and then a whole one; of short histories, any length."""
    if longest <= 512:
        return UniformLength(minimum=8, maximum=longest)
    return BetaLength(minimum=8, maximum=longest, average=max(longest // 5, 256), alpha=0.25)


def _lengths(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, … from a hundredth of the longest on, and the longest."""
    steps = [m * 10**k for k in range(5) for m in (1, 2, 5)]
    return (*(n for n in steps if max(longest // 100, 1) <= n < longest), longest)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
