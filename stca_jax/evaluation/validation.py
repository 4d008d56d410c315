"""The validation of a training run at each of its checkpoints."""

from __future__ import annotations

import logging
import math
import pathlib
from collections.abc import Sequence

from stca_jax.evaluation.best import Criterion, mark_best, read_mark, score
from stca_jax.evaluation.evaluator import (
    EvaluationConfig,
    evaluate_split,
    metric_rows,
    validation_limits,
)
from stca_jax.evaluation.tables import Row
from stca_jax.files import read_json_lines
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import InputConfig, select_requests
from stca_jax.training.distributed import is_main_process, on_all_processes
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.training.state import TrainState
from stca_jax.training.train_step import Program

_log = logging.getLogger(__name__)

_KNOWS_NOTHING = 0.9995  # normalized entropy: the mean label has 1


class Validation:
    """Scores the validation split at one length, and marks the best checkpoint."""

    def __init__(
        self,
        dataset: RequestDataset,
        input_config: InputConfig,
        config: EvaluationConfig,
        workdir: pathlib.Path,
        every_steps: int,
    ):
        """See `stca_jax.evaluation.evaluator`; the workdir gets best.json.

        Args:
          dataset: Of the training.
          input_config: How requests are packed.
          config: Which are scored.
          workdir: Of the run.
          every_steps: Steps from one validation to the next.

        Raises:
          UserError: no request of the split has `config.min_history` earlier events.
        """
        scored = input_config.for_evaluation(
            "validation", config.validation_length, min_history=config.min_history
        )
        select_requests(dataset.index, scored)
        self._dataset = dataset
        self._input = input_config
        self._config = config
        self._workdir = workdir
        self._every_steps = every_steps

    def run(self, program: Program, state: TrainState, step: int, writer: MetricsWriter) -> bool:
        """Scores the state of a step, writes its metrics, and marks it if it is the best.

        Args:
          program: The model's compiled functions.
          state: After `step` steps.
          step: Names the checkpoint.
          writer: Gets one line per task, "validation/auc" or "validation/TASK/auc".

        Returns:
          See `has_run_out`.
        """
        config = self._config
        predictions = evaluate_split(
            program,
            state,
            self._dataset,
            self._input,
            split="validation",
            length=config.validation_length,
            **validation_limits(config),
        )
        rows = metric_rows(predictions, self._dataset.schema.tasks, own=config.extra_metrics)
        for row in rows:
            prefix = "/".join(["validation", *([row["task"]] if "task" in row else [])])
            numbers = {f"{prefix}/{n}": v for n, v in row.items() if n != "task"}
            numbers[f"{prefix}/length"] = config.validation_length
            writer.write(step, numbers)
            if row["normalized_entropy"] > _KNOWS_NOTHING:
                _log.warning(
                    "step %d: %s is hardly better than the mean label (normalized entropy %.4f); "
                    "a model that knew more before has collapsed: lower the optimizer's "
                    "learning_rate, or set its weight_decay to 0.1",
                    step,
                    prefix,
                    row["normalized_entropy"],
                )
        value = score(rows, config.metric)
        if value is None:
            _log.warning(
                "step %d: no task has a validation %s; its checkpoint is not marked as the best",
                step,
                config.metric,
            )
        else:
            _log.info("step %d: validation %s %s", step, config.metric, _describe(value, rows))
        if is_main_process():
            mark_best(self._workdir, {step: value}, self._criterion)
        return self.has_run_out(step)

    @property
    def _criterion(self) -> Criterion:
        config = self._config
        return Criterion(
            config.metric,
            "validation",
            config.validation_length,
            config.larger_is_better,
            **validation_limits(config),
        )

    def has_run_out(self, step: int) -> bool:
        """Whether `patience` is at its end after a step; the main process decides for all."""
        patience = self._config.patience
        if patience is None:
            return False
        best = read_mark(self._workdir, self._criterion) if is_main_process() else None
        has_run_out = best is not None and step - best["step"] >= patience * self._every_steps
        return not on_all_processes(not has_run_out)

    def has_run(self, step: int) -> bool:
        """Whether the metrics have the validation of that step."""
        return any(
            line["step"] == step and any(name.startswith("validation/") for name in line)
            for line in read_json_lines(self._workdir / "metrics.jsonl")
        )


def _describe(value: float, rows: Sequence[Row]) -> str:
    """The value, and how far chance may have moved the AUC of the targets that were scored."""
    several = len(rows) > 1
    errors = [
        f"{row['task']} {row['auc']:.4f} +- {row['auc_se']:.4f}"
        if several
        else f"standard error of the AUC {row['auc_se']:.4f}"
        for row in rows
        if math.isfinite(row["auc_se"])
    ]
    targets = f"{rows[0]['num_targets']:,} targets of {rows[0]['num_requests']:,} requests"
    shown = ("AUC of " if several and errors else "") + ", ".join([*errors, targets])
    return f"{value:.4f} ({shown})"
