"""Scores checkpoints of a run at several history lengths, beside simple references.

One checkpoint:

    python -m stca_jax.experiments.evaluate --workdir=/path/to/run --lengths=128,512,1024,2048,4096
        [--split=test] [--step=best|last|N] [--min_history=N] [--noreferences]
        [--reference_targets=N] [--data_dir=DIR]

prints a table and adds it to WORKDIR/evaluation/SPLIT-STEP.csv and .jsonl, where rows of other
lengths or filters stay. The references score
the same targets: "counting" is how often the item occurs among the last L events, "logistic" a
regression and "boosted" trees on count features and label rates, fitted anew for each length on
--reference_targets training targets and kept with the dataset, and "truth", on
synthetic_interests, the function that the labels were drawn from.

Every checkpoint, while the training goes on:

    python -m stca_jax.experiments.evaluate --workdir=/path/to/run --watch --lengths=512,2048,10240
        [--timeout=SECONDS] [--split=validation] [--min_history=N] [--noreferences]

adds each row to WORKDIR/evaluation/checkpoints.jsonl once, whatever is killed and started again,
and however many of these jobs share the run. On the validation split it marks the checkpoint that
is best by the config's `evaluation.metric` at the longest length, so that it is kept. It ends when
the training has. Exit status 1 says that something could not be scored; the log says what.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.errors import UserError, first_line
from stca_jax.evaluation.best import Criterion
from stca_jax.evaluation.checkpoint_watcher import CheckpointWatcher, RowLog, mark_best_checkpoint
from stca_jax.evaluation.evaluator import (
    EvaluationConfig,
    Row,
    evaluate_split,
    metric_rows,
    score_lengths,
    selection_columns,
    selection_limits,
)
from stca_jax.evaluation.references.scoring import ReferenceOptions
from stca_jax.evaluation.tables import add_rows, format_table, write_table
from stca_jax.experiment import ExperimentConfig, count_steps
from stca_jax.experiments import launch
from stca_jax.experiments.reference_rows import reference_rows
from stca_jax.input.dataset import RequestDataset
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.distributed import is_main_process
from stca_jax.training.state import TrainState
from stca_jax.training.train_step import Program
from stca_jax.workdir import checkpoint_step, load_workdir_config, restore_for_evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_LENGTHS = flags.DEFINE_list("lengths", None, "History lengths; by default the config's.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "validation", "test"],
    "Which requests; by default test, or with --watch validation.",
)
_STEP = flags.DEFINE_string("step", "best", "best, last, or the step of a checkpoint.")
_WATCH = flags.DEFINE_bool("watch", False, "Score every checkpoint, as the training writes them.")
_TIMEOUT = flags.DEFINE_float(
    "timeout", None, "With --watch: end after so many seconds without a new checkpoint.", 0.0
)
_MIN_HISTORY = flags.DEFINE_integer(
    "min_history", None, "Only requests with at least so many earlier events."
)
_REFERENCES = flags.DEFINE_bool("references", True, "Also score what simple references reach.")
_REFERENCE_TARGETS = flags.DEFINE_integer(
    "reference_targets",
    300_000,
    "Fit the references on so many training targets; 0 takes all.",
    lower_bound=0,
)
_SHOWN = (
    "model", "length", "task", "auc", "auc_se",
    "gauc_user", "gauc_request", "log_loss", "calibration",
)  # fmt: skip
_log = logging.getLogger(__name__)


def main() -> int:
    """Evaluates one checkpoint, or each as it comes."""
    workdir = launch.local_path("workdir", _WORKDIR.value)
    if _WATCH.value and jax.process_count() > 1:
        raise UserError("--watch is one process: leave out --coordinator and --distributed")
    return watch(workdir) if _WATCH.value else evaluate_once(workdir)


def evaluate_once(workdir: pathlib.Path) -> int:
    """Evaluates the checkpoint that --step names."""
    config = _config(workdir)
    step = checkpoint_step(workdir, _STEP.value)
    split = _SPLIT.value or "test"
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    selection = selection_columns(config.evaluation, split)
    rows: list[Row] = []
    failure = ""
    notes: list[str] = []
    if _REFERENCES.value:
        try:
            with launch.working("Scoring the references"):
                found = reference_rows(config, dataset, split, _reference_options(), notes.append)
            rows += [{**selection, **row} for row in found]
        except Exception as error:  # the model is scored all the same
            failure = f"references: {first_line(error)}"
            _log.error("%s", failure)
    rows += score_lengths(
        program, state, dataset, config.input, config.evaluation, split=split, step=step
    )
    if not is_main_process():
        return 0
    directory = workdir / "evaluation"
    directory.mkdir(exist_ok=True)
    # Rows of other lengths or filters stay, and those of the same are replaced.
    keys = (*selection, "model", "task", "step", "length")
    table = add_rows(directory / f"{split}-{step}.jsonl", rows, keys)
    write_table(directory / f"{split}-{step}.csv", table)
    print(f"{split} split, checkpoint {step}, {rows[-1]['num_targets']:,} targets of "
          f"{rows[-1]['num_requests']:,} requests")  # fmt: skip
    _print_table(rows)
    if notes:
        print(*notes, sep="\n")
    if failure:
        print("not scored:", failure, sep="\n  ")
    print(f"results are in {directory}/{split}-{step}.csv and .jsonl")
    return 1 if failure else 0


def watch(workdir: pathlib.Path) -> int:
    """Evaluates every checkpoint once, until the training has ended."""
    _wait_for(workdir / "config.json")
    config = _config(workdir)
    settings = config.evaluation
    split = _SPLIT.value or "validation"
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    selection = selection_columns(config.evaluation, split)
    log = RowLog(workdir / "evaluation" / "checkpoints.jsonl")
    program: Program | None = None  # one for all checkpoints, so that each length compiles once
    failures: list[str] = []

    def restore(step: int) -> tuple[Program, TrainState]:
        nonlocal program
        if program is None:
            program, state = restore_for_evaluation(config, dataset, workdir, step)
        else:
            checkpointer = Checkpointer(workdir)
            state, _ = checkpointer.restore(step, program.abstract_state)
            checkpointer.close()
        return program, state

    def score(restored: tuple[Program, TrainState], step: int, length: int) -> list[Row]:
        def on_failure(metric: str, error: Exception) -> None:
            failures.append(f"checkpoint {step} at length {length}: {metric}: {error}")
            _log.error("%s", failures[-1])

        program, state = restored
        predictions = evaluate_split(
            program,
            state,
            dataset,
            config.input,
            split=split,
            length=length,
            **selection_limits(settings),
        )
        tasks = dataset.schema.tasks
        own = settings.extra_metrics
        return metric_rows(predictions, tasks, own=own, on_failure=on_failure, model="stca")

    watcher = CheckpointWatcher(
        workdir / "checkpoints",
        log,
        settings.lengths,
        selection,
        steps=Checkpointer(workdir).steps,
        restore=restore,
        score=score,
    )

    longest, limits = max(settings.lengths), selection_limits(settings)
    criterion = Criterion(settings.metric, split, longest, settings.larger_is_better, **limits)

    def mark_best() -> None:
        if split == "validation":
            mark_best_checkpoint(workdir, watcher.rows(), criterion)

    failures += watcher.run(
        num_steps=count_steps(config, dataset), timeout=_TIMEOUT.value, after_row=mark_best
    )
    if _REFERENCES.value:
        try:
            with launch.working("Scoring the references"):
                _add_references(log, config, dataset, split)
        except Exception as error:  # the rows of the checkpoints are there all the same
            failures.append(f"references: {error}")
            _log.error("%s", failures[-1])
    rows = [row for row in log.rows() if selection.items() <= row.items()]
    last = max((row["step"] for row in rows if "step" in row), default=None)
    shown = [row for row in rows if row.get("step", last) == last]
    print(f"{split} split, checkpoint {last}")
    _print_table(sorted(shown, key=lambda row: (row["model"], row["length"])))
    if failures:
        print("not scored:", *failures, sep="\n  ")
    print(f"rows of all checkpoints are in {workdir}/evaluation/checkpoints.jsonl")
    return 1 if failures else 0


def _add_references(
    log: RowLog, config: ExperimentConfig, dataset: RequestDataset, split: str
) -> None:
    """Adds the references' rows that the log lacks, unless another job is at it."""
    selection = selection_columns(config.evaluation, split)
    with log.claim("-".join(map(str, [*selection.values(), "references"]))) as is_mine:
        done = {
            row["length"]
            for row in log.rows()
            if "step" not in row and selection.items() <= row.items()
        }
        missing = tuple(n for n in config.evaluation.lengths if n not in done)
        if is_mine and missing:
            settings = dataclasses.replace(config.evaluation, lengths=missing)
            config = dataclasses.replace(config, evaluation=settings)
            rows = reference_rows(config, dataset, split, _reference_options(), _log.info)
            log.add([{**selection, **row} for row in rows])


