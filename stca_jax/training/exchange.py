"""Exchanges of table rows between all devices, in rounds.

An exchange has room for a little more than the mean number of rows per pair of devices.  If some
pair needs more, all devices take several rounds; nothing is ever dropped.  All tables share the
rounds, and so the all-to-alls: on many devices, compiling each of them takes long.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from stca_jax.training.sharding import MESH_AXES

_MOST_DEVICES_IN_ONE_HOP = 64

RowsByTable = Mapping[str, Int[Array, " U"]]


class Rounds(NamedTuple):
    """An exchange in rounds; a round serves one span of rows of each owner's block of a table.

    Attributes:
      distinct: Rows of each table that this device touches, sorted.
      block_rows: Rows of an owner's block.
      room: Rows that two devices can exchange in a round.
      span: Rows of an owner's block that one round serves.
      num_devices: D.
    """

    distinct: RowsByTable
    block_rows: Mapping[str, int]
    room: Mapping[str, int]
    span: Mapping[str, Int[Array, ""]]
    num_devices: int

    @classmethod
    def plan(cls, distinct: RowsByTable, block_rows: Mapping[str, int], num_devices: int) -> Rounds:
        """Halves the spans until no pair of devices has more to exchange than there is room for."""
        room = {}
        for name, rows in distinct.items():
            mean = len(rows) / num_devices
            # Four standard deviations of the number of rows that one owner holds.
            enough = math.ceil(mean + 4 * math.sqrt(mean)) + 1
            room[name] = min(enough, len(rows), block_rows[name])

        def is_crowded(name: str, span: Array) -> Array:
            rows, size = distinct[name], block_rows[name]
            ours, later = rows[: -room[name]], rows[room[name] :]
            same_owner = ours // size == later // size
            same_span = ours % size // span == later % size // span
            return (same_owner & same_span & (later < num_devices * size)).any()

        def crowded(span: Mapping[str, Array]) -> dict[str, Array]:
            here = {name: is_crowded(name, s).astype(jnp.int32) for name, s in span.items()}
            return lax.pmax(here, MESH_AXES)

        def halve(state: tuple[dict[str, Array], dict[str, Array]]) -> tuple[Any, Any]:
            span = {
                name: jnp.where(state[1][name] > 0, (s + 1) // 2, s) for name, s in state[0].items()
            }
            return span, crowded(span)

        whole = {name: jnp.array(size) for name, size in block_rows.items()}
        span, _ = lax.while_loop(
            lambda state: sum(state[1].values(), jnp.array(0)) > 0, halve, (whole, crowded(whole))
        )
        return cls(distinct, block_rows, room, span, num_devices)

    @property
    def num_rounds(self) -> Int[Array, ""]:
        """Rounds, the same on all devices: as many as the table needs that needs most."""
        return functools.reduce(jnp.maximum, map(self._rounds_of, self.span), jnp.array(0))

    def _rounds_of(self, name: str) -> Int[Array, ""]:
        return -(-self.block_rows[name] // self.span[name])

    def requests(
        self, r: Array
    ) -> tuple[dict[str, Int[Array, "D room"]], dict[str, Int[Array, "D room"]]]:
        """What this device asks each owner for in round r.

        Returns:
          By table: places among this device's distinct rows, unused ones beyond the end; and the
          rows of the owner's block that stand there, unused ones `block_rows`.
        """
        places, wanted = {}, {}
        for name, distinct in self.distinct.items():
            size, span = self.block_rows[name], self.span[name]
            of_table = jnp.minimum(r, self._rounds_of(name))  # beyond its last round, nothing
            owner_start = jnp.arange(self.num_devices) * size
            first, last = (
                jnp.searchsorted(distinct, owner_start + jnp.minimum(end, size))
                for end in (of_table * span, (of_table + 1) * span)
            )
            place = first[:, None] + jnp.arange(self.room[name])
            used = place < last[:, None]
            row = distinct.at[place].get(mode="clip") - owner_start[:, None]
            places[name] = jnp.where(used, place, len(distinct))
            wanted[name] = jnp.where(used, row, size)
        return places, wanted


def exchange(tree: Any) -> Any:
    """Sends part i of the first axis of each array to device i, all arrays in one all-to-all.

    Part i of a result came from device i.
    """
    # The barriers keep what is computed before and after out of one fusion with the concatenation,
    # which takes long to compile.
    arrays, structure = jax.tree.flatten(lax.optimization_barrier(tree))
    # As integers, since arithmetic on the way may change the bits of some floats.
    bits = [lax.bitcast_convert_type(x, jnp.int32).reshape(len(x), -1) for x in arrays]
    ends = list(itertools.accumulate(b.shape[1] for b in bits))
    parts = jnp.split(_all_to_all(jnp.concatenate(bits, axis=1)), ends[:-1], axis=1)
    received = [
        lax.bitcast_convert_type(part.reshape(x.shape), x.dtype)
        for part, x in zip(parts, arrays, strict=True)
    ]
    return lax.optimization_barrier(jax.tree.unflatten(structure, received))


def _all_to_all(x: Int[Array, "D n"]) -> Int[Array, "D n"]:
    """All-to-all over all devices; in two hops if there are many.

    Device a B + b sends to a' B + b' by way of a' B + b.  On a torus, where messages pass through
    other devices anyway, that is the same load for the links, and over a slower network between
    slices or hosts it makes fewer and larger messages.  XLA compiles it for 256 devices in one
    second instead of twenty.
    """
    num_devices = len(x)
    inner = next(b for b in range(math.isqrt(num_devices), 0, -1) if num_devices % b == 0)
    if num_devices <= _MOST_DEVICES_IN_ONE_HOP or inner == 1:
        return lax.all_to_all(x, MESH_AXES, 0, 0, tiled=True)
    devices = np.arange(num_devices).reshape(-1, inner)
    hops = x.reshape(*devices.shape, -1)
    for axis, groups in ((0, devices.T), (1, devices)):
        hops = lax.all_to_all(
            hops, MESH_AXES, axis, axis, tiled=True, axis_index_groups=groups.tolist()
        )
    return hops.reshape(x.shape)
