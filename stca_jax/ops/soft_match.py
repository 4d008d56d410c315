"""Soft counts: how much of a target's range is like the target, field by field.

For a target with row e_t of a field's table and the events l of its range with rows e_l,

    n = sum over the range of exp(-a (1 - cos(e_t, e_l)))        soft count = log(1 + n)

with a learned sharpness a of each field. An event that carries the target's id counts 1 and others
less, the less they are like it: as a grows this becomes the exact count. Scores are never stored,
and tiles that no range touches cost nothing. Where the attention has kernels, they compute the sum
as its log-sum-exp, with fields as rows; elsewhere it is a plain sum, which gathers no values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention import best_implementation, target_to_history_attention
from stca_jax.ops.range_sum import range_sum
from stca_jax.ops.sharded import platform
from stca_jax.ops.tiles import default_block_sizes
from stca_jax.ranges import Ranges, SharedRanges

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
      ValueError: rows or length do not divide over the mesh, see `on_mesh`.
    """
    query, rows = _unit_rows(target) * sharpness[:, None], _unit_rows(history)
    if best_implementation() == "triton":
        return jax.nn.softplus(_log_sum_exp(query, rows, ranges) - sharpness)
    sizes = default_block_sizes(
        history.shape[1], target.shape[1], platform(), is_shared=isinstance(ranges, SharedRanges)
    )
    return jnp.log1p(range_sum(_alike, sharpness, query, rows, ranges, block_sizes=sizes))


def _alike(
    sharpness: Float[Array, " F"],
    query: Float[Array, "C F W"],
    rows: Float[Array, "T F W"],
    in_range: Bool[Array, "C T"],
) -> Float[Array, "C F"]:
    """Sums over the T tokens of a pair of tiles."""
    score = jnp.einsum("cfw,tfw->fct", query, rows) - sharpness[:, None, None]
    return jnp.where(in_range, jnp.exp(score), 0).sum(-1).T


def _log_sum_exp(
    query: Float[Array, "R M F W"], rows: Float[Array, "R L F W"], ranges: Ranges
) -> Float[Array, "R M F"]:
    """Of the scores in range, by the attention's kernels, with fields as rows."""
    R, M, F, W = query.shape

    def fields_as_rows(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 1).reshape(R * F, x.shape[1], W)

    identity = jnp.eye(W, dtype=query.dtype)[:, None]
    found = target_to_history_attention(
        fields_as_rows(query * W**0.5)[:, :, None],  # the op divides scores by sqrt(W)
        fields_as_rows(rows),
        identity,
        identity,
        Ranges(*(jnp.repeat(x, F, axis=0) for x in ranges)),
    )
    return jnp.moveaxis(found.log_sum_exp.reshape(R, F, M), 1, 2)


def _unit_rows(rows: Float[Array, "... W"]) -> Float[Array, "... W"]:
    """Rows of unit length."""
    return rows * jax.lax.rsqrt(jnp.square(rows).sum(-1, keepdims=True) + _EPSILON)
