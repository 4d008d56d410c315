"""A dataset and a run that the code of 2026-11-27 wrote (commit 2a0fb89) are read as they were.

`old_run.tar.xz` holds a prepared dataset of 24 users (`synthetic_interests`), a run of four steps
with its config and checkpoint, and the test targets' logits that it computed then.
"""

import pathlib
import tarfile

import numpy as np
import pytest

from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import evaluate_split
from stca_jax.input.dataset import RequestDataset
from stca_jax.trainer import train
from stca_jax.workdir import load_workdir_config, restore_for_evaluation


@pytest.fixture
def old(tmp_path):
    with tarfile.open(pathlib.Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_old_run_predicts_as_it_did(old):
    dataset, config = RequestDataset(old / "dataset"), load_workdir_config(old / "run")
    program, state = restore_for_evaluation(config, dataset, old / "run", 4)
    found = evaluate_split(program, state, dataset, config.input, split="test", length=32)
    order = np.lexsort((found.logit[:, 0], found.request_id))
    expected = np.load(old / "logits.npz")
    np.testing.assert_array_equal(found.request_id[order], expected["request_id"])
    np.testing.assert_allclose(found.logit[order], expected["logit"], rtol=1e-4, atol=1e-5)


def test_training_on_says_that_batches_would_be_others(old):
    """Lengths and orders are drawn otherwise since; the run's own version goes on with it."""
    dataset, config = RequestDataset(old / "dataset"), load_workdir_config(old / "run")
    with pytest.raises(
        UserError, match=r"version 1 of the input planner.*: go on with the version"
    ):
        train(config, dataset, old / "run")
