"""The model zoo: every config is valid, says what it is for, and compiles or is run by a test."""

import importlib
import pathlib
import re

import jax
import pytest
from flax import nnx

from stca_jax.config import apply_overrides, validate
from stca_jax.device_plan import abstract_batch
from stca_jax.experiment import experiment_program
from stca_jax.experiments import configs
from stca_jax.models.ranker import Ranker
from stca_jax.training.state import split_ranker

FOLDER = pathlib.Path(configs.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
# Run by tests of the launchers and of the README; four differ from those in numbers only.
RUN = {
    "compare",
    "tiny",
    "complete_journey",
    "complete_journey_long",
    "interests",
    "length_study",
    "latent",
    "length_study_synthetic",
    "topics",
}
# Of data that cannot be had here, which tests prepare in the published formats.
UNMEASURED = {"unirank", "unirank_1024", "unirank_10000", "dlrm_v4"}
PLANNED = {"paper_6m": 6e6, "paper_23m": 23e6, "paper_133m": 133e6}


def config_module(name):
    return importlib.import_module(f"stca_jax.experiments.configs.{name}")


def test_every_config_is_run_or_planned():
    assert set(NAMES) == RUN | UNMEASURED | set(PLANNED)


@pytest.mark.parametrize("name", NAMES)
def test_header_says_command_and_outcome(name):
    header = " ".join(config_module(name).__doc__.split())
    assert re.search(r"Command: python -m experiments\.(train|plan|length_study|compare) ", header)
    assert f"experiments/configs/{name}.py" in header
    if name in PLANNED:
        assert "Compiled and planned only" in header
        assert re.search(r"Planned: [\d.]+ of \d+ GiB on v5e:2x4", header)
    if name in UNMEASURED:
        assert "not measured" in header
    elif name != "tiny":
        assert re.search(r"server \((AVX2|AVX-512)\), 2026-\d\d-\d\d", header)
    validate(config_module(name).get_config())


@pytest.mark.parametrize("name", PLANNED)
def test_dense_parameters_are_those_of_the_tier(name):
    config, schema = config_module(name).get_config(), config_module(name).get_schema()
    ranker = nnx.eval_shape(lambda: Ranker(config.model, schema, rngs=nnx.Rngs(0)))
    _, dense, _ = split_ranker(ranker)
    assert sum(x.size for x in jax.tree.leaves(dense)) == pytest.approx(PLANNED[name], rel=0.03)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["paper_6m", "paper_23m"])
def test_train_step_compiles(name):
    """For one device and one row, with all the rows of the tables; nothing is allocated."""
    module = config_module(name)
    config = apply_overrides(module.get_config(), {"input.rows_per_batch": 1, "mesh.data": 1})
    mesh = jax.sharding.Mesh([[jax.devices()[:1]]], ("data", "sequence", "model"))
    program = experiment_program(config, module.get_schema(), 1, mesh)
    batch = abstract_batch(config, module.get_schema(), program)
    with jax.set_mesh(mesh):
        lowered = program.train_step.__wrapped__.lower(program.abstract_state, batch)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
