"""Scores checkpoints of a run at several history lengths, beside simple references.

One checkpoint:

    python -m experiments.evaluate --workdir=/path/to/run --lengths=128,512,1024,2048,4096
        [--split=test] [--step=best|last|N] [--min_history=N] [--noreferences] [--data_dir=DIR]

prints a table and writes it to WORKDIR/evaluation/SPLIT-STEP.csv and .jsonl. The references score
the same targets: "counting" is how often the item occurs among the last L events, "logistic" a
regression on count features, fitted anew for each length on training requests, and "truth", on
synthetic_interests, the function that the labels were drawn from.

Every checkpoint, while the training goes on:

    python -m experiments.evaluate --workdir=/path/to/run --watch --lengths=512,2048,10240
        [--timeout=SECONDS] [--split=validation] [--min_history=N] [--noreferences]

adds each row to WORKDIR/evaluation/checkpoints.jsonl once, whatever is killed and started again,
and however many of these jobs share the run. On the validation split it marks the checkpoint that
is best by the config's `evaluation.metric` at the longest length, so that it is kept. It ends when
the training has. Exit status 1 says that something could not be scored; the log says what.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from data.preparation import prepare
from data.synthetic_interests import generator
from experiments import launch
from stca_jax.errors import UserError
from stca_jax.evaluation.checkpoint_watcher import CheckpointWatcher, RowLog, mark_best_checkpoint
from stca_jax.evaluation.evaluator import Row, evaluate_split, metric_rows
from stca_jax.evaluation.metrics import ranking_metrics
from stca_jax.evaluation.references import evaluate_references, labelled_views
from stca_jax.evaluation.tables import format_table, write_table
from stca_jax.experiment import EvaluationConfig, ExperimentConfig
from stca_jax.input.dataset import RequestDataset, RequestIndex
from stca_jax.input.pipeline import select_requests
from stca_jax.input.records import UserRecord
from stca_jax.training.checkpointing import Checkpointer, read_best
from stca_jax.training.distributed import is_main_process
from stca_jax.training.train_step import Program, TrainState
from stca_jax.training.trainer import count_steps, load_workdir_config, restore_for_evaluation

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
_REFERENCES = flags.DEFINE_bool("references", True, "Also score counting and logistic regression.")
_REFERENCE_TRAINING_REQUESTS = 12_000
_SHOWN = ("model", "length", "task", "auc", "gauc_user", "gauc_request", "log_loss", "calibration")
flags.adopt_module_key_flags(launch)
_log = logging.getLogger(__name__)


def main() -> int:
    """Evaluates one checkpoint, or each as it comes."""
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    return watch(workdir) if _WATCH.value else evaluate_once(workdir)


def evaluate_once(workdir: pathlib.Path) -> int:
    """Evaluates the checkpoint that --step names."""
    config = _config(workdir)
    step = _checkpoint_step(workdir)
    split = _SPLIT.value or "test"
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    selection = _selection(config, split)
    rows: list[Row] = []
    if _REFERENCES.value:
        rows += [{**selection, **row} for row in reference_rows(config, dataset, split)]
    for length in config.evaluation.lengths:
        started = time.perf_counter()
        predictions = evaluate_split(
            program,
            state,
            dataset,
            config,
            split=split,
            length=length,
            max_requests=config.evaluation.max_requests,
        )
        columns = {**selection, "step": step, "length": length, "model": "stca"}
        rows += metric_rows(predictions, dataset.schema.tasks, **columns)
        _log.info("length %d: %.1f s", length, time.perf_counter() - started)
    if not is_main_process():
        return 0
    directory = workdir / "evaluation"
    directory.mkdir(exist_ok=True)
    for suffix in (".csv", ".jsonl"):
        write_table(directory / f"{split}-{step}{suffix}", rows)
    print(f"{split} split, checkpoint {step}, {rows[-1]['num_targets']:,} targets of "
          f"{rows[-1]['num_requests']:,} requests")  # fmt: skip
    _print_table(rows)
    print(f"written to {directory}/{split}-{step}.csv and .jsonl")
    return 0


def watch(workdir: pathlib.Path) -> int:
    """Evaluates every checkpoint once, until the training has ended."""
    _wait_for(workdir / "config.json")
    config = _config(workdir)
    settings = config.evaluation
    split = _SPLIT.value or "validation"
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    selection = _selection(config, split)
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

        predictions = evaluate_split(
            *restored,
            dataset,
            config,
            split=split,
            length=length,
            max_requests=settings.max_requests,
        )
        tasks = dataset.schema.tasks
        return metric_rows(predictions, tasks, on_failure=on_failure, model="stca")

    watcher = CheckpointWatcher(
        workdir / "checkpoints",
        log,
        settings.lengths,
        selection,
        steps=Checkpointer(workdir).steps,
        restore=restore,
        score=score,
    )

    def mark_best() -> None:
        if split == "validation":
            mark_best_checkpoint(
                workdir,
                watcher.rows(),
                metric=settings.metric,
                length=max(settings.lengths),
                larger_is_better=settings.larger_is_better,
            )

    failures += watcher.run(
        num_steps=count_steps(config, dataset), timeout=_TIMEOUT.value, after_row=mark_best
    )
    if _REFERENCES.value:
        try:
            _add_references(log, config, dataset, split)
        except Exception as error:  # the rows of the checkpoints are there all the same
            failures.append(f"references: {error}")
            _log.error("%s", failures[-1])
    rows = [row for row in log.rows() if selection.items() <= row.items()]
    last = max((row["step"] for row in rows if "step" in row), default=None)
    shown = [row for row in rows if row.get("step", last) == last]
    print(f"{split} split, checkpoint {last}; all of them are in {workdir}/evaluation")
    _print_table(sorted(shown, key=lambda row: (row["model"], row["length"])))
    if failures:
        print("not scored:", *failures, sep="\n  ")
    return 1 if failures else 0


def reference_rows(config: ExperimentConfig, dataset: RequestDataset, split: str) -> list[Row]:
    """All references at every length, on the targets that the model is scored on."""
    settings = config.evaluation
    scored = select_requests(
        dataset.index,
        config.input.for_evaluation(
            split,
            max(settings.lengths),
            min_history=settings.min_history,
            max_requests=settings.max_requests,
        ),
    )
    train = select_requests(
        dataset.index,
        dataclasses.replace(config.input, split="train", max_requests=_REFERENCE_TRAINING_REQUESTS),
    )
    rows: list[Row] = []
    for k, task in enumerate(dataset.schema.tasks):
        named = {"task": task} if len(dataset.schema.tasks) > 1 else {}
        for row in evaluate_references(
            labelled_views(dataset, train, task=k),
            labelled_views(dataset, scored, task=k),
            settings.lengths,
        ):
            rows.append({**row, **named})
    rows.sort(key=lambda row: row["model"])
    if config.dataset.startswith("synthetic_interests"):
        rows += truth_rows(dataset, scored, settings.lengths)
    return rows


def truth_rows(
    dataset: RequestDataset, requests: RequestIndex, lengths: Sequence[int]
) -> list[Row]:
    """How well the labels' own function ranks, restricted to the last events of each length.

    Args:
      dataset: One of synthetic_interests.
      requests: Some of its requests, grouped by record.
      lengths: Numbers of most recent events.

    Returns:
      A row per length, without the metrics of likelihood: below the whole history the function
      ranks, but its sums shrink with the window.
    """
    config = generator.GeneratorConfig(**dataset.metadata["notes"]["generator"])
    catalogue = generator.make_catalogue(config)
    records = list(_records_of(dataset, requests))
    label = np.concatenate([record.label[:, 0] for record in records])
    num_targets = np.concatenate([np.diff(record.target_offset) for record in records])
    request_id = np.repeat(np.concatenate([r.request_id for r in records]), num_targets)
    user_id = np.concatenate([np.full(len(r.label), r.user_id) for r in records])
    rows = []
    for length in lengths:
        logit = [generator.true_logit(record, catalogue, length) for record in records]
        metrics = ranking_metrics(
            label, np.concatenate(logit).astype(np.float32), user_id, request_id
        )
        for name in ("log_loss", "calibration", "normalized_entropy"):
            del metrics[name]
        rows.append({"model": "truth", "length": length, **metrics})
    return rows


def _records_of(dataset: RequestDataset, requests: RequestIndex) -> Iterator[UserRecord]:
    """The users' records, cut down to the requests."""
    starts = np.flatnonzero(np.diff(requests.record, prepend=-1))
    for start, end in itertools.pairwise([*starts, len(requests)]):
        record = dataset.record(int(requests.record[start]))
        chosen = requests.position[start:end]
        num_targets = np.diff(record.target_offset)
        is_chosen = np.zeros(len(num_targets), bool)
        is_chosen[chosen] = True
        targets = np.repeat(is_chosen, num_targets)
        yield dataclasses.replace(
            record,
            request_id=record.request_id[chosen],
            request_time=record.request_time[chosen],
            request_split=record.request_split[chosen],
            history_end=record.history_end[chosen],
            target_offset=np.append(0, np.cumsum(num_targets[chosen])),
            request={name: values[chosen] for name, values in record.request.items()},
            target={name: values[targets] for name, values in record.target.items()},
            label=record.label[targets],
        )


