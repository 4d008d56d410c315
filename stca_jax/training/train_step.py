"""The state of a training run, and the compiled functions that advance and read it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.schema import Schema
from stca_jax.training import table_rows
from stca_jax.training.loss import LossWeighting, binary_cross_entropy
from stca_jax.training.optimizer import OptimizerConfig, adagrad_rows, dense_optimizer, schedule
from stca_jax.training.sharding import ShardingRules, batch_shardings, parameter_sharding

Tables = dict[str, Float[Array, "V W"]]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: Steps taken.
      dense: Parameters other than tables, nested by module.
      tables: Rows of each embedding table.
      optimizer: optax state of the dense parameters.
      accumulators: Row-wise Adagrad's sums, by table.
    """

    step: Int[Array, ""]
    dense: dict[str, Any]
    tables: Tables
    optimizer: Any
    accumulators: dict[str, Float[Array, " V"]]


jax.tree_util.register_dataclass(TrainState)


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
      loss: Of the batch, before the update.
      gradient_norm: Global norm of the dense gradient, before clipping.
      table_gradient_norm: Global norm of the tables' gradient.
      parameter_norm: Global norm of the dense parameters, after the update.
      learning_rate: Of the dense parameters.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    table_gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


class Predictions(NamedTuple):
    """Logits beside what metrics need to know of each target slot; device or NumPy arrays.

    Attributes:
      logit: float32.
      label: 0 or 1.
      target_mask: False in padding slots.
      user_id: The user's index in the dataset.
      request_id: The request's index in the dataset.
    """

    logit: Float[Any, "R M tasks"]
    label: Float[Any, "R M tasks"]
    target_mask: Bool[Any, "R M"]
    user_id: Int[Any, "R M"]
    request_id: Int[Any, "R M"]


class Program(NamedTuple):
    """The compiled functions of one model on one mesh.

    Attributes:
      initialize: () -> TrainState, created sharded on the devices.
      abstract_state: Shapes, dtypes and shardings of the state, for restoring.
      train_step: (state, batch) -> (state, metrics); the state is donated.
      predict: (state, batch) -> `Predictions`, replicated.
      batch_shardings: Of the batches that both take.
    """

    initialize: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable[[TrainState, RequestBatch], tuple[TrainState, StepMetrics]]
    predict: Callable[[TrainState, RequestBatch], Predictions]
    batch_shardings: RequestBatch


def split_ranker(ranker: Ranker) -> tuple[nnx.GraphDef, dict[str, Any], Tables]:
    """Structure, dense parameters as nested dicts, and table rows by vocabulary."""
    graph, params = nnx.split(ranker, nnx.Param)
    dense = nnx.to_pure_dict(params)
    tables = {name: t["rows"] for name, t in dense["embedding"].pop("tables").items()}
    if not dense["embedding"]:
        del dense["embedding"]
    return graph, dense, tables


def merge_ranker(
    graph: nnx.GraphDef, dense: Mapping[str, Any], tables: Mapping[str, Array]
) -> Ranker:
    """The inverse of `split_ranker`; tables may be cut down to the rows a batch touches."""
    rows = {"tables": {name: {"rows": rows} for name, rows in tables.items()}}
    return nnx.merge(graph, nnx.State({**dense, "embedding": rows}))


