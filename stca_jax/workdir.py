"""The working directory of a run: its config, and its checkpoints as others read them.

WORKDIR/
config.json                the config of the run
checkpoints/               see `stca_jax.training.checkpointing`
metrics.jsonl, events.*    see `stca_jax.training.metrics_writer`
best.json                  see `stca_jax.evaluation.best`
evaluation/                see `experiments.evaluate`
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.experiment import FREE_TO_CHANGE, ExperimentConfig, experiment_program
from stca_jax.files import write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.distributed import is_main_process
from stca_jax.training.sharding import MeshConfig, make_mesh
from stca_jax.training.train_step import Program, TrainState

_log = logging.getLogger(__name__)


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
    with Checkpointer(workdir) as checkpointer:
        state, position = checkpointer.restore(step, program.abstract_state)
    dataset.check_fingerprint(position["fingerprint"])
    return program, state
