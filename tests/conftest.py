"""Fixtures that several test files share."""

import os
import pathlib
import tempfile

import pytest

# The compile-only plugins of other platforms, where installed, are for the tests that name them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # compiling needs no cuDNN
# Tests compile the same small programs again and again, in this process and in others.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "stca_jax_test_compilations")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


import jax

from stca_jax.data.preparation import prepare
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import tiny
from stca_jax.input.dataset import RequestDataset


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs another platform than this one."""
    for name in {"gpu", "tpu"} - {jax.default_backend()}:
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(f"needs a {name.upper()}"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Holds the prepared dataset of the tiny config."""
    directory = tmp_path_factory.mktemp("data")
    prepare(tiny.get_config().dataset, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dataset(data_dir: pathlib.Path) -> RequestDataset:
    return RequestDataset(prepare(tiny.get_config().dataset, data_dir))


@pytest.fixture
def tiny_config() -> ExperimentConfig:
    return tiny.get_config()
