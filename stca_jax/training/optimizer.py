"""Optimizers: optax for dense parameters, row-wise Adagrad or Adam for embedding tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from stca_jax.models.layers import is_matrix

RowSlots = dict[str, Array]  # what an optimizer remembers of each row; first axes are rows

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of row-wise Adam


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn.

    Both learning rates follow the same schedule: linear warm-up, then a cosine to `final_fraction`.

    Attributes:
      dense: Optimizer of everything but the tables.
      learning_rate: Its peak learning rate.
      base_width: Width of the model for which the learning rate was found; a matrix whose fan-in is
        k times that of a model of this width learns at 1/k of the rate, so that the same settings
        serve any width (muP's rule for Adam, arXiv 2203.03466). None: all learn alike.
      weight_decay: Decoupled weight decay of the matrices: see `is_matrix`.
      clip_norm: The dense gradient is scaled down to at most this global norm.
      tables: Optimizer of the embedding tables, row by row. Adagrad keeps one number per row,
        Adam a first moment as wide as the row, and two numbers.
      table_learning_rate: Its peak learning rate.
      table_accumulator: What Adagrad's sum of squared gradients starts from.
      table_decay: alpha of adaptive regularisation (AdamAR and AdagradAR, arXiv 2511.06374): a row
        whose last gradient was I steps ago loses the share min(1, alpha I) of its values beside
        the next. Rare rows, which several epochs would let a model learn by heart, so keep little;
        alpha from 1e-6 to 1e-1. It costs an integer per row; 0 is no decay.
      warmup_steps: Length of the warm-up.
      final_fraction: Learning rate at the last step over the peak.
    """

    dense: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: float = 3e-3
    base_width: int | None = None
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    tables: Literal["adagrad", "adam"] = "adagrad"
    table_learning_rate: float = 0.03
    table_accumulator: float = 1e-8
    table_decay: float = 0.0
    warmup_steps: int = 100
    final_fraction: float = 0.02

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name in ("learning_rate", "clip_norm", "table_learning_rate", "table_accumulator"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.base_width is not None and not self.base_width >= 1:
            raise ValueError(f"base_width is {self.base_width}; it must be at least 1")
        for name in ("weight_decay", "table_decay", "warmup_steps", "final_fraction"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Fraction of the peak learning rate at a step, in [0, 1]."""
    warmup_steps = min(config.warmup_steps, max(num_steps // 2, 1))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=config.final_fraction,
    )


def dense_optimizer(
    config: OptimizerConfig, num_steps: int, rates: Any = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or RMSProp with the schedule.

    Args:
      config: How parameters learn.
      num_steps: Length of the schedule.
      rates: Learning rate of each parameter over the config's, as a tree; None is 1 for all.
    """
    fraction = schedule(config, num_steps)

    def learning_rate(step: Array) -> Array:
        return config.learning_rate * fraction(step)

    update = optax.chain(
        optax.scale_by_adam() if config.dense == "adamw" else optax.scale_by_rms(),
        _decay_matrices(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        *([] if rates is None else [_scale_each(rates)]),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def width_rates(parameters: Any, at_base_width: Any) -> Any:
    """1 over how many times its fan-in at the base width each matrix has; 1 for other parameters.

    Args:
      parameters: Arrays or shapes, nested by module.
      at_base_width: The same of a model of the base width.
    """

    def rate(path: tuple[Any, ...], parameter: Any, base: Any) -> float:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if not is_matrix(name, parameter):
            return 1.0
        axis = 0 if name.startswith("w_") else -2  # [D, H, K] of the attention; [T, in, out] of E9
        return base.shape[axis] / parameter.shape[axis]

    return jax.tree_util.tree_map_with_path(rate, parameters, at_base_width)


def _scale_each(rates: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, rates))


def _decay_matrices(weight_decay: float) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` of matrices; its mask would change the state's structure."""

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        def decayed(path: tuple[Any, ...], update: Array, parameter: Array) -> Array:
            name = jax.tree_util.keystr(path[-1:], simple=True)
            return update + weight_decay * parameter if is_matrix(name, parameter) else update

        return jax.tree_util.tree_map_with_path(decayed, updates, parameters), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class RowStep(NamedTuple):
    """What rows need to know of a step.

    Attributes:
      learning_rate: Of the tables.
      number: Steps taken before it.
    """

    learning_rate: Float[Array, ""]
    number: Int[Array, ""]


class RowOptimizer(NamedTuple):
    """An optimizer of table rows, each of which learns on its own.

    A row without a gradient stays as it is, and so do its slots: updating only the rows that a
    batch touches is exactly the same as updating all of them.

    Attributes:
      init: (number of rows, width) -> slots.
      update: (rows, slots, gradient, step) -> (rows, slots), for any selection of rows.
    """

    init: Callable[[int, int], RowSlots]
    update: Callable[
        [Float[Array, "U W"], RowSlots, Float[Array, "U W"], RowStep],
        tuple[Float[Array, "U W"], RowSlots],
    ]


def row_optimizer(config: OptimizerConfig) -> RowOptimizer:
    """Row-wise Adagrad or Adam, as configured, with decay or without."""
    adagrad = RowOptimizer(
        # Typed: a state of weakly typed numbers would compile the step twice.
        lambda num_rows, _: {
            "square_sum": jnp.full(num_rows, config.table_accumulator, jnp.float32)
        },
        _update_adagrad,
    )
    optimizer = _ROW_ADAM if config.tables == "adam" else adagrad
    return _with_decay(optimizer, config.table_decay) if config.table_decay else optimizer


def _with_decay(optimizer: RowOptimizer, alpha: float) -> RowOptimizer:
    """Decoupled decay by the time that a row had no gradient, at its next one."""

    def init(num_rows: int, width: int) -> RowSlots:
        return {**optimizer.init(num_rows, width), "last_step": jnp.full(num_rows, -1, jnp.int32)}

    def update(
        rows: Float[Array, "U W"], slots: RowSlots, gradient: Float[Array, "U W"], step: RowStep
    ) -> tuple[Float[Array, "U W"], RowSlots]:
        last_step = slots["last_step"]
        others = {name: slot for name, slot in slots.items() if name != "last_step"}
        new_rows, new_slots = optimizer.update(rows, others, gradient, step)
        # A row that never had a gradient has learned nothing that it could forget.
        idle = jnp.where(last_step < 0, 0, step.number - last_step)
        touched = (gradient != 0).any(-1)
        share = jnp.where(touched, jnp.minimum(alpha * idle, 1), 0)
        last_step = jnp.where(touched, step.number, last_step)
        return new_rows - share[:, None] * rows, {**new_slots, "last_step": last_step}

    return RowOptimizer(init, update)


def _update_adagrad(
    rows: Float[Array, "U W"],
    slots: RowSlots,
    gradient: Float[Array, "U W"],
    step: RowStep,
) -> tuple[Float[Array, "U W"], RowSlots]:
    """Row-wise Adagrad: one sum per row, of the mean squared gradient."""
    square_sum = slots["square_sum"] + jnp.square(gradient).mean(-1)
    change = step.learning_rate * gradient / jnp.sqrt(square_sum)[:, None]
    return rows - change, {"square_sum": square_sum}


def _init_adam(num_rows: int, width: int) -> RowSlots:
    return {
        "mean": jnp.zeros((num_rows, width)),
        "mean_square": jnp.zeros(num_rows),
        "count": jnp.zeros(num_rows, jnp.int32),
    }


def _update_adam(
    rows: Float[Array, "U W"],
    slots: RowSlots,
    gradient: Float[Array, "U W"],
    step: RowStep,
) -> tuple[Float[Array, "U W"], RowSlots]:
    """Row-wise Adam: one second moment per row, and time that counts the row's own updates.

    A row that is touched again after a thousand steps goes on where it was: its moments do not
    decay meanwhile, and its bias correction knows how few gradients it has seen.
    """
    count = slots["count"] + 1
    mean = _BETA1 * slots["mean"] + (1 - _BETA1) * gradient
    mean_square = _BETA2 * slots["mean_square"] + (1 - _BETA2) * jnp.square(gradient).mean(-1)
    scale = jnp.sqrt(mean_square / (1 - _BETA2**count)) + _EPSILON
    change = step.learning_rate * mean / ((1 - _BETA1**count) * scale)[:, None]
    new = rows - change, {"mean": mean, "mean_square": mean_square, "count": count}
    touched = (gradient != 0).any(-1)

    def where_touched(value: Array, old: Array) -> Array:
        return jnp.where(touched.reshape(-1, *[1] * (value.ndim - 1)), value, old)

    return jax.tree.map(where_touched, new, (rows, slots))


_ROW_ADAM = RowOptimizer(_init_adam, _update_adam)
