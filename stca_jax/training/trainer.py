"""The training loop: one function to read from top to bottom."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import pathlib
import signal
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stca_jax import config as config_lib
from stca_jax.batch import empty_batch
from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import evaluate_split, metric_rows
from stca_jax.evaluation.tables import read_json_lines
from stca_jax.experiment import FREE_TO_CHANGE, ExperimentConfig
from stca_jax.files import write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import InputElement, count_batches, make_input
from stca_jax.schema import Schema
from stca_jax.training.checkpointing import Checkpointer, mark_best, read_best
from stca_jax.training.distributed import SharedSignal, is_main_process
from stca_jax.training.flops import chip_of, model_flops
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.training.monitoring import PhaseClock, Profiler, device_memory
from stca_jax.training.sharding import MeshConfig, device_batch, input_share, make_mesh
from stca_jax.training.train_step import Program, StepMetrics, TrainingConfig, TrainState

_MOST_SKIPPED = 50  # steps in a row; a run that skips more learns nothing
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
        or a step diverged and `training.on_divergence` is "stop" (or fifty in a row did).
    """
    check_workdir(workdir, config)
    num_steps = count_steps(config, dataset)
    program = experiment_program(config, dataset.schema, num_steps)
    mesh = program.batch_shardings.history_time.mesh
    share, num_shares = input_share(mesh)
    endless = dataclasses.replace(config.input, epochs=None)  # training.num_epochs ends the run
    batches = make_input(dataset, endless, process_index=share, process_count=num_shares)
    save_config(workdir, config)  # only now: what cannot run leaves no trace
    checkpointer = Checkpointer(workdir, config.checkpoint)
    restored = checkpointer.restore_latest(program.abstract_state)
    if restored is None:
        step, state = 0, program.initialize()
    else:
        step, state, position = restored
        batches.set_state(position)
        _log.info("restored step %d of %s", step, workdir)
    lacks_validation = (
        step > 0 and _is_due(config, step, num_steps) and not _validated(workdir, step)
    )
    if step >= num_steps and not lacks_validation:
        _log.info("the run in %s is finished: %d of %d steps", workdir, step, num_steps)
        checkpointer.close()
        return TrainingResult(step, num_steps)

    _log.info("step %d of %d; the first step is compiled before it runs", step, num_steps)
    shared_signal = SharedSignal(mesh)
    recent = _RecentSteps(config, dataset.schema, num_shares)
    clock = recent.clock
    with (
        MetricsWriter(
            workdir,
            start_step=step,
            total_steps=num_steps,
            wandb=config.wandb,
            config=config_lib.flatten(config),
            is_main_process=is_main_process(),
        ) as writer,
        _Signals() as signals,
        Profiler(config.profile, workdir) as profiler,
        jax.transfer_guard("disallow"),
    ):
        stopped_by = None
        if lacks_validation:  # the run ended between saving this checkpoint and scoring it
            validate(config, dataset, program, state, step, workdir, writer)
            clock.lap("validation")
        while step < num_steps and stopped_by is None:
            element = next(batches)
            clock.lap("input")
            with profiler.step(step + 1, state):
                batch = device_batch(element.batch, program.batch_shardings)
                state, metrics = program.train_step(state, batch)
            step += 1
            recent.add(step, metrics, element)
            writer.show_step(step)
            stopped_by = shared_signal.agree(signals.received)
            if step == num_steps:
                stopped_by = None
            due = _is_due(config, step, num_steps)
            is_saving = due or stopped_by is not None
            recent.report(writer, everything=is_saving)
            clock.lap("step")
            if is_saving:
                writer.flush()  # a power loss leaves no checkpoint without the metrics before it
                checkpointer.save(state, step, element.state)
                clock.lap("checkpoint")
            if due and stopped_by is None:
                validate(config, dataset, program, state, step, workdir, writer)
                clock.lap("validation")
        checkpointer.close()
        batches.close()
    return TrainingResult(step, num_steps, stopped_by)


def check_workdir(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Checks that checkpoints in a workdir are of the same experiment.

    Raises:
      UserError: listing the fields that differ, other than those in `FREE_TO_CHANGE`.
    """
    if not (workdir / "config.json").exists() or not any((workdir / "checkpoints").glob("*")):
        return
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


def save_config(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Writes WORKDIR/config.json."""
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config_lib.to_dict(config))


def _is_due(config: ExperimentConfig, step: int, num_steps: int) -> bool:
    """Whether a checkpoint is saved and scored after that step."""
    return step % config.checkpoint.every_steps == 0 or step == num_steps


def _validated(workdir: pathlib.Path, step: int) -> bool:
    """Whether the metrics have the validation of that step."""
    return any(
        line["step"] == step and any(name.startswith("validation/") for name in line)
        for line in read_json_lines(workdir / "metrics.jsonl")
    )


