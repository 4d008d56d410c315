"""A run with random parameters, averaged ones too, and its exports: nothing is trained."""

import dataclasses
import fcntl
import os
from typing import Any, NamedTuple

import jax
import long_dataset
import numpy as np
import pytest

from stca_jax.evaluation.evaluator import request_logits
from stca_jax.experiment import ExperimentConfig, experiment_program
from stca_jax.experiments.configs import tiny
from stca_jax.export.folder import ExportOptions, export_checkpoint
from stca_jax.input.dataset import RequestDataset
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.checkpointing import CheckpointConfig, Checkpointer
from stca_jax.training.train_step import Program, TrainState
from stca_jax.workdir import restore_for_evaluation, save_config

MAX_HISTORY = 600  # more than a page, fewer than two, and less than some users have
STEP = 7


class Run(NamedTuple):
    """A run and what its evaluation reads."""

    config: ExperimentConfig
    dataset: RequestDataset
    workdir: Any
    program: Program
    state: TrainState


def make_run(dataset, workdir, model, ema_decay=0.9):
    """A workdir with one checkpoint, whose every parameter is random."""
    config = tiny.get_config()
    config = dataclasses.replace(
        config,
        model=model,
        training=dataclasses.replace(config.training, ema_decay=ema_decay),
        input=dataclasses.replace(
            config.input,
            row_length=700,
            rows_per_batch=2,
            rows="request" if model.needs_exclusive_history else "user",
        ),
        evaluation=dataclasses.replace(config.evaluation, lengths=(64, MAX_HISTORY)),
    )
    program = experiment_program(config, dataset.schema, num_steps=1)
    rng = np.random.default_rng(0)

    def noisy(x):
        if x.dtype != np.float32:
            return x
        return x + np.float32(0.3 / max(1, x.shape[0]) ** 0.5) * rng.normal(size=x.shape)

    state = jax.tree.map(lambda x: np.asarray(noisy(np.asarray(x)), x.dtype), program.initialize())
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
    save_config(workdir, config)
    with Checkpointer(workdir, CheckpointConfig()) as checkpointer:
        checkpointer.save(state, STEP, {"fingerprint": dataset.fingerprint})
    return Run(config, dataset, workdir, *restore_for_evaluation(config, dataset, workdir, STEP))


@pytest.fixture(scope="session")
def long_users(tmp_path_factory):
    builder = long_dataset.Builder(data_dir=tmp_path_factory.mktemp("long"))
    builder.download_and_prepare()
    return RequestDataset(builder.data_path)


@pytest.fixture(scope="session")
def everything_run(long_users, tmp_path_factory):
    """Every option that can be cached, and tables of both kinds of storage."""
    model = RankerConfig(
        sequence=StcaConfig(
            width=16,
            num_heads=2,
            skip_paths=True,
            temperature_length=50,
            attention_sink=True,
            recency_score=True,
        ),
        embedding=EmbeddingConfig(item_width=24, linear_path=True, replicated_rows=50),
        match_time_scales_days=(1.0, 28.0),
        match_soft_counts=True,
    )
    return make_run(long_users, tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def export(everything_run, shared_folder):
    """The folder of its export, which the first worker makes: every worker's run is the same."""
    with (shared_folder / "export.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared_folder / "export"
        return folder if folder.exists() else export_run(everything_run, folder)


def export_run(run, output, **options):
    export_checkpoint(run.config, run.dataset, run.workdir, STEP, output, ExportOptions(**options))
    return output


def evaluated(run, split="test", **limits):
    """The evaluation's logits by request id."""
    return dict(
        request_logits(
            run.program, run.state, run.dataset, run.config.input,
            split=split, length=MAX_HISTORY, **limits,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def expected(everything_run):
    return evaluated(everything_run)


@pytest.fixture(scope="session")
def compiled(shared_folder):
    """An option: servers of the session share what one of them has compiled."""
    return f"--compilation_cache={shared_folder / 'compiled'}"
