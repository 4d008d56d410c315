"""The device mesh, and which axis of an array lies along which axis of the mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError

MESH_AXES = ("data", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
      data: Rows of the batch. -1 takes the devices that the other axes leave.
      sequence: History tokens of one row.
      model: FFN hidden units, attention heads.
    """

    data: int = -1
    sequence: int = 1
    model: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices.

    Args:
      config: Axis sizes; at most one may be -1.
      devices: All devices of all processes by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {shown}: sizes are positive, and at most one of them is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {shown} does not fit {len(devices)} devices: "
            "the sizes must multiply to the number of devices"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis of each logical axis of a parameter; None is replicated.

    Attributes:
      embed: Token width.
      embed_out: Output width of a square map.
      mlp: Hidden width of an FFN.
      head: Attention heads.
      head_width: Width of one head.
      table_row: Rows of an embedding table.
      table_width: Width of an embedding table.
    """

    embed: str | None = None
    embed_out: str | None = None
    mlp: str | None = "model"
    head: str | None = "model"
    head_width: str | None = None
    table_row: str | None = None
    table_width: str | None = None

    def partition_spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """Spec of an array whose axes have those names."""
        return PartitionSpec(*(a and getattr(self, a) for a in logical_axes))


def parameter_sharding(
    path: str, parameter: nnx.Variable, mesh: Mesh, rules: ShardingRules
) -> NamedSharding:
    """Sharding of one model parameter by its logical axes.

    Raises:
      UserError: an axis of the parameter is not divisible by its mesh axis.
    """
    logical_axes = parameter.get_metadata()["logical_axes"]
    spec = rules.partition_spec(logical_axes)
    for size, logical, axis in zip(parameter.shape, logical_axes, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise UserError(
                f"{path}: axis {logical!r} of size {size} is not divisible by mesh axis "
                f"{axis!r} of size {mesh.shape[axis]}; change the model or --config.mesh.{axis}"
            )
    return NamedSharding(mesh, spec)


def batch_shardings(mesh: Mesh, batch: RequestBatch) -> RequestBatch:
    """Shardings of a batch: rows along `data`, history tokens also along `sequence`.

    Args:
      mesh: From `make_mesh`.
      batch: A batch, or its abstract shapes.
    """
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    shardings = jax.tree.map(lambda _: rows, batch)
    return shardings.replace(history={name: tokens for name in batch.history}, history_time=tokens)


def device_batch(batch: RequestBatch, shardings: RequestBatch) -> RequestBatch:
    """Puts this process's rows on its devices: one global array, no copy between hosts.

    Args:
      batch: NumPy arrays with the rows of this process.
      shardings: From `batch_shardings`.
    """
    return jax.tree.map(
        lambda rows, sharding: jax.make_array_from_process_local_data(sharding, rows),
        batch,
        shardings,
    )