def load_workdir_config(workdir: pathlib.Path) -> ExperimentConfig:
    """The config that `train` saved, in this or an older version.

    Raises:
      UserError: there is none, or it has fields that are no more.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json); train into it first")
    data, filled = config_lib.fill_missing(ExperimentConfig, json.loads(path.read_text()))
    if filled:
        _log.info("%s is of an older version; taken as before: %s", path, ", ".join(filled))
    return config_lib.from_dict(ExperimentConfig, data)


def count_steps(config: ExperimentConfig, dataset: RequestDataset) -> int:
    """Steps of the whole run: plans its epochs, without reading a record."""
    num_steps = 0
    for epoch in range(config.training.num_epochs):
        num_steps += count_batches(dataset, config.input, epoch)
        if config.training.max_steps and num_steps >= config.training.max_steps:
            return config.training.max_steps
    return num_steps


def experiment_program(
    config: ExperimentConfig, schema: Schema, num_steps: int, mesh: Mesh | None = None
) -> Program:
    """The experiment's compiled functions.

    Args:
      config: The experiment.
      schema: Of its dataset.
      num_steps: Length of the learning-rate schedule.
      mesh: By default the configured one, of all devices.

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
    return Program(
        config.model,
        schema,
        config.optimizer,
        config.training,
        mesh or make_mesh(config.mesh),
        shapes,
        num_steps=num_steps,
        seed=config.seed,
    )


def restore_for_evaluation(
    config: ExperimentConfig, dataset: RequestDataset, workdir: pathlib.Path, step: int
) -> tuple[Program, TrainState]:
    """The program of a run and the state of one of its checkpoints, on this process's devices.

    These may be other devices than the training's: where its mesh does not fit them, rows are
    divided over all of them.

    Raises:
      UserError: the checkpoint is of another model, or of other data than the dataset.
    """
    try:
        mesh = make_mesh(config.mesh)
    except UserError:
        mesh = make_mesh(MeshConfig())
    # What a training batch is cut into says nothing of evaluation, which makes batches of its own.
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, accumulate_steps=1),
        input=dataclasses.replace(config.input, rows_per_batch=mesh.shape["data"]),
    )
    program = experiment_program(config, dataset.schema, num_steps=1, mesh=mesh)
    checkpointer = Checkpointer(workdir)
    state, position = checkpointer.restore(step, program.abstract_state)
    checkpointer.close()
    dataset.check_fingerprint(position["fingerprint"])
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
        numbers[f"{prefix}/length"] = settings.validation_length
        writer.write(step, numbers)
    value = float(np.mean([row[settings.metric] for row in rows]))
    _log.info("step %d: validation %s %.4f", step, settings.metric, value)
    best = read_best(workdir)
    is_followed = best is not None and "@" in best["metric"]  # an evaluation job marks better ones
    if is_main_process() and not is_followed:
        mark_best(workdir, step, settings.metric, value, larger_is_better=settings.larger_is_better)


class _Step(NamedTuple):
    """What the host remembers of a step until its metrics are fetched."""

    step: int
    metrics: StepMetrics
    element: InputElement


def _has_ended(step: _Step) -> bool:
    return step.metrics.loss.is_ready()  # type: ignore[attr-defined]  # in C++, unknown to mypy


