"""Target-to-history attention: m targets attend to contiguous ranges of one flat row of history.

The op is E3 and E4 of the paper.  History tokens never interact, so a range is only a mask on
scores: targets of several requests, users and windows share a row exactly.

Two orders of the same algebra (`order`):

- "projected": K = X W_K and V = X W_V, then attention over K and V;
- "absorbed": u = q W_K^T, attention over X itself, then W_V on the m weighted sums.

Dimensions: R rows, L history tokens per row, M targets per row, H heads, K head width, D token width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import covered_tokens

Order = Literal["absorbed", "projected"]
Implementation = Literal["reference"]


class AttentionOutput(NamedTuple):
    """What a target gathered from its range.

    Attributes:
      output: Per-head weighted sums of values (o^ij of E4); zero for an empty range.
      log_sum_exp: float32 log of the sum of exp(scores) over the range: how much of the history
        matched.  `-inf`, with zero gradient, for an empty range.
    """

    output: Float[Array, "R M H K"]
    log_sum_exp: Float[Array, "R M H"]


def target_to_history_attention(
    query: Float[Array, "R M H K"],
    history: Float[Array, "R L D"],
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
    history_start: Int[Array, "R M"],
    history_end: Int[Array, "R M"],
    *,
    history_score: Float[Array, "R L H"] | None = None,
    order: Order | None = None,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """Softmax attention of each target over its own range of the row (E3, E4).

    Scores are `query . (history w_key) / sqrt(K) + history_score`, in float32 like the softmax and
    the sums, whatever the inputs' dtype.  Tokens that no range covers may hold anything, NaN
    included.  Differentiable in `query`, `history`, `w_key`, `w_value` and `history_score`.

    Args:
      query: Queries after W_Q, not yet scaled.
      history: Encoded tokens X~ of E1.
      w_key: W_K of E3 for all heads.
      w_value: W_V of E4 for all heads.
      history_start: First token of each target's range.
      history_end: One past its last token; `start == end` is an empty history.
      history_score: Optional additive score of each token and head, the same for every target.
      order: "absorbed" or "projected"; None takes the one with fewer FLOPs.
      implementation: "reference"; None takes the fastest that works here.

    Returns:
      `AttentionOutput`; `output` has the dtype of `query`.
    """
    del implementation  # one so far
    M, H = query.shape[1:3]
    order = order or cheaper_order(M, H, history.shape[-1])
    covered = covered_tokens(history_start, history_end, history.shape[1])
    history = jnp.where(covered[..., None], history, 0)
    position = jnp.arange(history.shape[1])
    in_range = (position >= history_start[..., None]) & (position < history_end[..., None])
    score = _scores(query, history, w_key, order) / jnp.sqrt(jnp.float32(query.shape[-1]))
    if history_score is not None:
        score += jnp.where(covered[..., None], history_score, 0).astype(jnp.float32)[:, None]
    weight, log_sum_exp = _masked_softmax(score, in_range)
    return AttentionOutput(
        _weighted_values(weight, history, w_value, order).astype(query.dtype), log_sum_exp
    )


def cheaper_order(num_targets: int, num_heads: int, width: int) -> Order:
    """The order with fewer FLOPs: projecting L tokens pays when m > d / (h - 1)."""
    return "projected" if num_targets * (num_heads - 1) > width else "absorbed"


def _scores(query: Array, history: Array, w_key: Array, order: Order) -> Float[Array, "R M L H"]:
    if order == "projected":
        key = jnp.einsum("rld,dhk->rlhk", history, w_key)
        return jnp.einsum("rmhk,rlhk->rmlh", query, key, preferred_element_type=jnp.float32)
    absorbed = jnp.einsum("rmhk,dhk->rmhd", query, w_key)
    return jnp.einsum("rmhd,rld->rmlh", absorbed, history, preferred_element_type=jnp.float32)


def _masked_softmax(
    score: Float[Array, "R M L H"], in_range: Bool[Array, "R M L"]
) -> tuple[Float[Array, "R M L H"], Float[Array, "R M H"]]:
    """Softmax over the range and its log-sum-exp; zero and -inf, without NaN gradients, if empty."""
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
