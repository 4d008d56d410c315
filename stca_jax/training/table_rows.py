"""Embedding tables divided over all devices, of which a step moves only the rows it needs.

A table lies in blocks of rows, one per device.  Each device renumbers the ids of its share of the
batch by the distinct rows they touch, asks the rows' owners for them, and sends their gradients
back.  Time, traffic and memory of a step therefore follow the batch, not the vocabulary:

    batch.history["item"]   812   7  812  55        ids into a table of 100,000,000 rows
    distinct rows             7  55  812  V         in the table's order, padded with V
    places                    2   0    2   1        of each id among the distinct rows

    touch    distinct rows and places                         integers, within each device
    fetch    devices ask the owners for those rows            two all-to-alls, of all tables
    embed    rows[places], which the model is given           within each device, differentiable
    update   gradients to the owners, which sum and apply     one all-to-all, of all tables

Ids are ranked by frequency in most vocabularies, so consecutive ids are dealt out like cards to
`ROW_MULTIPLE` piles, and a device holds whole piles: devices are asked for about as many rows each.
The order in which rows are stored depends on the size of the vocabulary only, so a checkpoint fits
any number of devices that divides `ROW_MULTIPLE`.  `rows_by_id` undoes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.ops.sorting import distinct_ids
from stca_jax.schema import Schema
from stca_jax.training.exchange import Rounds, RowsByTable, exchange
from stca_jax.training.optimizer import RowOptimizer, RowSlots, RowStep
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


class TableStep(NamedTuple):
    """How touched rows are updated.

    Attributes:
      optimizer: Of a row.
      step: Which step.
      mesh: The mesh of `touch`.
    """

    optimizer: RowOptimizer
    step: RowStep
    mesh: Mesh


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
    if not touched:
        return dict(tables)
    on_device = jax.shard_map(
        functools.partial(_fetch_on_device, num_devices=mesh.size),
        mesh=mesh,
        in_specs=(_TABLE, _TABLE),
        out_specs=_TABLE,
        check_vma=False,
    )
    divided = {name: tables[name] for name in touched}
    return {**tables, **on_device(divided, {name: t.distinct for name, t in touched.items()})}


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
    table_step: TableStep,
) -> tuple[dict[str, Float[Array, "V W"]], dict[str, RowSlots], Float[Array, ""]]:
    """Updates the rows whose gradient is not zero.

    Args:
      tables: As stored.
      slots: The optimizer's, by table.
      touched: From `touch`.
      gradients: Of what `fetch` returned.
      table_step: What to do with a row, once the devices' gradients of it are summed.

    Returns:
      Tables, slots, and the squared global norm of the gradient.
    """
    optimizer, step, mesh = table_step
    new_tables, new_slots, square = {}, {}, jnp.zeros(())
    for name in [name for name in tables if name not in touched]:
        new_tables[name], new_slots[name] = optimizer.update(
            tables[name], slots[name], gradients[name], step
        )
        square += jnp.square(gradients[name]).sum()
    if not touched:
        return new_tables, new_slots, square
    on_device = jax.shard_map(
        functools.partial(_update_on_device, update=optimizer.update, num_devices=mesh.size),
        mesh=mesh,
        in_specs=(_TABLE, _TABLE, _TABLE, _TABLE, PartitionSpec()),
        out_specs=(_TABLE, _TABLE, PartitionSpec()),
        check_vma=False,
    )
    divided_tables, divided_slots, divided_square = on_device(
        {name: tables[name] for name in touched},
        {name: slots[name] for name in touched},
        {name: t.distinct for name, t in touched.items()},
        {name: gradients[name] for name in touched},
        step,
    )
    return new_tables | divided_tables, new_slots | divided_slots, square + divided_square


def _pad_to_multiple(ids: Int[Array, "R n"], multiple: int) -> Int[Array, "R N"]:
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % multiple)))


def _touch_on_device(ids: Mapping[str, Int[Array, "r n"]], *, num_rows: int) -> TouchedRows:
    flat = jnp.concatenate([i.reshape(-1) for i in ids.values()])
    distinct, places = distinct_ids(
        stored_row(jnp.clip(flat, 0, num_rows - 1), num_rows),
        size=min(flat.size, num_rows),
        fill_value=num_rows,
    )
    by_level, offset = {}, 0
    for level, i in ids.items():
        by_level[level] = places[offset : offset + i.size].reshape(i.shape)
        offset += i.size
    return TouchedRows(distinct, by_level)


def _fetch_on_device(
    blocks: Tables, distinct: RowsByTable, *, num_devices: int
) -> dict[str, Float[Array, "U W"]]:
    if num_devices == 1:
        return {
            name: block.at[distinct[name]].get(mode="clip", indices_are_sorted=True)
            for name, block in blocks.items()
        }
    rounds = Rounds.plan(distinct, {name: len(b) for name, b in blocks.items()}, num_devices)

    def one_round(r: Array, rows: Tables) -> dict[str, Array]:
        places, wanted = rounds.requests(r)
        asked = exchange(wanted)
        answers = exchange({name: b.at[asked[name]].get(mode="clip") for name, b in blocks.items()})
        return {
            name: rows[name].at[places[name]].set(answer, mode="drop")
            for name, answer in answers.items()
        }

    unused = {
        name: jnp.zeros((len(distinct[name]), b.shape[1]), b.dtype) for name, b in blocks.items()
    }
    return lax.fori_loop(0, rounds.num_rounds, one_round, unused)


def _update_on_device(
    blocks: Tables,
    slots: Mapping[str, RowSlots],
    distinct: RowsByTable,
    gradients: Tables,
    step: RowStep,
    *,
    update: Callable[..., tuple[Array, RowSlots]],
    num_devices: int,
) -> tuple[dict[str, Array], dict[str, RowSlots], Float[Array, ""]]:
    state = {name: (block, slots[name], jnp.zeros(())) for name, block in blocks.items()}

    def apply(
        state: tuple[Array, RowSlots, Array], rows: Int[Array, " K"], gradient: Float[Array, "K W"]
    ) -> tuple[Array, RowSlots, Array]:
        """Updates distinct rows of a table, sorted and padded with len(block)."""
        block, slots, square = state
        used = rows < len(block)
        rows = jnp.where(used, rows, len(block) + jnp.arange(len(rows)))  # keeps them distinct
        gradient = jnp.where(used[:, None], gradient, 0)
        old = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), (block, slots))
        new = update(*old, gradient, step)
        block, slots = jax.tree.map(
            lambda x, values: x.at[rows].set(
                values, mode="drop", indices_are_sorted=True, unique_indices=True
            ),
            (block, slots),
            new,
        )
        return block, slots, square + jnp.square(gradient).sum()

    def sum_and_apply(
        state: tuple[Array, RowSlots, Array],
        asked: Int[Array, "D room"],
        received: Float[Array, "D room W"],
    ) -> tuple[Array, RowSlots, Array]:
        # All gradients of a row arrive in one round, one from each device that touched it.
        block = state[0]
        rows, places = distinct_ids(
            asked.reshape(-1), size=min(asked.size, len(block) + 1), fill_value=len(block)
        )
        flat = received.reshape(-1, block.shape[1])
        total = jax.ops.segment_sum(flat, places, num_segments=len(rows))
        return apply(state, rows, total)

    if num_devices == 1:
        state = {name: apply(of, distinct[name], gradients[name]) for name, of in state.items()}
    else:
        rounds = Rounds.plan(distinct, {name: len(b) for name, b in blocks.items()}, num_devices)

        def one_round(r: Array, state: dict[str, Any]) -> dict[str, Any]:
            places, wanted = rounds.requests(r)
            sent = {name: g.at[places[name]].get(mode="clip") for name, g in gradients.items()}
            asked, received = exchange((wanted, sent))
            return {
                name: sum_and_apply(of, asked[name], received[name]) for name, of in state.items()
            }

        state = lax.fori_loop(0, rounds.num_rounds, one_round, state)
    square = sum((square for _, _, square in state.values()), jnp.zeros(()))
    return (
        {name: block for name, (block, _, _) in state.items()},
        {name: slots for name, (_, slots, _) in state.items()},
        lax.psum(square, MESH_AXES),
    )
