import dataclasses
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

# The second halves the time it takes to compile.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
MESHES = ["(8, 1, 1)", "(4, 2, 1)", "(4, 1, 2)", "(2, 2, 2)", "(1, 8, 1)", "(1, 1, 8)"]


def test_mesh_takes_the_devices_that_other_axes_leave():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).shape == {
        "data": 1,
        "sequence": 1,
        "model": 1,
    }
    devices = fake_devices(1, 8)
    with pytest.raises(UserError, match="data=3, sequence=1, model=1 does not fit 8 devices"):
        make_mesh(MeshConfig(data=3), devices)
    with pytest.raises(UserError, match="at most one of them is -1"):
        make_mesh(MeshConfig(data=-1, sequence=-1), devices)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=-1, model=3), devices)
    with pytest.raises(UserError, match="sizes are positive"):
        make_mesh(MeshConfig(data=0), devices)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As one of several TPU slices or GPU hosts, which a machine without them cannot show."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "none"


def fake_devices(num_slices: int, of_slice: int) -> list[FakeDevice]:
    """In turns of one device of each slice, so that their order says nothing."""
    return [FakeDevice(i, i % num_slices) for i in range(num_slices * of_slice)]


@pytest.mark.parametrize(
    ("config", "spanning"),
    [
        (MeshConfig(), "data"),
        (MeshConfig(sequence=2, model=2), "data"),
        (MeshConfig(model=4, dcn_data=1, dcn_model=2), "model"),
        (MeshConfig(data=1, sequence=-1, dcn_data=1, dcn_sequence=2), "sequence"),
    ],
)
def test_one_axis_spans_slices_and_no_other_leaves_one(config, spanning):
    mesh = make_mesh(config, fake_devices(2, 8))
    assert len({d.id for d in mesh.devices.flat}) == 16
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    axis = mesh.axis_names.index(spanning)
    half = mesh.devices.shape[axis] // 2
    first, second = np.split(slices, [half], axis)
    assert (first == 0).all()
    assert (second == 1).all()


@pytest.mark.parametrize(
    ("config", "num_slices", "message"),
    [
        (MeshConfig(data=1, model=16), 2, "mesh axis 'data' of size 1 cannot span 2 slices"),
        (MeshConfig(model=2, dcn_data=1, dcn_model=4), 4, "'model' of size 2 cannot span 4 slices"),
        (MeshConfig(dcn_data=3), 2, "dcn_data=3, dcn_sequence=1, dcn_model=1 does not fit 2 sli"),
        (MeshConfig(dcn_data=2), 1, "does not fit 1 slices"),
    ],
)
def test_axis_that_cannot_span_the_slices_is_named(config, num_slices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, fake_devices(num_slices, 16 // num_slices))


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
    # Read from the cache, the programs of eight devices on two cores have hung: one device waited
    # in an all-to-all, the others in an all-reduce (jaxlib 0.10.2).
    environment = {"XLA_FLAGS": XLA_FLAGS, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    finished = subprocess.run(
        [sys.executable, worker, tiny_dataset.directory],
        env=os.environ | environment,
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
    one = runs[f"(1, 1, 1) heads={heads}"]
    many = runs[f"{mesh} heads={heads}"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    expected = np.array(one["parameters"])
    difference = np.abs(np.array(many["parameters"]) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_each_device_holds_only_its_own_rows_and_tokens(runs):
    assert runs["(8, 1, 1) heads=2"]["shard"] == [1, 256]
    assert runs["(4, 2, 1) heads=2"]["shard"] == [2, 128]
