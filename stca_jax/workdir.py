"""The working directory of a run: its config, its lock, and its checkpoints as others read them.

    WORKDIR/
      config.json                the config of the run
      training.lock              while a training runs; see `stca_jax.lock`
      checkpoints/               see `stca_jax.training.checkpointing`
      metrics.jsonl, events.*    see `stca_jax.training.metrics_writer`
      best.json                  see `stca_jax.evaluation.best`
      evaluation/                see `experiments.evaluate`

Any local path will do, but for some characters that `check_path` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.evaluation.best import read_best
from stca_jax.experiment import (
    FREE_TO_CHANGE,
    ExperimentConfig,
    experiment_program,
    initial_state,
)
from stca_jax.files import local_path, write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import RequestIterator
from stca_jax.lock import WorkdirLock
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.distributed import is_main_process, on_all_processes
from stca_jax.training.sharding import MeshConfig, make_mesh
from stca_jax.training.state import TrainState
from stca_jax.training.train_step import Program

_log = logging.getLogger(__name__)


_WILDCARDS = "*?[]\\"  # Orbax lists a checkpoint's files by patterns
_LONGEST_PATH = 4_096 - 400  # bytes; a checkpoint's files lie below


def check_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory that a path names, if checkpoints can be written there and read again.

    Raises:
      UserError: it has a scheme, is empty or too long, or holds a character that does not work.
    """
    local = local_path("work directory", path)
    absolute = str(local.absolute())
    wrong = sorted(set(absolute) & set(_WILDCARDS))
    if wrong:
        raise UserError(
            f"checkpoints in {absolute!r} could not be read again, because of {' '.join(wrong)} in "
            "the path: use a directory without the characters * ? [ ] \\"
        )
    try:
        size = len(absolute.encode())
    except UnicodeEncodeError:
        raise UserError(f"{absolute!r} is not valid Unicode: use another directory") from None
    if size > _LONGEST_PATH:
        raise UserError(
            f"the path {absolute[:60]}… has {size} bytes, and those of checkpoints would exceed "
            f"what the system allows: use one of at most {_LONGEST_PATH}"
        )
    return local


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps other trainings out of a work directory; the main process of a job holds the lock.

    Yields:
      Called before writing: raises UserError if another training took the directory over.

    Raises:
      UserError: another process trains into it, or the path cannot hold checkpoints.
    """
    check_path(workdir)
    lock = WorkdirLock(workdir)
    error: UserError | OSError | None = None
    with contextlib.ExitStack() as held:
        if is_main_process():
            try:
                held.enter_context(lock)
            except (UserError, OSError) as raised:
                error = raised
        if not on_all_processes(error is None):
            raise error or UserError(f"the main process cannot train into {workdir}; it says why")
        yield lock.check if is_main_process() else lambda: None


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


def start_or_resume(
    config: ExperimentConfig,
    dataset: RequestDataset,
    checkpointer: Checkpointer,
    program: Program,
    batches: RequestIterator,
) -> tuple[int, TrainState]:
    """The step and state that a training goes on from; the batches that follow are set to come."""
    restored = checkpointer.restore_latest(program.abstract_state)
    if restored is None:
        return 0, initial_state(config, dataset, program)
    step, state, position = restored
    batches.set_state(position)
    _log.info("restored step %d of %s", step, checkpointer.workdir)
    return step, state


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


def checkpoint_step(workdir: pathlib.Path, wanted: str) -> int:
    """The step of the checkpoint that a --step flag means.

    Args:
      workdir: Of the run.
      wanted: "best", "last" or a step.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = Checkpointer(workdir).steps()
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = read_best(workdir)
        if best and best["step"] in steps:
            return best["step"]
        _log.warning("no checkpoint of %s is marked as the best: taking the last", workdir)
        return steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"--step={wanted}: give best, last or one of {steps}")
    return int(wanted)
