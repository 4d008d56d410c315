"""What studies of many runs share: how a run is scored, and that all are scored alike."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import score_lengths
from stca_jax.evaluation.tables import write_table
from stca_jax.experiment import ExperimentConfig
from stca_jax.files import write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.length_study.results import SCORES
from stca_jax.workdir import restore_for_evaluation


def scored_config(config: ExperimentConfig, base: ExperimentConfig) -> ExperimentConfig:
    """The config of a run as it is scored: in the rows that all share, if its model can."""
    if config.model.needs_exclusive_history:
        return config
    return dataclasses.replace(config, input=base.input)


def score(
    config: ExperimentConfig, dataset: RequestDataset, directory: pathlib.Path, step: int
) -> None:
    """Scores a checkpoint on the test split at every length; the table appears when all are."""
    program, state = restore_for_evaluation(config, dataset, directory, step)
    rows = score_lengths(
        program, state, dataset, config.input, config.evaluation, split="test", step=step
    )
    (directory / SCORES).parent.mkdir(exist_ok=True)
    write_table(directory / SCORES, rows)


def check_evaluation(workdir: pathlib.Path, base: ExperimentConfig) -> None:
    """Writes what all runs are scored on, or checks that it is the same.

    Raises:
      UserError: it differs, so that rows would not compare.
    """
    path = workdir / "evaluation.json"
    settings = json.loads(json.dumps(dataclasses.asdict(base.evaluation)))
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    stored = json.loads(path.read_text())
    changed = [f"{n}: {stored.get(n)} -> {v}" for n, v in settings.items() if stored.get(n) != v]
    if changed:
        raise UserError(
            f"points in {workdir} were scored otherwise ({'; '.join(changed)}), and would not "
            "compare: use the same evaluation, or another --workdir"
        )
