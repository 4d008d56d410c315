"""Embedding tables divided over all devices, of which a step moves only the rows it needs.

A table lies in blocks of rows, one per device.  Each device renumbers the ids of its share of the
batch by the distinct rows they touch, asks the rows' owners for them, and sends their gradients
back.  Time, traffic and memory of a step therefore follow the batch, not the vocabulary:

    batch.history["item"]   812   7  812  55        ids into a table of 100,000,000 rows
    distinct rows             7  55  812  V         in the table's order, padded with V
    places                    2   0    2   1        of each id among the distinct rows

    touch    distinct rows and places                         integers, within each device
    fetch    owners send those rows                           all-to-all
    embed    rows[places], which the model is given           within each device, differentiable
    update   gradients to the owners, which sum and apply     all-to-all

Ids are ranked by frequency in most vocabularies, so consecutive ids are dealt out like cards to
`ROW_MULTIPLE` piles, and a device holds whole piles: devices are asked for about as many rows each.
The order in which rows are stored depends on the size of the vocabulary only, so a checkpoint fits
any number of devices that divides `ROW_MULTIPLE`.  `rows_by_id` undoes it.

An exchange has room for a little more than the mean number of rows per pair of devices.  If some
pair needs more, all devices take several rounds; nothing is ever dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.schema import Schema
from stca_jax.training.optimizer import RowOptimizer, RowSlots
from stca_jax.training.sharding import MESH_AXES

# Every power of two up to 1,024 divides it, and three times each: the usual device counts.
ROW_MULTIPLE = 3_072

_LEVELS = ("history", "target", "request")
_TABLE = PartitionSpec(MESH_AXES)
_TOKENS = PartitionSpec("data", ("sequence", "model"))
_LEVEL_SPECS = {
    "history": PartitionSpec("data", "sequence"),
    "target": PartitionSpec("data"),
    "request": PartitionSpec("data"),
}

Tables = Mapping[str, Float[Array, "V W"]]
Embedded = dict[str, dict[str, Float[Array, "R N W"]]]


class TouchedRows(NamedTuple):
    """What a batch touches of one table, D devices each on its own.

    Attributes:
      distinct: Rows in storage order, sorted for each device, padded with V.
      places: By level, where among its device's U rows each id's row is. N is rounded up to a
        multiple of the devices that share a row of the batch.
    """

    distinct: Int[Array, " D*U"]
    places: dict[str, Int[Array, "R N"]]


def stored_schema(schema: Schema, replicated_rows: int) -> Schema:
    """The schema with the sizes at which tables are stored.

    Args:
      schema: Of the dataset.
      replicated_rows: Tables of at most so many rows are stored as they are; larger ones get spare
        rows, which no id refers to, up to a multiple of `ROW_MULTIPLE`.
    """
    sizes = {
        name: size if size <= replicated_rows else -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        for name, size in schema.vocabularies.items()
    }
    return dataclasses.replace(schema, vocabularies=sizes)


def stored_row(ids: Int[Array, ...], num_stored: int) -> Int[Array, ...]:
    """Where the row of an id is stored: pile `id % ROW_MULTIPLE`, card `id // ROW_MULTIPLE`."""
    return (ids % ROW_MULTIPLE) * (num_stored // ROW_MULTIPLE) + ids // ROW_MULTIPLE


def rows_by_id(table: Float[Array, "V W"], num_rows: int) -> Float[Array, "num_rows W"]:
    """Rows of a divided table in the order of ids, without the spare ones: for export.

    Args:
      table: As it is stored.
      num_rows: Size of the vocabulary.
    """
    return table[stored_row(jnp.arange(num_rows), len(table))]


def touch(batch: RequestBatch, num_rows: Mapping[str, int], mesh: Mesh) -> dict[str, TouchedRows]:
    """Finds the distinct rows that each device's share of the batch touches.

    Args:
      batch: A batch; ids below the size of their vocabulary.
      num_rows: Stored rows of each divided table.
      mesh: Rows of the batch lie along `data`; the devices along the other axes share them.
    """
    share = mesh.shape["sequence"] * mesh.shape["model"]
    touched = {}
    for name, size in num_rows.items():
        ids = {
            level: _pad_to_multiple(getattr(batch, level)[name], share)
            for level in _LEVELS
            if name in getattr(batch, level)
        }
        on_device = jax.shard_map(
            functools.partial(_touch_on_device, num_rows=size),
            mesh=mesh,
            in_specs=_TOKENS,
            out_specs=TouchedRows(_TABLE, _TOKENS),  # type: ignore[arg-type]
            check_vma=False,
        )
        touched[name] = on_device(ids)
    return touched


def fetch(
    tables: Tables, touched: Mapping[str, TouchedRows], mesh: Mesh
) -> dict[str, Float[Array, "D*U W"]]:
    """The touched rows of divided tables, each device's own; other tables whole.

    Unused places hold some row that no id refers to.
    """
    on_device = jax.shard_map(
        functools.partial(_fetch_on_device, num_devices=mesh.size),
        mesh=mesh,
        in_specs=(_TABLE, _TABLE),
        out_specs=_TABLE,
        check_vma=False,
    )
    return {
        name: on_device(table, touched[name].distinct) if name in touched else table
        for name, table in tables.items()
    }


def embed(
    rows: Tables, touched: Mapping[str, TouchedRows], batch: RequestBatch, mesh: Mesh
) -> Embedded:
    """The embedding of every id of the divided tables, by level and name; differentiable in `rows`.

    Args:
      rows: From `fetch`.
      touched: From `touch`.
      batch: The same batch.
      mesh: The same mesh.
    """
    look_up = jax.shard_map(
        lambda rows, places: rows[places],
        mesh=mesh,
        in_specs=(_TABLE, _TOKENS),
        out_specs=_TOKENS,
        check_vma=False,
    )
    embedded: Embedded = {}
    for name, of_table in touched.items():
        for level, places in of_table.places.items():
            width = getattr(batch, level)[name].shape[1]
            embedded.setdefault(level, {})[name] = lax.with_sharding_constraint(
                look_up(rows[name], places)[:, :width],
                NamedSharding(mesh, _LEVEL_SPECS[level]),
            )
    return embedded


def update(
    tables: Tables,
    slots: Mapping[str, RowSlots],
    touched: Mapping[str, TouchedRows],
    gradients: Tables,
    optimizer: RowOptimizer,
    learning_rate: Float[Array, ""],
    mesh: Mesh,
) -> tuple[dict[str, Float[Array, "V W"]], dict[str, RowSlots], Float[Array, ""]]:
    """Updates the rows whose gradient is not zero.

    Args:
      tables: As stored.
      slots: The optimizer's, by table.
      touched: From `touch`.
      gradients: Of what `fetch` returned.
      optimizer: What to do with a row, once the devices' gradients of it are summed.
      learning_rate: Scalar.
      mesh: The same mesh.

    Returns:
      Tables, slots, and the squared global norm of the gradient.
    """
    on_device = jax.shard_map(
        functools.partial(_update_on_device, update=optimizer.update, num_devices=mesh.size),
        mesh=mesh,
        in_specs=(_TABLE, _TABLE, _TABLE, _TABLE, PartitionSpec()),
        out_specs=(_TABLE, _TABLE, PartitionSpec()),
        check_vma=False,
    )
    new_tables, new_slots, square = {}, {}, jnp.zeros(())
    for name, table in tables.items():
        gradient = gradients[name]
        if name in touched:
            new_tables[name], new_slots[name], of_table = on_device(
                table, slots[name], touched[name].distinct, gradient, learning_rate
            )
        else:
            new_tables[name], new_slots[name] = optimizer.update(
                table, slots[name], gradient, learning_rate
            )
            of_table = jnp.square(gradient).sum()
        square += of_table
    return new_tables, new_slots, square


def _pad_to_multiple(ids: Int[Array, "R n"], multiple: int) -> Int[Array, "R N"]:
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % multiple)))


def _touch_on_device(ids: Mapping[str, Int[Array, "r n"]], *, num_rows: int) -> TouchedRows:
    flat = jnp.concatenate([i.reshape(-1) for i in ids.values()])
    distinct, places = jnp.unique(
        stored_row(jnp.clip(flat, 0, num_rows - 1), num_rows),
        size=min(flat.size, num_rows),
        fill_value=num_rows,
        return_inverse=True,
    )
    by_level, offset = {}, 0
    for level, i in ids.items():
        by_level[level] = places[offset : offset + i.size].reshape(i.shape)
        offset += i.size
    return TouchedRows(distinct, by_level)


def _fetch_on_device(
    block: Float[Array, "v W"], distinct: Int[Array, " U"], *, num_devices: int
) -> Float[Array, "U W"]:
    if num_devices == 1:
        return block.at[distinct].get(mode="clip", indices_are_sorted=True)
    rounds = _Rounds.plan(distinct, len(block), num_devices)

    def one_round(r: Array, rows: Float[Array, "U W"]) -> Float[Array, "U W"]:
        places, wanted = rounds.requests(r)
        answer = _exchange(block.at[_exchange(wanted)].get(mode="clip"))
        return rows.at[places].set(answer, mode="drop")

    rows = jnp.zeros((len(distinct), block.shape[1]), block.dtype)
    return lax.fori_loop(0, rounds.num_rounds, one_round, rows)


def _update_on_device(
    block: Float[Array, "v W"],
    slots: RowSlots,
    distinct: Int[Array, " U"],
    gradient: Float[Array, "U W"],
    learning_rate: Float[Array, ""],
    *,
    update: Callable[..., tuple[Array, RowSlots]],
    num_devices: int,
) -> tuple[Float[Array, "v W"], RowSlots, Float[Array, ""]]:
    def apply(
        block: Array, slots: RowSlots, rows: Int[Array, " K"], gradient: Float[Array, "K W"]
    ) -> tuple[Array, RowSlots, Array]:
        """Updates distinct rows, sorted and padded with len(block)."""
        used = rows < len(block)
        rows = jnp.where(used, rows, len(block) + jnp.arange(len(rows)))  # keeps them distinct
        gradient = jnp.where(used[:, None], gradient, 0)
        old = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), (block, slots))
        new = update(*old, gradient, learning_rate)
        block, slots = jax.tree.map(
            lambda x, values: x.at[rows].set(
                values, mode="drop", indices_are_sorted=True, unique_indices=True
            ),
            (block, slots),
            new,
        )
        return block, slots, jnp.square(gradient).sum()

    if num_devices == 1:
        return apply(block, slots, distinct, gradient)
    rounds = _Rounds.plan(distinct, len(block), num_devices)

    def one_round(r: Array, state: tuple[Array, RowSlots, Array]) -> tuple[Array, RowSlots, Array]:
        block, slots, square = state
        places, wanted = rounds.requests(r)
        received = _exchange(gradient.at[places].get(mode="clip"))
        # All gradients of a row arrive in one round, one from each device that touched it.
        rows, inverse = jnp.unique(
            _exchange(wanted).reshape(-1),
            size=min(wanted.size, len(block) + 1),
            fill_value=len(block),
            return_inverse=True,
        )
        total = jax.ops.segment_sum(
            received.reshape(-1, gradient.shape[1]), inverse, num_segments=len(rows)
        )
        block, slots, of_round = apply(block, slots, rows, total)
        return block, slots, square + of_round

    block, slots, square = lax.fori_loop(
        0, rounds.num_rounds, one_round, (block, slots, jnp.zeros(()))
    )
    return block, slots, lax.psum(square, MESH_AXES)


class _Rounds(NamedTuple):
    """An exchange in rounds; a round serves one span of rows of each owner's block.

    Attributes:
      distinct: Rows that this device touches, sorted.
      block_rows: Rows of an owner's block.
      num_devices: D.
      room: Rows that two devices can exchange in a round.
      span: Rows of an owner's block that one round serves.
    """

    distinct: Int[Array, " U"]
    block_rows: int
    num_devices: int
    room: int
    span: Int[Array, ""]

    @classmethod
    def plan(cls, distinct: Int[Array, " U"], block_rows: int, num_devices: int) -> _Rounds:
        """Halves the span until no pair of devices has more to exchange than there is room for."""
        mean = len(distinct) / num_devices
        # Four standard deviations of the number of rows that one owner holds.
        room = min(math.ceil(mean + 4 * math.sqrt(mean)) + 1, len(distinct), block_rows)

        def crowded(span: Array) -> Array:
            ours, later = distinct[:-room], distinct[room:]
            same_owner = ours // block_rows == later // block_rows
            same_span = ours % block_rows // span == later % block_rows // span
            used = later < num_devices * block_rows
            return lax.pmax((same_owner & same_span & used).any().astype(jnp.int32), MESH_AXES)

        def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
            span = (state[0] + 1) // 2
            return span, crowded(span)

        whole = jnp.array(block_rows)
        span, _ = lax.while_loop(lambda state: state[1] > 0, halve, (whole, crowded(whole)))
        return cls(distinct, block_rows, num_devices, room, span)

    @property
    def num_rounds(self) -> Int[Array, ""]:
        """Rounds, the same on all devices."""
        return -(-self.block_rows // self.span)

    def requests(self, r: Array) -> tuple[Int[Array, "D room"], Int[Array, "D room"]]:
        """What this device asks each owner for in round r.

        Returns:
          Places among this device's distinct rows, unused ones beyond the end, and the rows of the
          owner's block that stand there, unused ones `block_rows`.
        """
        owner_start = jnp.arange(self.num_devices) * self.block_rows
        first, last = (
            jnp.searchsorted(self.distinct, owner_start + jnp.minimum(end, self.block_rows))
            for end in (r * self.span, (r + 1) * self.span)
        )
        places = first[:, None] + jnp.arange(self.room)
        used = places < last[:, None]
        wanted = self.distinct.at[places].get(mode="clip") - owner_start[:, None]
        return (
            jnp.where(used, places, len(self.distinct)),
            jnp.where(used, wanted, self.block_rows),
        )


def _exchange(x: Array) -> Array:
    """Sends part i of the first axis to device i; part i of the result came from device i."""
    return lax.all_to_all(x, MESH_AXES, 0, 0, tiled=True)