def make_program(
    model: RankerConfig,
    schema: Schema,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    batch: RequestBatch,
    *,
    num_steps: int,
    seed: int,
    loss_weighting: LossWeighting = "target",
    rules: ShardingRules | None = None,
) -> Program:
    """Builds the functions of a training run; nothing is compiled or allocated yet.

    Args:
      model: The model.
      schema: What its batches contain.
      optimizer: How it learns.
      mesh: Where it runs.
      batch: A batch, or its abstract shapes.
      num_steps: Length of the learning-rate schedule.
      seed: Of the initial parameters.
      loss_weighting: See `stca_jax.training.loss`.
      rules: Which mesh axis each parameter axis lies along.

    Raises:
      UserError: a parameter cannot be divided by the mesh.
    """
    transform = dense_optimizer(optimizer, num_steps)
    fraction = schedule(optimizer, num_steps)

    def new_ranker() -> Ranker:
        return Ranker(model, schema, rngs=nnx.Rngs(seed))

    abstract_ranker = nnx.eval_shape(new_ranker)
    graph, _, _ = split_ranker(abstract_ranker)

    def initialize() -> TrainState:
        _, dense, tables = split_ranker(new_ranker())
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            dense=dense,
            tables=tables,
            optimizer=transform.init(dense),
            accumulators={
                name: jnp.full(len(rows), optimizer.table_accumulator)
                for name, rows in tables.items()
            },
        )

    def train_step(state: TrainState, batch: RequestBatch) -> tuple[TrainState, StepMetrics]:
        num_rows = {name: len(rows) for name, rows in state.tables.items()}
        local_batch, touched = table_rows.touch(batch, num_rows)
        touched_tables = table_rows.gather(state.tables, touched)

        def loss_of(dense: dict[str, Any], tables: Tables) -> Array:
            logits = merge_ranker(graph, dense, tables)(local_batch)
            return binary_cross_entropy(logits, batch, loss_weighting)

        loss, (dense_gradient, row_gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            state.dense, touched_tables
        )
        updates, optimizer_state = transform.update(dense_gradient, state.optimizer, state.dense)
        scale = fraction(state.step)
        updated = {
            name: adagrad_rows(
                rows,
                state.accumulators[name],
                touched[name],
                row_gradients[name],
                optimizer.table_learning_rate * scale,
            )
            for name, rows in state.tables.items()
        }
        dense = optax.apply_updates(state.dense, updates)
        metrics = StepMetrics(
            loss=loss,
            gradient_norm=optax.tree.norm(dense_gradient),
            table_gradient_norm=optax.tree.norm(row_gradients),
            parameter_norm=optax.tree.norm(dense),
            learning_rate=optimizer.learning_rate * scale,
        )
        new_state = TrainState(
            step=state.step + 1,
            dense=dense,
            tables={name: rows for name, (rows, _) in updated.items()},
            optimizer=optimizer_state,
            accumulators={name: sums for name, (_, sums) in updated.items()},
        )
        return new_state, metrics

    def predict(state: TrainState, batch: RequestBatch) -> Predictions:
        logit = merge_ranker(graph, state.dense, state.tables)(batch)
        return Predictions(logit, batch.label, batch.target_mask, batch.user_id, batch.request_id)

    replicated = NamedSharding(mesh, PartitionSpec())
    state_shardings = _state_shardings(
        jax.eval_shape(initialize), abstract_ranker, mesh, rules or ShardingRules()
    )
    of_batch = batch_shardings(mesh, batch)
    abstract_state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        jax.eval_shape(initialize),
        state_shardings,
    )
    return Program(
        initialize=jax.jit(initialize, out_shardings=state_shardings),
        abstract_state=abstract_state,
        train_step=_on_mesh(
            mesh,
            jax.jit(
                train_step,
                donate_argnums=0,
                in_shardings=(state_shardings, of_batch),
                out_shardings=(state_shardings, replicated),
            ),
        ),
        predict=_on_mesh(
            mesh,
            jax.jit(predict, in_shardings=(state_shardings, of_batch), out_shardings=replicated),
        ),
        batch_shardings=of_batch,
    )


def _on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a jitted function with the mesh set, by which ops shard themselves."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return wrapped


def _state_shardings(
    abstract_state: TrainState, ranker: Ranker, mesh: Mesh, rules: ShardingRules
) -> Any:
    """Shardings of the state: an optimizer slot lies like its parameter, the rest is replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    named = nnx.to_flat_state(nnx.state(ranker, nnx.Param))
    by_path = {
        tuple(map(str, path)): parameter_sharding("/".join(map(str, path)), p, mesh, rules)
        for path, p in named
    }

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = tuple(
            str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path
        )
        for start in range(len(keys)):
            found = by_path.get(keys[start:])
            if found is not None and len(found.spec) == leaf.ndim:
                return found
        return replicated

    def table(name: str) -> NamedSharding:
        return by_path["embedding", "tables", name, "rows"]

    shardings: dict[str, Any] = dict(
        step=replicated,
        dense=jax.tree_util.tree_map_with_path(sharding_of, abstract_state.dense),
        tables={name: table(name) for name in abstract_state.tables},
        optimizer=jax.tree_util.tree_map_with_path(sharding_of, abstract_state.optimizer),
        accumulators={
            name: NamedSharding(mesh, PartitionSpec(table(name).spec[0]))
            for name in abstract_state.accumulators
        },
    )
    return TrainState(**shardings)
