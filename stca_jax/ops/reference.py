"""The op written as einsums: what every other implementation must equal.  Memory grows with M L."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stca_jax.ops.encoder import encode_history
from stca_jax.ops.implementation import Implementation, Order, Tokens, Weights
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges


class Reference(Implementation):
    """E1, E3 and E4 as einsums over whole rows, anywhere: arrays [R, M, L, H] and [R, L, D]."""

    def attend(
        self,
        query: Float[Array, "R M H K"],
        tokens: Tokens,
        weights: Weights,
        ranges: Ranges,
        order: Order,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M H K"], Float[Array, "R M H"]]:
        """See `Implementation`; it has no tiles."""
        del block_sizes
        covered = ranges.covered(tokens.value.shape[1])[..., None]
        history = jnp.where(covered, tokens.value, 0)
        score = None if tokens.score is None else jnp.where(covered, tokens.score, 0)
        if weights.encoder is not None:
            history = encode_history(weights.encoder, history)
        weight, log_sum_exp = attention_weights(query, history, weights.w_key, ranges, score, order)
        return _weighted_values(weight, history, weights.w_value, order), log_sum_exp


def attention_weights(
    query: Float[Array, "R M H K"],
    history: Float[Array, "R L D"],
    w_key: Float[Array, "D H K"],
    ranges: Ranges,
    history_score: Float[Array, "R L H"] | None = None,
    order: Order = "absorbed",
) -> tuple[Float[Array, "R M L H"], Float[Array, "R M H"]]:
    """E3: how much of its attention each target gives to each token, to be looked at.

    Args:
      query: Queries after W_Q, not yet scaled.
      history: Encoded tokens X~ of E1, finite everywhere.
      w_key: W_K for all heads.
      ranges: Of each target.
      history_score: Additive score of each token and head, finite everywhere.
      order: Which algebra.

    Returns:
      float32 weights, which sum to 1 over a range that is not empty and are 0 outside, and the
      log-sum-exps of the scores.
    """
    score = _scores(query, history, w_key, order) / jnp.sqrt(jnp.float32(query.shape[-1]))
    if history_score is not None:
        score += history_score.astype(jnp.float32)[:, None]
    return _masked_softmax(score, ranges.contain(jnp.arange(history.shape[1])))


def _scores(query: Array, history: Array, w_key: Array, order: Order) -> Float[Array, "R M L H"]:
    if order == "projected":
        key = jnp.einsum("rld,dhk->rlhk", history, w_key)
        return jnp.einsum("rmhk,rlhk->rmlh", query, key, preferred_element_type=jnp.float32)
    absorbed = jnp.einsum("rmhk,dhk->rmhd", query, w_key)
    return jnp.einsum("rmhd,rld->rmlh", absorbed, history, preferred_element_type=jnp.float32)


def _masked_softmax(
    score: Float[Array, "R M L H"], in_range: Bool[Array, "R M L"]
) -> tuple[Float[Array, "R M L H"], Float[Array, "R M H"]]:
    """Softmax over the range and its log-sum-exp; if empty, 0 and -inf without NaN gradients."""
    mask = in_range[..., None]
    score = jnp.where(mask, score, -jnp.inf)
    nonempty = mask.any(-2)
    peak = jax.lax.stop_gradient(jnp.where(nonempty, score.max(-2), 0))
    weight = jnp.where(mask, jnp.exp(jnp.where(mask, score - peak[:, :, None], 0)), 0)
    total = weight.sum(-2)
    safe_total = jnp.where(nonempty, total, 1)
    log_sum_exp = jnp.where(nonempty, jnp.log(safe_total) + peak, -jnp.inf)
    return weight / safe_total[:, :, None], log_sum_exp


def _weighted_values(
    weight: Array, history: Array, w_value: Array, order: Order
) -> Float[Array, "R M H K"]:
    if order == "projected":
        value = jnp.einsum("rld,dhk->rlhk", history, w_value)
        return jnp.einsum("rmlh,rlhk->rmhk", weight, value, preferred_element_type=jnp.float32)
    summed = jnp.einsum("rmlh,rld->rmhd", weight, history, preferred_element_type=jnp.float32)
    return jnp.einsum("rmhd,dhk->rmhk", summed, w_value, preferred_element_type=jnp.float32)