class _RecentSteps:
    """Steps whose metrics are still on the device.

    A window of steps is fetched when the next one is full, so that fetching waits for no step.

    Attributes:
      clock: Of the loop; its laps since the last report are averaged over the steps reported.
    """

    def __init__(self, config: ExperimentConfig, schema: Schema, num_shares: int):
        self.clock = PhaseClock()
        self._num_shares = num_shares  # of a global batch, of which this process reads one
        self._training = config.training
        self._flops = model_flops(config.model, schema, config.input.targets_per_row)
        self._steps: collections.deque[_Step] = collections.deque()
        self._timed_step = 0  # the last one whose time has been reported
        self._num_skipped = 0  # in a row

    def add(self, step: int, metrics: StepMetrics, element: InputElement) -> None:
        """Remembers a step that was started, and of its batch what is reported."""
        batch = element.batch.replace(
            history={}, target={}, request={}, history_time=element.batch.history_time[:, :0]
        )
        self._steps.append(_Step(step, metrics, element._replace(batch=batch)))

    def report(self, writer: MetricsWriter, *, everything: bool) -> None:
        """Writes the mean of each full window, once it is one window old, or of all that is left.

        Raises:
          UserError: a step diverged, or where they are skipped `_MOST_SKIPPED` in a row; names the
            step and its requests.
        """
        size = self._training.log_every_steps
        windows: list[list[_Step]] = []
        while self._steps and (everything or len(self._steps) >= 2 * size):
            windows.append([self._steps.popleft() for _ in range(min(size, len(self._steps)))])
        summaries = [self._summarise(window) for window in windows]
        if not windows:
            return
        # Windows reported together are timed together: the first of them ended unseen.
        self.clock.lap("step")
        timed = self._ended_since(windows)
        fills = [s.element.fill for s in timed]
        speed = writer.progress(
            windows[-1][-1].step,
            loss=summaries[-1].get("train/loss"),
            steps=len(timed),
            tokens=sum(fill.tokens for fill in fills),
            targets=sum(fill.targets for fill in fills),
        )
        timing = self._timing(timed, is_compiled=bool(speed))
        for window, summary in zip(windows, summaries, strict=True):
            writer.write(window[-1].step, summary | speed | timing)

    def _ended_since(self, windows: list[list[_Step]]) -> list[_Step]:
        """Steps that ended since the last report: not those of its windows, if the device is quick.

        Else the last windows of a run would seem faster, and the first after a checkpoint slower.
        """
        reported = [step for window in windows for step in window]
        others = itertools.takewhile(_has_ended, self._steps)
        timed = [s for s in (*reported, *others) if s.step > self._timed_step]
        self._timed_step = max([self._timed_step, *(s.step for s in timed)])
        return timed

    def _summarise(self, window: list[_Step]) -> dict[str, float]:
        """Means over the steps of a window that were not skipped."""
        fetched = jax.device_get([s.metrics for s in window])
        diverged = [bool(m.diverged) for m in fetched]
        is_skipping = self._training.on_divergence == "skip"
        for step, metrics in zip(window, fetched, strict=True):
            self._num_skipped = self._num_skipped + 1 if metrics.diverged else 0
            if metrics.diverged and (not is_skipping or self._num_skipped == _MOST_SKIPPED):
                raise UserError(
                    _describe_divergence(step, metrics, self._training, self._num_skipped)
                )
        kept = [m for m in fetched if not m.diverged]
        scalars = [m.scalars() for m in kept]
        columns = {n: [s[n] for s in scalars] for n in (scalars[0] if scalars else ())}
        fills = [s.element.fill.metrics() for s in window]
        columns |= {n: [f[n] for f in fills] for n in fills[0]}
        summary = {f"train/{name}": float(np.mean(values)) for name, values in columns.items()}
        if is_skipping:
            summary["train/skipped_steps"] = sum(diverged)
        return summary

    def _timing(self, timed: list[_Step], *, is_compiled: bool) -> dict[str, float]:
        """Where the time since the last report went, per step, and what the devices made of it."""
        laps = self.clock.take()
        timing = {
            f"train/{phase}_seconds": laps.get(phase, 0.0) / max(1, len(timed))
            for phase in ("input", "step", "checkpoint", "validation")
        }
        if is_compiled:
            flops = sum(self._flops_of(step) for step in timed)
            rate = flops / (laps["input"] + laps["step"])
            timing["speed/model_flops_per_second"] = rate
            devices = jax.devices()
            if chip := chip_of(devices[0].device_kind):
                timing["speed/model_flops_utilization"] = rate / (chip.flops * len(devices))
        return timing | device_memory(jax.local_devices())

    def _flops_of(self, step: _Step) -> float:
        """Of the global batch; every share of it is taken to have as long ranges as ours."""
        batch, fill = step.element.batch, step.element.fill
        lengths = np.where(batch.target_mask, batch.history_end - batch.history_start, 0.0)
        pairs = lengths.sum() * self._num_shares
        of_requests = lengths * (lengths + 1) / (2 * batch.num_request_targets)
        token_pairs = of_requests.sum() * self._num_shares
        return self._flops.train_step(fill.tokens, fill.targets, pairs, token_pairs)


def _describe_divergence(
    step: _Step, metrics: StepMetrics, training: TrainingConfig, num_skipped: int
) -> str:
    batch = step.element.batch
    ids = np.unique(batch.request_id[batch.target_mask]).tolist()
    shown = ", ".join(map(str, ids[:20])) + (", …" if len(ids) > 20 else "")
    exceeds = training.max_gradient_norm and training.max_gradient_norm < metrics.gradient_norm
    what = (
        f"exceeds max_gradient_norm {training.max_gradient_norm:g}" if exceeds else "is not finite"
    )
    if num_skipped > 1:
        what += f", nor was any of the {num_skipped - 1} steps before it usable"
    return (
        f"step {step.step} {what} (loss {metrics.loss:.4g}, gradient norm "
        f"{metrics.gradient_norm:.4g}, of tables {metrics.table_gradient_norm:.4g}, parameter norm "
        f"{metrics.parameter_norm:.4g}); training "
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
        _log.warning("%s: saving a checkpoint as soon as possible", self.received.name)
