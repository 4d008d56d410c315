"""Scores and softmax (E3, E4) of a tile of tokens, forward and backward, for Pallas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stca_jax.ops.tiled import LOWEST_PEAK, NO_SCORE


def split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """So many references of a kernel each, and the rest of them."""
    parts, begin = [], 0
    for count in counts:
        parts.append(refs[begin : begin + count])
        begin += count
    return [*parts, refs[begin:]]


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Product over the given axes, summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)  # fmt: skip


def mask_scores(
    score: Float[Array, "t C"], start: Int[Array, "1 C"], end: Int[Array, "1 C"], position: Any
) -> Float[Array, "t C"]:
    """Scores of the tokens from `position` on; `NO_SCORE` outside a range."""
    position = position + lax.broadcasted_iota(jnp.int32, score.shape, 0)
    return jnp.where((position >= start) & (position < end), score, NO_SCORE)


def softmax_step(
    score: Float[Array, "t C"], peak: Float[Array, "1 C"], total: Float[Array, "1 C"]
) -> tuple[Float[Array, "t C"], Float[Array, "1 C"], Float[Array, "1 C"], Float[Array, "1 C"]]:
    """Weights of a tile, factor for what was summed before, and the new maximum and sum."""
    new_peak = jnp.maximum(peak, score.max(0, keepdims=True))
    weight = jnp.exp(score - new_peak)
    rescale = jnp.exp(peak - new_peak)
    return weight, rescale, new_peak, total * rescale + weight.sum(0, keepdims=True)


def join_shares(
    output: Float[Array, "s *n e c"], log_sum_exp: Float[Array, "s *n _ _"]
) -> tuple[Float[Array, "*n e c"], Float[Array, "*n _ _"]]:
    """What programs that share a band found, as one: `Kernels.forward`'s, in the layout given."""
    joined = jax.nn.logsumexp(log_sum_exp, axis=0)
    output = (output * jnp.exp(log_sum_exp - joined)).sum(0)
    return output, jnp.where(joined > LOWEST_PEAK, joined, 0)


def score_gradients(
    score: Float[Array, "t C"],
    d_weight: Float[Array, "t C"],
    log_sum_exp: Float[Array, "1 C"],
    delta: Float[Array, "1 C"],
) -> tuple[Float[Array, "t C"], Float[Array, "t C"]]:
    """Softmax weights and the gradients of the scores."""
    weight = jnp.exp(score - log_sum_exp)
    return weight, weight * (d_weight - delta)
