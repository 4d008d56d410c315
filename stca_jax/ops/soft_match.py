"""Soft counts: how much of a target's range is like the target, field by field.

For a target with row e_t of a field's table and the events l of its range with rows e_l,

    n = sum over the range of exp(-a (1 - cos(e_t, e_l)))        soft count = log(1 + n)

with a learned sharpness a of each field. An event that carries the target's id counts 1 and others
less, the less they are like it: as a grows this becomes the exact count. Sums over a range are what
attention's log-sum-exp is, so that the attention op computes it, with fields as rows: scores are
never stored, and tiles that no range touches cost nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stca_jax.ops.attention import target_to_history_attention
from stca_jax.ranges import Ranges

INITIAL_SHARPNESS = 5.0
_EPSILON = 1e-12  # of a square norm: a row of zeros is like nothing


def soft_counts(
    target: Float[Array, "R M F W"],
    history: Float[Array, "R L F W"],
    sharpness: Float[Array, " F"],
    ranges: Ranges,
) -> Float[Array, "R M F"]:
    """log(1 + n) of each target and field; 0 for an empty range.

    Differentiable in the rows and the sharpness. Tokens that no range covers may hold anything
    finite.

    Args:
      target: Rows of the targets' ids.
      history: Rows of the events' ids.
      sharpness: a of each field.
      ranges: Of each target.

    Raises:
      ValueError: see `target_to_history_attention`.
    """
    R, M, F, W = target.shape

    def fields_as_rows(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 1).reshape(R * F, x.shape[1], W)

    # The op divides scores by sqrt(W).
    query = fields_as_rows(_unit_rows(target) * (sharpness * W**0.5)[:, None])
    identity = jnp.eye(W, dtype=query.dtype)[:, None]
    found = target_to_history_attention(
        query[:, :, None],
        fields_as_rows(_unit_rows(history)),
        identity,
        identity,
        Ranges(*(jnp.repeat(x, F, axis=0) for x in ranges)),
    )
    log_sum_exp = jnp.moveaxis(found.log_sum_exp.reshape(R, F, M), 1, 2)
    return jax.nn.softplus(log_sum_exp - sharpness)


def _unit_rows(rows: Float[Array, "... W"]) -> Float[Array, "... W"]:
    """Rows of unit length."""
    return rows * jax.lax.rsqrt(jnp.square(rows).sum(-1, keepdims=True) + _EPSILON)
