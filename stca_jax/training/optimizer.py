"""Optimizers: optax for dense parameters, row-wise Adagrad for embedding tables."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn.

    Both learning rates follow the same schedule: linear warm-up, then a cosine to `final_fraction`.

    Attributes:
      dense: Optimizer of everything but the tables.
      learning_rate: Its peak learning rate.
      weight_decay: Decoupled weight decay of the dense parameters.
      clip_norm: The dense gradient is scaled down to at most this global norm.
      table_learning_rate: Peak learning rate of the tables' row-wise Adagrad.
      table_accumulator: What a row's sum of squared gradients starts from.
      warmup_steps: Length of the warm-up.
      final_fraction: Learning rate at the last step over the peak.
    """

    dense: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    table_learning_rate: float = 0.03
    table_accumulator: float = 1e-8
    warmup_steps: int = 100
    final_fraction: float = 0.02

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name in ("learning_rate", "clip_norm", "table_learning_rate", "table_accumulator"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("weight_decay", "warmup_steps", "final_fraction"):
            if getattr(self, name) < 0:
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


def dense_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or RMSProp with the schedule."""
    fraction = schedule(config, num_steps)

    def learning_rate(step: Array) -> Array:
        return config.learning_rate * fraction(step)

    if config.dense == "adamw":
        update = optax.adamw(learning_rate, weight_decay=config.weight_decay)
    else:
        update = optax.chain(
            optax.scale_by_rms(),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def adagrad_rows(
    table: Float[Array, "V W"],
    accumulator: Float[Array, " V"],
    ids: Int[Array, " U"],
    gradient: Float[Array, "U W"],
    learning_rate: Float[Array, ""],
) -> tuple[Float[Array, "V W"], Float[Array, " V"]]:
    """Row-wise Adagrad on the touched rows only: one accumulated square per row.

    Rows with a zero gradient stay as they are, so updating only the rows that a batch touches is
    exactly the dense update.

    Args:
      table: Embedding rows.
      accumulator: Sum over steps of the mean squared gradient of each row.
      ids: Distinct row ids; an id >= V is an unused place and is dropped.
      gradient: Gradient of those rows.
      learning_rate: Scalar.
    """
    squares = accumulator.at[ids].get(mode="clip") + jnp.square(gradient).mean(-1)
    step = -learning_rate * gradient / jnp.sqrt(squares)[:, None]
    return table.at[ids].add(step, mode="drop"), accumulator.at[ids].set(squares, mode="drop")
