"""The state of a training run, and where on a mesh it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from stca_jax.models.ranker import Ranker
from stca_jax.training.optimizer import RowSlots
from stca_jax.training.sharding import ShardingRules, parameter_shardings, shardings_like_parameters
from stca_jax.training.table_rows import Tables

# Left to itself, a TPU stores tables narrower than 128 column by column, and turns them every step.
_ROW_BY_ROW = Layout((0, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: Steps taken.
      dense: Parameters other than tables, nested by module.
      tables: Rows of each embedding table, in the order of `stca_jax.training.table_rows`.
      optimizer: optax state of the dense parameters.
      table_optimizer: What the row-wise optimizer remembers, by table.
    """

    step: Int[Array, ""]
    dense: dict[str, Any]
    tables: dict[str, Float[Array, "V W"]]
    optimizer: Any
    table_optimizer: dict[str, RowSlots]


def split_ranker(ranker: Ranker) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Array]]:
    """Structure, dense parameters as nested dicts, and table rows by vocabulary."""
    graph, params = nnx.split(ranker, nnx.Param)
    dense = nnx.to_pure_dict(params)
    tables = {name: t["rows"] for name, t in dense["embedding"].pop("tables").items()}
    if not dense["embedding"]:
        del dense["embedding"]
    return graph, dense, tables


def merge_ranker(graph: nnx.GraphDef, dense: Mapping[str, Any], tables: Tables) -> Ranker:
    """The inverse of `split_ranker`; tables that are not read may have any rows."""
    rows = {"tables": {name: {"rows": rows} for name, rows in tables.items()}}
    return nnx.merge(graph, nnx.State({**dense, "embedding": rows}))


def state_shardings(
    abstract_state: TrainState, ranker: Ranker, mesh: Mesh, rules: ShardingRules
) -> Any:
    """Shardings of the state, and layouts of tables.

    An optimizer slot lies like its parameter; the rest is replicated.

    Raises:
      UserError: a parameter cannot be divided by the mesh.
    """
    by_path = parameter_shardings(ranker, mesh, rules)

    def rows_of(table: str, array: Array) -> NamedSharding | Format:
        """Of a table or its slots; first axes are rows."""
        sharding = by_path[f"embedding/tables/{table}/rows"]
        if array.ndim == 1:
            return NamedSharding(mesh, PartitionSpec(*sharding.spec[:1]))
        return Format(_ROW_BY_ROW, sharding)

    shardings: dict[str, Any] = dict(
        step=NamedSharding(mesh, PartitionSpec()),
        dense=shardings_like_parameters(abstract_state.dense, by_path, mesh),
        tables={name: rows_of(name, table) for name, table in abstract_state.tables.items()},
        optimizer=shardings_like_parameters(abstract_state.optimizer, by_path, mesh),
        table_optimizer={
            name: {key: rows_of(name, slot) for key, slot in slots.items()}
            for name, slots in abstract_state.table_optimizer.items()
        },
    )
    return TrainState(**shardings)
