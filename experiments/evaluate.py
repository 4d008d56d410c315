"""Scores a checkpoint of a run at several history lengths, beside two references.

python -m experiments.evaluate --workdir=/path/to/run --lengths=128,512,1024,2048,4096
    [--split=test] [--step=best|last|N] [--min_history=N] [--noreferences] [--data_dir=DIR]

Prints a table and writes it to WORKDIR/evaluation/SPLIT-STEP.csv and .jsonl. The references score
the same targets: "counting" is how often the item occurs among the last L events, "logistic" a
regression on count features, fitted anew for each length on training requests.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from typing import Any

from absl import flags

from data.preparation import prepare
from experiments import launch
from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import Row, evaluate_split, metric_rows
from stca_jax.evaluation.references import evaluate_references, labelled_views
from stca_jax.evaluation.tables import format_table, write_table
from stca_jax.experiment import EvaluationConfig, ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import select_requests
from stca_jax.training.checkpointing import Checkpointer, read_best
from stca_jax.training.trainer import load_workdir_config, restore_for_evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_LENGTHS = flags.DEFINE_list("lengths", None, "History lengths; by default the config's.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which requests.")
_STEP = flags.DEFINE_string("step", "best", "best, last, or the step of a checkpoint.")
_MIN_HISTORY = flags.DEFINE_integer(
    "min_history", None, "Only requests with at least so many earlier events."
)
_REFERENCES = flags.DEFINE_bool("references", True, "Also score counting and logistic regression.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where prepared datasets lie; by default in the user's cache directory."
)
_REFERENCE_TRAINING_REQUESTS = 12_000
_SHOWN = ("model", "length", "task", "auc", "gauc_user", "gauc_request", "log_loss", "calibration")
flags.adopt_module_key_flags(launch)
_log = logging.getLogger(__name__)


def main() -> None:
    """Evaluates one checkpoint."""
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    config = load_workdir_config(workdir)
    settings = _evaluation_settings(config.evaluation)
    config = dataclasses.replace(config, evaluation=settings)
    step = _checkpoint_step(workdir)
    dataset = RequestDataset(prepare(config.dataset, _DATA_DIR.value))
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    rows: list[Row] = []
    if _REFERENCES.value:
        rows += reference_rows(config, dataset)
    for length in settings.lengths:
        started = time.perf_counter()
        predictions = evaluate_split(
            program,
            state,
            dataset,
            config,
            split=_SPLIT.value,
            length=length,
            max_requests=settings.max_requests,
        )
        rows += metric_rows(predictions, dataset.schema.tasks, model="stca", length=length)
        _log.info("length %d: %.1f s", length, time.perf_counter() - started)
    directory = workdir / "evaluation"
    directory.mkdir(exist_ok=True)
    for suffix in (".csv", ".jsonl"):
        write_table(directory / f"{_SPLIT.value}-{step}{suffix}", rows)
    print(f"{_SPLIT.value} split, checkpoint {step}, {rows[-1]['num_targets']:,} targets of "
          f"{rows[-1]['num_requests']:,} requests")  # fmt: skip
    print(format_table([{n: row[n] for n in _SHOWN if n in row} for row in rows]))
    print(f"written to {directory}/{_SPLIT.value}-{step}.csv and .jsonl")


def reference_rows(config: ExperimentConfig, dataset: RequestDataset) -> list[Row]:
    """Both references at every length, on the targets that the model is scored on."""
    settings = config.evaluation
    test = select_requests(
        dataset.index,
        config.input.for_evaluation(
            _SPLIT.value,
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
            labelled_views(dataset, test, task=k),
            settings.lengths,
        ):
            rows.append({**row, **named})
    return sorted(rows, key=lambda row: row["model"])


def _evaluation_settings(settings: EvaluationConfig) -> EvaluationConfig:
    changes: dict[str, Any] = {}
    if _LENGTHS.value is not None:
        try:
            changes["lengths"] = tuple(int(length) for length in _LENGTHS.value)
        except ValueError:
            raise UserError(f"--lengths={','.join(_LENGTHS.value)}: give integers") from None
    if _MIN_HISTORY.value is not None:
        changes["min_history"] = _MIN_HISTORY.value
    try:
        return dataclasses.replace(settings, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None


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
