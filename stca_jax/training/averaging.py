"""Exponential moving average of the dense parameters, kept beside an optimizer's own state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class AveragedState(NamedTuple):
    """State of `with_average`.

    Attributes:
      updates: How many there were.
      average: Of the parameters, shaped like them.
      inner: State of the optimizer.
    """

    updates: Int[Array, ""]
    average: Any
    inner: Any


def with_average(
    transform: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Also keeps average = d average + (1 - d) parameters, after each update.

    d = min(decay, (1 + t) / (10 + t)) at the t-th update, from 0, so that the initial parameters
    are soon forgotten however slow the decay.

    Args:
      transform: The optimizer.
      decay: In (0, 1).
    """

    def init(parameters: Any) -> AveragedState:
        return AveragedState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, parameters), transform.init(parameters)
        )

    def update(
        gradients: Any, state: AveragedState, parameters: Any = None
    ) -> tuple[Any, AveragedState]:
        updates, inner = transform.update(gradients, state.inner, parameters)
        weight = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        average = jax.tree.map(
            lambda a, p: weight * a + (1 - weight) * p,
            state.average,
            optax.apply_updates(parameters, updates),
        )
        return updates, AveragedState(state.updates + 1, average, inner)

    return optax.GradientTransformation(init, update)
