"""The state of a training run, and the compiled functions that advance and read it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.schema import Schema
from stca_jax.training import table_rows
from stca_jax.training.averaging import with_average
from stca_jax.training.compiling import jit, jit_once
from stca_jax.training.loss import LabelLoss, Loss, LossInputs, LossWeighting
from stca_jax.training.optimizer import (
    OptimizerConfig,
    RowOptimizer,
    RowStep,
    dense_optimizer,
    row_optimizer,
    schedule,
    width_rates,
)
from stca_jax.training.sharding import ShardingRules, batch_shardings, check_rows, with_mesh
from stca_jax.training.state import TrainState, merge_ranker, split_ranker, state_shardings
from stca_jax.training.table_rows import Tables, TouchedRows

OnDivergence = Literal["stop", "skip"]
Gradients = tuple[dict[str, Any], dict[str, Array]]  # of dense parameters, of touched rows


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to report.

    Attributes:
      num_epochs: Passes over the training requests.  The steps of the first are counted; later
        ones, which draw other lengths, are taken to have as many.  The last batch of each has the
        rows that are left, and its targets weigh as much together as those of a whole batch.
      max_steps: Stop earlier, after this many steps; the schedule ends there too.
      loss_weighting: "target" is the per-impression objective; see `stca_jax.training.loss`.
      auxiliary_losses: Minimised beside the label loss, each times its weight; by import path.
      accumulate_steps: Micro-batches that a batch is cut into, one after the other in the memory of
        one; the update is that of the whole batch.
      on_divergence: What to do about a step that is not finite, or exceeds `max_gradient_norm`:
        "stop" the run, or "skip" the update and count it. Fifty such steps in a row stop the run in
        any case.
      max_gradient_norm: Largest norm of the dense gradient that is not taken for a spike.
      ema_decay: Evaluate an exponential moving average of the dense parameters; 0 keeps none.
        Tables are not averaged: a step would have to touch every row.
      log_every_steps: Steps whose mean is one line of the metrics file.
    """

    num_epochs: int = 1
    max_steps: int | None = None
    loss_weighting: LossWeighting = "target"
    auxiliary_losses: tuple[Loss, ...] = ()
    accumulate_steps: int = 1
    on_divergence: OnDivergence = "stop"
    max_gradient_norm: float | None = None
    ema_decay: float = 0.0
    log_every_steps: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name in ("num_epochs", "max_steps", "accumulate_steps", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 1:  # NaN is refused
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm is {self.max_gradient_norm}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
      loss: Of the batch, before the update: the weighted sum of `losses`.
      gradient_norm: Global norm of the dense gradient, before clipping.
      table_gradient_norm: Global norm of the tables' gradient.
      parameter_norm: Global norm of the dense parameters, after the update.
      learning_rate: Of the dense parameters.
      diverged: The loss, a norm or an updated parameter is not finite, or the dense gradient is too
        large. If the step was skipped, the other metrics are of the update that was not made, but
        for the tables' gradient, which is zero then.
      losses: Each loss by its name, without its weight.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    table_gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    diverged: Bool[Array, ""]
    losses: dict[str, Float[Array, ""]]

    def scalars(self) -> dict[str, Float[Array, ""]]:
        """What is reported by name; each loss too, as `loss/NAME`, if there are several."""
        numbers = {n: v for n, v in self._asdict().items() if n not in ("diverged", "losses")}
        if len(self.losses) > 1:
            numbers |= {f"loss/{name}": value for name, value in self.losses.items()}
        return numbers


class Predictions(NamedTuple):
    """Logits beside what metrics need to know of each target slot; device or NumPy arrays.

    Attributes:
      logit: float32.
      label: 0 or 1, or NaN where it is missing.
      target_mask: False in padding slots.
      user_id: The user's index in the dataset.
      request_id: The request's index in the dataset.
    """

    logit: Float[Any, "R M tasks"]
    label: Float[Any, "R M tasks"]
    target_mask: Bool[Any, "R M"]
    user_id: Int[Any, "R M"]
    request_id: Int[Any, "R M"]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of one model on one mesh; nothing runs before it is called.

    `initialize()`, `train_step(state, batch)` and `predict(state, batch)` are compiled.  What they
    compute is in `initial_state`, `step` and `predictions`, for subclasses to change.

    Attributes:
      model: The model.
      schema: What its batches contain.
      optimizer: How it learns.
      training: How a step is computed; how long a run is says `num_steps`.
      mesh: Where it runs.
      batch: A batch, or its abstract shapes.
      num_steps: Length of the learning-rate schedule.
      seed: Of the initial parameters, and of the keys that losses get.

    Raises:
      UserError: a parameter or the batch cannot be divided by the mesh, or the dataset lacks a
        feature that the model is to read.
    """

    model: RankerConfig
    schema: Schema
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: Mesh
    batch: RequestBatch
    num_steps: int
    seed: int

    rules: ClassVar[ShardingRules] = ShardingRules()

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be compiled."""
        check_rows(self.batch.num_rows, self.mesh.shape["data"], self.training.accumulate_steps)
        names = [loss.name for loss in self.losses]
        if len(set(names)) < len(names):
            raise UserError(f"losses are called {', '.join(names)}: give each a name of its own")
        _ = self._state_shardings  # names parameters that cannot be divided

    @functools.cached_property
    def losses(self) -> tuple[Loss, ...]:
        """What is minimised: their weighted sum."""
        return LabelLoss(self.training.loss_weighting), *self.training.auxiliary_losses

    def new_ranker(self) -> Ranker:
        """The model with initial parameters, tables at the sizes at which they are stored."""
        return Ranker(self.model, self._stored, rngs=nnx.Rngs(self.seed))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        _, dense, tables = split_ranker(self.new_ranker())
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            dense=dense,
            tables=tables,
            optimizer=self._transform.init(dense),
            table_optimizer={
                name: self._table_transform.init(*rows.shape) for name, rows in tables.items()
            },
        )

    def step(self, state: TrainState, batch: RequestBatch) -> tuple[TrainState, StepMetrics]:
        """Gradients of the losses, and one update of everything."""
        touched = table_rows.touch(batch, self._divided, self.mesh)
        rows = table_rows.fetch(state.tables, touched, self.mesh)
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        (loss, losses), gradients = self.loss_and_gradients(state.dense, rows, touched, batch, key)
        dense_gradient, row_gradients = gradients
        updates, optimizer = self._transform.update(dense_gradient, state.optimizer, state.dense)
        dense = optax.apply_updates(state.dense, updates)
        gradient_norm, row_norm, parameter_norm = map(
            optax.tree.norm, (dense_gradient, row_gradients, dense)
        )
        diverged = ~jnp.isfinite(loss + gradient_norm + row_norm + parameter_norm)
        if self.training.max_gradient_norm is not None:
            diverged |= gradient_norm > self.training.max_gradient_norm
        if self.training.on_divergence == "skip":
            dense, optimizer = jax.tree.map(
                lambda old, new: jnp.where(diverged, old, new),
                (state.dense, state.optimizer),
                (dense, optimizer),
            )
            # Rows without a gradient stay as they are.
            row_gradients = jax.tree.map(lambda g: jnp.where(diverged, 0, g), row_gradients)
        scale = schedule(self.optimizer, self.num_steps)(state.step)
        row_step = RowStep(self.optimizer.table_learning_rate * scale, state.step)
        table_step = table_rows.TableStep(self._table_transform, row_step, self.mesh)
        tables, table_optimizer, table_square = table_rows.update(
            state.tables, state.table_optimizer, touched, row_gradients, table_step
        )
        is_skipping = self.training.on_divergence == "skip"
        return TrainState(
            # The learning rates follow it; a skipped step has not happened to either.
            step=state.step + (jnp.where(diverged, 0, 1) if is_skipping else 1),
            dense=dense,
            tables=tables,
            optimizer=optimizer,
            table_optimizer=table_optimizer,
        ), StepMetrics(
            loss=loss,
            gradient_norm=gradient_norm,
            table_gradient_norm=jnp.sqrt(table_square),
            parameter_norm=parameter_norm,
            learning_rate=self.optimizer.learning_rate * scale,
            diverged=diverged,
            losses=losses,
        )

    def loss_and_gradients(
        self,
        dense: dict[str, Any],
        rows: dict[str, Array],
        touched: Mapping[str, TouchedRows],
        batch: RequestBatch,
        key: Array,
    ) -> tuple[tuple[Array, dict[str, Array]], Gradients]:
        """Of a batch, one micro-batch after the other.

        Args:
          dense: Dense parameters.
          rows: Touched rows of divided tables, and other tables whole.
          touched: Where the batch's ids are among those rows.
          batch: What to learn from.
          key: Of this step.

        Returns:
          The loss and its parts, and the gradients of parameters and rows.
        """
        total_weights = {loss.name: loss.total_weight(batch) for loss in self.losses}

        def loss_of(
            dense: dict[str, Any], rows: Tables, batch: RequestBatch, places: Any, key: Array
        ) -> tuple[Array, dict[str, Array]]:
            here = {name: t._replace(places=places[name]) for name, t in touched.items()}
            embedded = table_rows.embed(rows, here, batch, self.mesh)
            ranker = merge_ranker(self._graph, dense, rows)
            inputs = LossInputs(ranker, batch, ranker.forward(batch, embedded), embedded, key)
            losses = {loss.name: loss(inputs, total_weights[loss.name]) for loss in self.losses}
            weighted = [loss.weight * losses[loss.name] for loss in self.losses]
            return functools.reduce(jnp.add, weighted), losses

        of_batch = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        places = {name: t.places for name, t in touched.items()}
        num_parts = self.training.accumulate_steps
        if num_parts == 1:
            return of_batch(dense, rows, batch, places, key)

        def cut(x: Array) -> Array:
            # Every k-th row, so that each device cuts its own rows and none travels.
            return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_batch(dense, rows, *part)), None

        parts = (*jax.tree.map(cut, (batch, places)), jax.random.split(key, num_parts))
        loss = jnp.zeros(())
        zeros = jax.tree.map(jnp.zeros_like, ((loss, dict.fromkeys(total_weights, loss)),
                                              (dense, rows)))  # fmt: skip
        return lax.scan(add, zeros, parts)[0]

    def predictions(self, state: TrainState, batch: RequestBatch) -> Predictions:
        """Logits of a batch, by the averaged parameters if there are any."""
        touched = table_rows.touch(batch, self._divided, self.mesh)
        rows = table_rows.fetch(state.tables, touched, self.mesh)
        embedded = table_rows.embed(rows, touched, batch, self.mesh)
        dense = state.optimizer.average if self.training.ema_decay else state.dense
        logit = merge_ranker(self._graph, dense, rows)(batch, embedded)
        return Predictions(logit, batch.label, batch.target_mask, batch.user_id, batch.request_id)

    @functools.cached_property
    def initialize(self) -> Callable[[], TrainState]:
        """() -> TrainState, created sharded on the devices."""
        return jit_once(self.initial_state, self._state_shardings)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, RequestBatch], tuple[TrainState, StepMetrics]]:
        """(state, batch) -> (state, metrics); the state is donated."""
        shardings = (self._state_shardings, self.batch_shardings)
        out = (self._state_shardings, NamedSharding(self.mesh, PartitionSpec()))
        step = jit(self.step, donate_argnums=0, in_shardings=shardings, out_shardings=out)
        return with_mesh(self.mesh, step)

    @functools.cached_property
    def predict(self) -> Callable[[TrainState, RequestBatch], Predictions]:
        """(state, batch) -> `Predictions`, replicated."""
        shardings = (self._state_shardings, self.prediction_shardings)
        out = NamedSharding(self.mesh, PartitionSpec())
        return with_mesh(
            self.mesh, jit(self.predictions, in_shardings=shardings, out_shardings=out)
        )

    @functools.cached_property
    def batch_shardings(self) -> RequestBatch:
        """Of the batches that `train_step` takes."""
        return batch_shardings(self.mesh, self.batch)

    @functools.cached_property
    def prediction_shardings(self) -> RequestBatch:
        """Of the batches that `predict` takes: without what only losses read."""
        return self.batch_shardings.replace(history_unlabelled=None)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for restoring."""
        shapes, shardings = self._state_shapes, self._state_shardings
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )

    @functools.cached_property
    def _stored(self) -> Schema:
        schema = self.model.read_schema(self.schema)
        return table_rows.stored_schema(schema, self.model.embedding.replicated_rows)

    def _rates(self) -> Any:
        """Learning rates of the dense parameters over the config's; None if all are 1.

        Raises:
          UserError: there is no such model of the base width.
        """
        if self.optimizer.base_width is None:
            return None
        try:
            sequence = dataclasses.replace(self.model.sequence, width=self.optimizer.base_width)
        except ValueError as error:
            raise UserError(f"optimizer.base_width={self.optimizer.base_width}: {error}") from error
        model = dataclasses.replace(self.model, sequence=sequence)

        def dense_parameters(model: RankerConfig) -> Any:
            return split_ranker(Ranker(model, self._stored, rngs=nnx.Rngs(0)))[1]

        shapes = jax.eval_shape(lambda: dense_parameters(self.model))
        return width_rates(shapes, jax.eval_shape(lambda: dense_parameters(model)))

    @functools.cached_property
    def _divided(self) -> dict[str, int]:
        """Stored rows of the tables that are divided over devices."""
        most = self.model.embedding.replicated_rows
        return {name: size for name, size in self._stored.vocabularies.items() if size > most}

    @functools.cached_property
    def _abstract_ranker(self) -> Ranker:
        return nnx.eval_shape(self.new_ranker)

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return split_ranker(self._abstract_ranker)[0]

    @functools.cached_property
    def _transform(self) -> optax.GradientTransformation:
        transform = dense_optimizer(self.optimizer, self.num_steps, self._rates())
        decay = self.training.ema_decay
        return with_average(transform, decay) if decay else transform

    @functools.cached_property
    def _table_transform(self) -> RowOptimizer:
        return row_optimizer(self.optimizer)

    _state_shapes = functools.cached_property(lambda self: jax.eval_shape(self.initial_state))

    @functools.cached_property
    def _state_shardings(self) -> Any:
        return state_shardings(self._state_shapes, self._abstract_ranker, self.mesh, self.rules)
