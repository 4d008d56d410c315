"""The state of a training run, and the compiled functions that advance and read it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.schema import Schema
from stca_jax.training import table_rows
from stca_jax.training.averaging import with_average
from stca_jax.training.loss import LossWeighting, binary_cross_entropy, target_weights
from stca_jax.training.optimizer import (
    OptimizerConfig,
    RowSlots,
    dense_optimizer,
    row_optimizer,
    schedule,
)
from stca_jax.training.sharding import ShardingRules, batch_shardings, parameter_sharding

# Left to itself, a TPU stores tables narrower than 128 column by column, and turns them every step.
_ROW_BY_ROW = Layout((0, 1))

OnDivergence = Literal["stop", "skip"]
Tables = dict[str, Float[Array, "V W"]]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to report.

    Attributes:
      num_epochs: Passes over the training requests.
      max_steps: Stop earlier, after this many steps; the schedule ends there too.
      loss_weighting: "target" is the per-impression objective; see `stca_jax.training.loss`.
      accumulate_steps: Micro-batches that a batch is cut into, one after the other in the memory of
        one; the update is that of the whole batch.
      on_divergence: What to do about a step that is not finite, or exceeds `max_gradient_norm`:
        "stop" the run, or "skip" the update and count it. Fifty such steps in a row stop the run in
        any case.
      max_gradient_norm: Largest norm of the dense gradient that is not taken for a spike.
      ema_decay: Evaluate an exponential moving average of the dense parameters; 0 keeps none.
      log_every_steps: Steps whose mean is one line of the metrics file.
    """

    num_epochs: int = 1
    max_steps: int | None = None
    loss_weighting: LossWeighting = "target"
    accumulate_steps: int = 1
    on_divergence: OnDivergence = "stop"
    max_gradient_norm: float | None = None
    ema_decay: float = 0.0
    log_every_steps: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name in ("num_epochs", "max_steps", "accumulate_steps", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_gradient_norm is not None and self.max_gradient_norm <= 0:
            raise ValueError(f"max_gradient_norm is {self.max_gradient_norm}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")


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
    tables: Tables
    optimizer: Any
    table_optimizer: dict[str, RowSlots]


jax.tree_util.register_dataclass(TrainState)


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
      loss: Of the batch, before the update.
      gradient_norm: Global norm of the dense gradient, before clipping.
      table_gradient_norm: Global norm of the tables' gradient.
      parameter_norm: Global norm of the dense parameters, after the update.
      learning_rate: Of the dense parameters.
      diverged: The loss, a norm or an updated parameter is not finite, or the dense gradient is too
        large. If the step was skipped, the other metrics are of the update that was not made, but
        for the tables' gradient, which is zero then.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    table_gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    diverged: Bool[Array, ""]


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
    """The inverse of `split_ranker`; tables that are not read may have any rows."""
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
    accumulate_steps: int = 1,
    on_divergence: OnDivergence = "stop",
    max_gradient_norm: float | None = None,
    ema_decay: float = 0.0,
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
      accumulate_steps: Micro-batches that a batch is cut into, one after the other in the memory of
        one; the update is that of the whole batch.
      on_divergence: What a step does whose `StepMetrics.diverged` is set: "stop" leaves it to the
        caller to stop, "skip" leaves parameters and optimizer as they are.
      max_gradient_norm: A larger dense gradient counts as divergence; None is no limit.
      ema_decay: Predict with an average of the dense parameters, see `stca_jax.training.averaging`;
        0 keeps none.  Tables are not averaged: a step would have to touch every row.
      rules: Which mesh axis each parameter axis lies along.

    Raises:
      UserError: a parameter or the batch cannot be divided by the mesh, or the dataset lacks a
        feature that the model is to read.
    """
    rows_per_unit = mesh.shape["data"] * accumulate_steps
    if batch.num_rows % rows_per_unit:
        raise UserError(
            f"a batch of {batch.num_rows} rows cannot be divided over mesh axis 'data' of size "
            f"{mesh.shape['data']} and {accumulate_steps} micro-batches: set "
            f"--config.input.rows_per_batch={-(-batch.num_rows // rows_per_unit) * rows_per_unit} "
            f"or another multiple of {rows_per_unit}, or change mesh.data or "
            "training.accumulate_steps"
        )
    transform = dense_optimizer(optimizer, num_steps)
    if ema_decay:
        transform = with_average(transform, ema_decay)
    table_transform = row_optimizer(optimizer)
    fraction = schedule(optimizer, num_steps)
    stored = table_rows.stored_schema(model.read_schema(schema), model.embedding.replicated_rows)
    divided = {
        name: size
        for name, size in stored.vocabularies.items()
        if size > model.embedding.replicated_rows
    }

    def new_ranker() -> Ranker:
        return Ranker(model, stored, rngs=nnx.Rngs(seed))

    abstract_ranker = nnx.eval_shape(new_ranker)
    graph, _, _ = split_ranker(abstract_ranker)

    def initialize() -> TrainState:
        _, dense, tables = split_ranker(new_ranker())
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            dense=dense,
            tables=tables,
            optimizer=transform.init(dense),
            table_optimizer={
                name: table_transform.init(*rows.shape) for name, rows in tables.items()
            },
        )

    def loss_and_gradients(
        dense: dict[str, Any],
        rows: Tables,
        batch: RequestBatch,
        touched: dict[str, table_rows.TouchedRows],
    ) -> tuple[Array, tuple[dict[str, Any], Tables]]:
        total_weight = target_weights(batch, loss_weighting).sum()
        places = {name: t.places for name, t in touched.items()}

        def loss_of(
            dense: dict[str, Any], rows: Tables, batch: RequestBatch, places: dict[str, Any]
        ) -> Array:
            here = {name: t._replace(places=places[name]) for name, t in touched.items()}
            embedded = table_rows.embed(rows, here, batch, mesh)
            logits = merge_ranker(graph, dense, rows)(batch, embedded)
            return binary_cross_entropy(logits, batch, loss_weighting, total_weight)

        of_batch = jax.value_and_grad(loss_of, argnums=(0, 1))
        if accumulate_steps == 1:
            return of_batch(dense, rows, batch, places)

        def micro_batches(x: Array) -> Array:
            # Every k-th row, so that each device cuts its own rows and none travels.
            return x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1)

        def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_batch(dense, rows, *micro_batch)), None

        zeros = jax.tree.map(jnp.zeros_like, (total_weight, (dense, rows)))
        return lax.scan(add, zeros, jax.tree.map(micro_batches, (batch, places)))[0]

    def train_step(state: TrainState, batch: RequestBatch) -> tuple[TrainState, StepMetrics]:
        touched = table_rows.touch(batch, divided, mesh)
        rows = table_rows.fetch(state.tables, touched, mesh)
        loss, (dense_gradient, row_gradients) = loss_and_gradients(
            state.dense, rows, batch, touched
        )
        updates, optimizer_state = transform.update(dense_gradient, state.optimizer, state.dense)
        dense = optax.apply_updates(state.dense, updates)
        gradient_norm, row_norm, parameter_norm = map(
            optax.tree.norm, (dense_gradient, row_gradients, dense)
        )
        diverged = ~jnp.isfinite(loss + gradient_norm + row_norm + parameter_norm)
        if max_gradient_norm is not None:
            diverged |= gradient_norm > max_gradient_norm
        if on_divergence == "skip":
            dense, optimizer_state = jax.tree.map(
                lambda old, new: jnp.where(diverged, old, new),
                (state.dense, state.optimizer),
                (dense, optimizer_state),
            )
            # Rows without a gradient stay as they are.
            row_gradients = jax.tree.map(lambda g: jnp.where(diverged, 0, g), row_gradients)
        scale = fraction(state.step)
        tables, table_optimizer, table_square = table_rows.update(
            state.tables,
            state.table_optimizer,
            touched,
            row_gradients,
            table_transform,
            optimizer.table_learning_rate * scale,
            mesh,
        )
        metrics = StepMetrics(
            loss=loss,
            gradient_norm=gradient_norm,
            table_gradient_norm=jnp.sqrt(table_square),
            parameter_norm=parameter_norm,
            learning_rate=optimizer.learning_rate * scale,
            diverged=diverged,
        )
        new_state = TrainState(
            # The learning rates follow it; a skipped step has not happened to either.
            step=state.step + (jnp.where(diverged, 0, 1) if on_divergence == "skip" else 1),
            dense=dense,
            tables=tables,
            optimizer=optimizer_state,
            table_optimizer=table_optimizer,
        )
        return new_state, metrics

    def predict(state: TrainState, batch: RequestBatch) -> Predictions:
        touched = table_rows.touch(batch, divided, mesh)
        rows = table_rows.fetch(state.tables, touched, mesh)
        embedded = table_rows.embed(rows, touched, batch, mesh)
        dense = state.optimizer.average if ema_decay else state.dense
        logit = merge_ranker(graph, dense, rows)(batch, embedded)
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
    """Shardings of the state, and layouts of tables.

    An optimizer slot lies like its parameter; the rest is replicated.
    """
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

    def rows_of(table: str, array: Array) -> NamedSharding | Format:
        """Of a table or its slots; first axes are rows."""
        sharding = by_path["embedding", "tables", table, "rows"]
        if array.ndim == 1:
            return NamedSharding(mesh, PartitionSpec(*sharding.spec[:1]))
        return Format(_ROW_BY_ROW, sharding)

    shardings: dict[str, Any] = dict(
        step=replicated,
        dense=jax.tree_util.tree_map_with_path(sharding_of, abstract_state.dense),
        tables={name: rows_of(name, table) for name, table in abstract_state.tables.items()},
        optimizer=jax.tree_util.tree_map_with_path(sharding_of, abstract_state.optimizer),
        table_optimizer={
            name: {key: rows_of(name, slot) for key, slot in slots.items()}
            for name, slots in abstract_state.table_optimizer.items()
        },
    )
    return TrainState(**shardings)