def _reference_options() -> ReferenceOptions:
    return ReferenceOptions(max_training_targets=_REFERENCE_TARGETS.value or None)


def _config(workdir: pathlib.Path) -> ExperimentConfig:
    """The run's config, with the evaluation that the flags describe."""
    config = load_workdir_config(workdir)
    changes: dict[str, Any] = {}
    if _LENGTHS.value is not None:
        try:
            changes["lengths"] = tuple(int(length) for length in _LENGTHS.value)
        except ValueError:
            raise UserError(f"--lengths={','.join(_LENGTHS.value)}: give integers") from None
    if _MIN_HISTORY.value is not None:
        changes["min_history"] = _MIN_HISTORY.value
    try:
        settings: EvaluationConfig = dataclasses.replace(config.evaluation, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None
    return dataclasses.replace(config, evaluation=settings)


def _wait_for(path: pathlib.Path) -> None:
    """Waits for a file of a training that may start later than this job."""
    started = time.monotonic()
    if not path.exists():
        _log.info("waiting for %s", path)
    while not path.exists():
        if _TIMEOUT.value is not None and time.monotonic() - started >= _TIMEOUT.value:
            raise UserError(f"no {path} in {_TIMEOUT.value:g} seconds; train into it")
        time.sleep(1)


def _print_table(rows: Sequence[Row]) -> None:
    print(format_table([{n: row[n] for n in _SHOWN if n in row} for row in rows]))


if __name__ == "__main__":
    launch.run(
        main,
        when_interrupted="with --watch all finished rows are kept; the same command goes on",
    )
