"""The training loop: one function to read from top to bottom."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from stca_jax import config as config_lib
from stca_jax.batch import empty_batch
from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import evaluate_split, metric_rows
from stca_jax.experiment import FREE_TO_CHANGE, ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import InputElement, count_batches, make_input
from stca_jax.schema import Schema
from stca_jax.training.checkpointing import Checkpointer, mark_best, write_json
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.training.sharding import device_batch, make_mesh
from stca_jax.training.train_step import Program, StepMetrics, TrainState, make_program

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended.

    Attributes:
      step: Steps taken in all.
      num_steps: Steps of the whole run; more than `step` after an interruption.
      signal: The signal that interrupted the run, if one did.
    """

    step: int
    num_steps: int
    signal: signal.Signals | None = None


def train(
    config: ExperimentConfig, dataset: RequestDataset, workdir: pathlib.Path
) -> TrainingResult:
    """Trains to the end, or goes on from the latest checkpoint of `workdir`.

    Args:
      config: The experiment.
      dataset: The prepared dataset that the config names.
      workdir: Created if missing; see `stca_jax.training.checkpointing` for what it holds.

    Raises:
      UserError: the workdir belongs to another config, a record file is damaged, the disk is full,
        or a step is not finite.
    """
    claim_workdir(workdir, config)
    batches = make_input(
        dataset,
        config.input,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    num_steps = count_steps(config, dataset)
    program = experiment_program(config, dataset.schema, num_steps)
    checkpointer = Checkpointer(workdir, config.checkpoint)
    restored = checkpointer.restore_latest(program.abstract_state)
    if restored is None:
        step, state = 0, program.initialize()
    else:
        step, state, position = restored
        batches.set_state(position)
        _log.info("restored step %d of %s", step, workdir)
    if step >= num_steps:
        _log.info("the run in %s is finished: %d of %d steps", workdir, step, num_steps)
        checkpointer.close()
        return TrainingResult(step, num_steps)

    recent = _RecentSteps(config.training.log_every_steps)
    with (
        MetricsWriter(
            workdir,
            start_step=step,
            total_steps=num_steps,
            wandb=config.wandb,
            config=config_lib.flatten(config),
            is_main_process=jax.process_index() == 0,
        ) as writer,
        _Signals() as signals,
        jax.transfer_guard("disallow"),
    ):
        stopped_by = None
        while step < num_steps and stopped_by is None:
            started = time.perf_counter()
            element = next(batches)
            waited = time.perf_counter() - started
            batch = device_batch(element.batch, program.batch_shardings)
            state, metrics = program.train_step(state, batch)
            step += 1
            recent.add(step, metrics, element, waited)
            recent.report(writer)
            stopped_by = signals.received if step < num_steps else None
            due = step % config.checkpoint.every_steps == 0 or step == num_steps
            if due or stopped_by is not None:
                recent.report(writer, everything=True)
                checkpointer.save(state, step, element.state)
            if due and stopped_by is None:
                validate(config, dataset, program, state, step, workdir, writer)
        checkpointer.close()
        batches.close()
    return TrainingResult(step, num_steps, stopped_by)


def claim_workdir(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Saves the config into a new workdir, or checks that the workdir is of the same experiment.

    Raises:
      UserError: listing the fields that differ, other than those in `FREE_TO_CHANGE`.
    """
    path = workdir / "config.json"
    if path.exists():
        stored = load_workdir_config(workdir)
        differences = [
            line for line in config_lib.diff(stored, config) if not line.startswith(FREE_TO_CHANGE)
        ]
        if differences:
            listed = "\n  ".join(differences)
            raise UserError(
                f"{workdir} holds a run of another config (there -> now):\n  {listed}\n"
                "Use the same values to go on with it, or another --workdir"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, config_lib.to_dict(config))


def load_workdir_config(workdir: pathlib.Path) -> ExperimentConfig:
    """The config that `train` saved.

    Raises:
      UserError: there is none.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json); train into it first")
    return config_lib.from_dict(ExperimentConfig, json.loads(path.read_text()))


def count_steps(config: ExperimentConfig, dataset: RequestDataset) -> int:
    """Steps of the whole run: plans its epochs, without reading a record."""
    num_steps = 0
    for epoch in range(config.training.num_epochs):
        num_steps += count_batches(dataset, config.input, epoch)
        if config.training.max_steps and num_steps >= config.training.max_steps:
            return config.training.max_steps
    return num_steps


def experiment_program(config: ExperimentConfig, schema: Schema, num_steps: int) -> Program:
    """The experiment's compiled functions, on a mesh of all devices.

    Args:
      config: The experiment.
      schema: Of its dataset.
      num_steps: Length of the learning-rate schedule.

    Raises:
      UserError: the mesh does not fit the devices, the batch or the model.
    """
    shapes = empty_batch(
        schema,
        config.input.rows_per_batch,
        config.input.row_length,
        config.input.targets_per_row,
        shared_history=config.input.rows == "user",
    )
    return make_program(
        config.model,
        schema,
        config.optimizer,
        make_mesh(config.mesh),
        shapes,
        num_steps=num_steps,
        seed=config.seed,
        loss_weighting=config.training.loss_weighting,
    )


def restore_for_evaluation(
    config: ExperimentConfig, dataset: RequestDataset, workdir: pathlib.Path, step: int
) -> tuple[Program, TrainState]:
    """The program of a run and the state of one of its checkpoints, on this process's devices."""
    program = experiment_program(config, dataset.schema, num_steps=1)
    checkpointer = Checkpointer(workdir)
    state, _ = checkpointer.restore(step, program.abstract_state)
    checkpointer.close()
    return program, state


def validate(
    config: ExperimentConfig,
    dataset: RequestDataset,
    program: Program,
    state: TrainState,
    step: int,
    workdir: pathlib.Path,
    writer: MetricsWriter,
) -> None:
    """Scores the validation split at one length, and marks the checkpoint if it is the best."""
    settings = config.evaluation
    predictions = evaluate_split(
        program,
        state,
        dataset,
        config,
        split="validation",
        length=settings.validation_length,
        max_requests=settings.validation_requests,
    )
    rows = metric_rows(predictions, dataset.schema.tasks)
    for row in rows:
        prefix = "/".join(["validation", *([row["task"]] if "task" in row else [])])
        numbers = {f"{prefix}/{n}": v for n, v in row.items() if n != "task"}
        writer.write(step, numbers)
    value = float(np.mean([row[settings.metric] for row in rows]))
    _log.info("step %d: validation %s %.4f", step, settings.metric, value)
    mark_best(workdir, step, settings.metric, value, larger_is_better=settings.larger_is_better)


class _Step(NamedTuple):
    """What the host remembers of a step until its metrics are fetched."""

    step: int
    metrics: StepMetrics
    element: InputElement
    input_seconds: float


class _RecentSteps:
    """Steps whose metrics are still on the device.

    A window of steps is fetched when the next one is full, so that fetching waits for no step.
    """

    def __init__(self, window: int):
        self._window = window
        self._steps: collections.deque[_Step] = collections.deque()

    def add(self, step: int, metrics: StepMetrics, element: InputElement, waited: float) -> None:
        """Remembers a step that was started, after waiting so many seconds for its batch."""
        self._steps.append(_Step(step, metrics, element, waited))

    def report(self, writer: MetricsWriter, *, everything: bool = False) -> None:
        """Writes the mean of each full window, once it is one window old, or of all that is left.

        Raises:
          UserError: a step is not finite; names the step and its requests.
        """
        while self._steps and (everything or len(self._steps) >= 2 * self._window):
            size = min(self._window, len(self._steps))
            window = [self._steps.popleft() for _ in range(size)]
            fetched = jax.device_get([s.metrics for s in window])
            for s, metrics in zip(window, fetched, strict=True):
                if not np.isfinite(metrics).all():
                    raise UserError(_describe_divergence(s, metrics))
            summary = _summarise(window, fetched)
            speed = writer.progress(
                window[-1].step,
                loss=summary["train/loss"],
                tokens=sum(s.element.fill.tokens for s in window),
                targets=sum(s.element.fill.targets for s in window),
            )
            writer.write(window[-1].step, summary | speed)


def _summarise(window: list[_Step], fetched: list[StepMetrics]) -> dict[str, float]:
    """Means over a window of steps."""
    columns = {n: [getattr(m, n) for m in fetched] for n in StepMetrics._fields}
    fills = [s.element.fill.metrics() for s in window]
    columns |= {n: [f[n] for f in fills] for n in fills[0]}
    columns["input_seconds"] = [s.input_seconds for s in window]
    return {f"train/{name}": float(np.mean(values)) for name, values in columns.items()}


def _describe_divergence(step: _Step, metrics: StepMetrics) -> str:
    batch = step.element.batch
    ids = np.unique(batch.request_id[batch.target_mask]).tolist()
    shown = ", ".join(map(str, ids[:20])) + (", …" if len(ids) > 20 else "")
    return (
        f"step {step.step} is not finite (loss {metrics.loss:.4g}, gradient norm "
        f"{metrics.gradient_norm:.4g}, parameter norm {metrics.parameter_norm:.4g}); training "
        f"stopped, and the last checkpoint is from before it. The batch held {len(ids)} requests "
        f"with ids {shown}. Look for odd feature "
        "values there, lower optimizer.learning_rate, or lower optimizer.clip_norm"
    )


class _Signals:
    """Remembers SIGTERM and SIGINT while the loop runs, instead of dying within a step."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> _Signals:
        handled = (signal.SIGTERM, signal.SIGINT)
        self._previous = {s: signal.signal(s, self._remember) for s in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        del frame
        self.received = signal.Signals(number)
        _log.warning("%s: saving a checkpoint after this step", self.received.name)