def _add_references(
    log: RowLog, config: ExperimentConfig, dataset: RequestDataset, split: str
) -> None:
    """Adds the references' rows that the log lacks, unless another job is at it."""
    selection = _selection(config, split)
    with log.claim("-".join(map(str, [*selection.values(), "references"]))) as is_mine:
        done = {
            row["length"]
            for row in log.rows()
            if "step" not in row and selection.items() <= row.items()
        }
        missing = tuple(n for n in config.evaluation.lengths if n not in done)
        if is_mine and missing:
            settings = dataclasses.replace(config.evaluation, lengths=missing)
            rows = reference_rows(dataclasses.replace(config, evaluation=settings), dataset, split)
            log.add([{**selection, **row} for row in rows])


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


def _selection(config: ExperimentConfig, split: str) -> dict[str, Any]:
    """The columns that say which requests a row is of."""
    settings = config.evaluation
    return {
        "split": split,
        "min_history": settings.min_history,
        "max_requests": settings.max_requests,
    }


def _wait_for(path: pathlib.Path) -> None:
    """Waits for a file of a training that may start later than this job."""
    started = time.monotonic()
    while not path.exists():
        if _TIMEOUT.value is not None and time.monotonic() - started >= _TIMEOUT.value:
            raise UserError(f"no {path} in {_TIMEOUT.value:g} seconds; train into it")
        time.sleep(1)


def _print_table(rows: Sequence[Row]) -> None:
    print(format_table([{n: row[n] for n in _SHOWN if n in row} for row in rows]))


def _checkpoint_step(workdir: pathlib.Path) -> int:
    """The step that --step means."""
    steps = Checkpointer(workdir).steps()
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet")
    if _STEP.value == "last":
        return steps[-1]
    if _STEP.value == "best":
        best = read_best(workdir)
        return best["step"] if best and best["step"] in steps else steps[-1]
    if not _STEP.value.isdigit() or int(_STEP.value) not in steps:
        raise UserError(f"--step={_STEP.value}: give best, last or one of {steps}")
    return int(_STEP.value)


if __name__ == "__main__":
    launch.run(main)
