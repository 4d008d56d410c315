"""The device mesh, and which axis of an array lies along which axis of the mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError

MESH_AXES = ("data", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    Devices of one slice share a fast network: those of a TPU slice, or the GPUs of a host.  Between
    slices the network is slow, so at best only `data` spans several, which is the default.

    Attributes:
      data: Rows of the batch. -1 takes the devices that the other axes leave.
      sequence: History tokens of one row.
      model: FFN hidden units, attention heads.
      dcn_data: Slices that `data` spans, of its size. -1 takes the slices that the others leave.
      dcn_sequence: Slices that `sequence` spans.
      dcn_model: Slices that `model` spans.

    Large tables are divided over the product of all three axes, which must divide 3,072.
    """

    data: int = -1
    sequence: int = 1
    model: int = 1
    dcn_data: int = -1
    dcn_sequence: int = 1
    dcn_model: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices: neighbours along an axis are near in the network.

    Args:
      config: Axis sizes.
      devices: All devices of all processes by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, those of `dcn_` not to the
        number of slices, or an axis is not divisible by the slices that it spans.
    """
    by_slice: dict[int, list[jax.Device]] = {}
    for device in jax.devices() if devices is None else devices:
        by_slice.setdefault(slice_index(device), []).append(device)
    slices = [by_slice[index] for index in sorted(by_slice)]
    sizes = _complete(config, MESH_AXES, sum(map(len, slices)), "devices")
    across = _complete(config, [f"dcn_{axis}" for axis in MESH_AXES], len(slices), "slices")
    for axis, size, spanned in zip(MESH_AXES, sizes, across, strict=True):
        if size % spanned:
            raise UserError(
                f"mesh axis {axis!r} of size {size} cannot span {spanned} slices: make mesh.{axis} "
                f"a multiple of {spanned}, or choose by mesh.dcn_data, mesh.dcn_sequence and "
                "mesh.dcn_model which axes span slices"
            )
    within = [size // spanned for size, spanned in zip(sizes, across, strict=True)]
    arranged = np.stack(
        [
            mesh_utils.create_device_mesh(within, of_slice, allow_split_physical_axes=True)
            for of_slice in slices
        ]
    )
    # An axis is its slices, one after the other.
    interleaved = arranged.reshape(*across, *within).transpose(0, 3, 1, 4, 2, 5)
    return Mesh(interleaved.reshape(sizes), MESH_AXES)


def slice_index(device: jax.Device) -> int:
    """Which slice a device belongs to; devices that do not know, such as CPUs, are of one."""
    return getattr(device, "slice_index", None) or 0


def _complete(config: MeshConfig, names: Sequence[str], total: int, what: str) -> list[int]:
    """The sizes of those names, with -1 replaced by what the others leave of the total."""
    sizes = [getattr(config, name) for name in names]
    shown = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {shown}: sizes are positive, and at most one of them is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and total % known == 0:
        sizes[sizes.index(-1)] = total // known
    if math.prod(sizes) != total:
        raise UserError(
            f"mesh {shown} does not fit {total} {what}: "
            f"the sizes must multiply to the number of {what}"
        )
    return sizes


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis or axes of each logical axis of a parameter; None is replicated.

    Attributes:
      embed: Token width.
      embed_out: Output width of a square map.
      mlp: Hidden width of an FFN.
      head: Attention heads.
      head_width: Width of one head.
      table_row: Rows of a large embedding table; `table_rows` moves rows between all devices.
      table_width: Width of an embedding table.
    """

    embed: str | None = None
    embed_out: str | None = None
    mlp: str | None = "model"
    head: str | None = "model"
    head_width: str | None = None
    table_row: tuple[str, ...] = MESH_AXES
    table_width: str | None = None

    def partition_spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """Spec of an array whose axes have those names."""
        return PartitionSpec(*(a and getattr(self, a) for a in logical_axes))


def parameter_shardings(
    module: nnx.Module, mesh: Mesh, rules: ShardingRules
) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a module, by its path, such as "head/weight".

    Raises:
      UserError: see `parameter_sharding`.
    """
    named = {
        "/".join(map(str, path)): parameter
        for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    return {path: parameter_sharding(path, p, mesh, rules) for path, p in named.items()}


def shardings_like_parameters(tree: Any, by_path: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a tree such as an optimizer's state: what is of a parameter lies like it.

    Args:
      tree: Its leaves' paths end with the path of a parameter, or are replicated.
      by_path: From `parameter_shardings`.
      mesh: Of the devices.
    """

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        rest = jax.tree_util.keystr(path, simple=True, separator="/")
        while rest:
            found = by_path.get(rest)
            if found is not None and len(found.spec) == leaf.ndim:
                return found
            rest = rest.partition("/")[2]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


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
        axes = (axis,) if isinstance(axis, str) else axis or ()
        devices = math.prod(mesh.shape[a] for a in axes)
        if size % devices:
            names = " x ".join(map(repr, axes))
            raise UserError(
                f"{path}: axis {logical!r} of size {size} is not divisible by mesh axis "
                f"{names} of size {devices}; change the model or --config.mesh"
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
    return shardings.replace(
        history={name: tokens for name in batch.history},
        history_time=tokens,
        history_unlabelled=None if batch.history_unlabelled is None else tokens,
    )


@functools.lru_cache
def input_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of the rows of each global batch this process reads, and how many there are.

    Processes along `sequence` or `model` hold the same rows and read the same share.

    Raises:
      UserError: the devices of some process hold other rows than a share of equal size.
    """
    rows: dict[int, set[int]] = {}
    for position, devices in enumerate(mesh.devices):
        for device in devices.flat:
            rows.setdefault(device.process_index, set()).add(position)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(mesh.devices):
        raise UserError(
            f"mesh {dict(mesh.shape)} cuts through the devices of a process "
            f"({len(mesh.local_devices)} each): make data, or sequence x model, a multiple of them"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def device_batch(batch: RequestBatch, shardings: RequestBatch) -> RequestBatch:
    """Puts this process's rows on its devices: one global array, no copy between hosts.

    Args:
      batch: NumPy arrays with the rows of this process, its `input_share`.
      shardings: From `batch_shardings`.
    """
    _, num_shares = input_share(shardings.history_time.mesh)
    # Meant, but with several processes JAX does not know; see the trainer's transfer guard.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda rows, sharding: jax.make_array_from_process_local_data(
                sharding, rows, (num_shares * len(rows), *rows.shape[1:])
            ),
            batch,
            shardings,
        )


def check_rows(num_rows: int, data: int, accumulate_steps: int) -> None:
    """Raises UserError for a batch that cannot be divided."""
    unit = data * accumulate_steps
    if num_rows % unit:
        raise UserError(
            f"a batch of {num_rows} rows cannot be divided over mesh axis 'data' of size {data} "
            f"and {accumulate_steps} micro-batches: set --config.input.rows_per_batch="
            f"{-(-num_rows // unit) * unit} or another multiple of {unit}, or change mesh.data or "
            "training.accumulate_steps"
        )


def with_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a jitted function with the mesh set, by which ops shard themselves."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return wrapped
