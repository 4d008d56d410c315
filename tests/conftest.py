"""Fixtures that several test files share."""

import functools
import importlib.metadata
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Each of the many processes that tests start would compile every library's source again.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
# The compile-only plugins of other platforms, where installed, are for the tests that name them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # compiling needs no cuDNN
# Tests compile the same small programs again and again, in this process and in others.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "stca_jax_test_compilations")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# In this process, XLA's older emitters, which compile in half the time. Python 3.12's jaxlib has
# no others any more, and an unknown flag ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_cpu_use_fusion_emitters=false"

import jax

from stca_jax import experiment
from stca_jax.data.preparation import prepare
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import tiny
from stca_jax.input.dataset import RequestDataset
from stca_jax.training import compiling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs another platform than this one."""
    backend = jax.default_backend()  # has read XLA_FLAGS
    if backend == "cpu":
        # Processes that tests start run few steps of small models: mostly, they compile.
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    for name in {"gpu", "tpu"} - {backend}:
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(f"needs a {name.upper()}"))
    # Files of slow tests come first, so that at the end no worker waits for another.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """Gives equal experiments one program, which is otherwise traced and compiled for each run."""
    made: dict[Any, Any] = {}
    original = experiment.Program

    @functools.wraps(original, updated=())
    def shared(
        model: Any, schema: Any, optimizer: Any, training: Any, mesh: Any, batch: Any, **rest: Any
    ) -> Any:
        shapes = jax.eval_shape(lambda x: x, batch)
        values = repr((model, schema, optimizer, training, shapes, sorted(rest.items())))
        if (values, mesh) not in made:
            made[values, mesh] = original(model, schema, optimizer, training, mesh, batch, **rest)
        return made[values, mesh]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "Program", shared)
        # Compiled in a sixth of the time; steps are few here.
        patch.setitem(compiling.OPTIONS, "xla_backend_optimization_level", 0)
        yield


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
