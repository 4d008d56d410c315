"""The training loop: one function to read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import signal
from collections.abc import Callable

import jax

from stca_jax import config as config_lib
from stca_jax.allocator import keep_freed_memory
from stca_jax.evaluation.best import marked_steps
from stca_jax.evaluation.validation import Validation
from stca_jax.experiment import (
    ExperimentConfig,
    count_steps,
    experiment_program,
    training_input,
)
from stca_jax.input.dataset import RequestDataset
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.distributed import is_main_process
from stca_jax.training.flops import model_flops
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.training.monitoring import Profiler
from stca_jax.training.progress import Progress
from stca_jax.training.recent_steps import RecentSteps
from stca_jax.training.sharding import device_batch, input_share
from stca_jax.training.signals import SharedSignal, Signals
from stca_jax.workdir import check_workdir, locked, save_config, start_or_resume

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended.

    Attributes:
      step: Steps taken in all.
      num_steps: Steps of the whole run; more than `step` after an interruption, or where
        `evaluation.patience` ended it.
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
      UserError: a value of the config is none, another process trains into the workdir, its path
        cannot hold checkpoints, it belongs to another config, a record file is damaged, the disk is
        full, or a step diverged and `training.on_divergence` is "stop" (or fifty in a row did).
    """
    config_lib.validate(config)  # it may have been made in Python
    with locked(workdir) as check_lock:
        return _train(config, dataset, workdir, check_lock)


def _train(
    config: ExperimentConfig,
    dataset: RequestDataset,
    workdir: pathlib.Path,
    check_lock: Callable[[], None],
) -> TrainingResult:
    check_workdir(workdir, config)
    keep_freed_memory()
    validation = Validation(
        dataset, config.input, config.evaluation, workdir, config.checkpoint.every_steps
    )
    num_steps = count_steps(config, dataset)
    program = experiment_program(config, dataset.schema, num_steps)
    share, num_shares = input_share(program.mesh)
    batches = training_input(config, dataset, share, num_shares)
    save_config(workdir, config)  # only now: what cannot run leaves no trace
    with (
        contextlib.closing(batches),
        Checkpointer(
            workdir, config.checkpoint, kept=lambda: marked_steps(workdir)
        ) as checkpointer,
    ):
        step, state = start_or_resume(config, dataset, checkpointer, program, batches)
        is_due = functools.partial(config.checkpoint.is_due, num_steps=num_steps)
        lacks_validation = step > 0 and is_due(step) and not validation.has_run(step)
        is_over = step >= num_steps
        if not lacks_validation and (is_over or validation.has_run_out(step)):
            _log.info("the run in %s is finished: %d of %d steps", workdir, step, num_steps)
            return TrainingResult(step, num_steps)

        _log.info("step %d of %d; the first step is compiled before it runs", step, num_steps)
        shared_signal = SharedSignal(program.mesh)
        flops = model_flops(config.model, dataset.schema, *config.input.row_shape)
        is_main = is_main_process()
        with (
            MetricsWriter(
                workdir,
                start_step=step,
                wandb=config.wandb,
                config=config_lib.flatten(config),
                is_main_process=is_main,
            ) as writer,
            Progress(step, num_steps, is_shown=is_main) as progress,
            Signals() as signals,
            Profiler(config.profile, workdir) as profiler,
            jax.transfer_guard("disallow"),
        ):
            recent = RecentSteps(config.training, flops, num_shares, writer, progress)
            clock = recent.clock
            stopped_by = None
            if lacks_validation:  # the run ended between saving this checkpoint and scoring it
                is_over = validation.run(program, state, step, writer) or is_over
                clock.lap("validation")
            while not is_over and stopped_by is None:
                element = next(batches)
                clock.lap("input")
                with profiler.step(step + 1, state):
                    batch = device_batch(element.batch, program.batch_shardings)
                    state, metrics = program.train_step(state, batch)
                step += 1
                recent.add(step, metrics, element)
                stopped_by = shared_signal.agree(signals.received)
                is_over = step == num_steps
                if is_over:
                    stopped_by = None
                is_saving = is_due(step) or stopped_by is not None
                recent.report(everything=is_saving)
                clock.lap("step")
                if is_saving:
                    check_lock()
                    writer.flush()  # a power loss leaves no checkpoint without the metrics before
                    checkpointer.save(state, step, element.state)
                    clock.lap("checkpoint")
                if is_due(step) and stopped_by is None:
                    is_over = validation.run(program, state, step, writer) or is_over
                    clock.lap("validation")
        return TrainingResult(step, num_steps, stopped_by)
