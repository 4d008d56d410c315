import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from stca_jax.errors import UserError
from stca_jax.training.sharding import MeshConfig, ShardingRules, make_mesh, parameter_sharding

MESHES = ["(8, 1, 1)", "(4, 2, 1)", "(2, 2, 2)", "(1, 8, 1)", "(1, 1, 8)"]


def test_mesh_takes_the_devices_that_other_axes_leave():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).shape == {
        "data": 1,
        "sequence": 1,
        "model": 1,
    }
    devices = np.array([object() for _ in range(8)])
    with pytest.raises(UserError, match="data=3, sequence=1, model=1 does not fit 8 devices"):
        make_mesh(MeshConfig(data=3), devices)
    with pytest.raises(UserError, match="at most one of them is -1"):
        make_mesh(MeshConfig(data=-1, sequence=-1), devices)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=-1, model=3), devices)
    with pytest.raises(UserError, match="sizes are positive"):
        make_mesh(MeshConfig(data=0), devices)


def test_indivisible_parameter_axis_is_named():
    class EightWay:
        shape = {"model": 8}  # noqa: RUF012

    weight = nnx.Param(np.zeros((4, 12)), logical_axes=("embed", "mlp"))
    with pytest.raises(UserError, match="layer/up: axis 'mlp' of size 12 is not divisible"):
        parameter_sharding("layer/up", weight, EightWay(), ShardingRules())


def test_rules_name_the_mesh_axis_of_each_logical_axis():
    spec = ShardingRules().partition_spec(("embed", "mlp", None))
    assert spec == PartitionSpec(None, "model", None)


@pytest.fixture(scope="module")
def runs(tiny_dataset):
    """Losses and final parameters of the same 20 steps on each mesh."""
    worker = pathlib.Path(__file__).with_name("mesh_worker.py")
    finished = subprocess.run(
        [sys.executable, worker, tiny_dataset.directory],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1_500,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_takes_the_same_steps_as_one_device(runs, mesh):
    heads = 8 if mesh == "(1, 1, 8)" else 2
    one, many = runs[f"(1, 1, 1) heads={heads}"], runs[f"{mesh} heads={heads}"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    expected = np.array(one["parameters"])
    difference = np.abs(np.array(many["parameters"]) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_each_device_holds_only_its_own_rows_and_tokens(runs):
    assert runs["(8, 1, 1) heads=2"]["shard"] == [1, 256]
    assert runs["(4, 2, 1) heads=2"]["shard"] == [2, 128]
