"""What the Pallas kernels share: layout, ranges, and the rule that joins forward and backward.

A kernel works on one target tile and one history tile at a time, in the transposed layout

    query [E, C]   keys, values [t, E]   scores [t, C]   output [E, C]

where the C targets x heads of a tile lie along lanes: ranges, maxima and sums are rows of C.
The history tiles that a target tile needs are a band `[first, last)`; the others are skipped.
Encoded tokens are arrays of the whole row here; scores never are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.encoder import encode_history
from stca_jax.ops.tiled import Weights
from stca_jax.ops.tiles import BlockSizes, Tiling, make_tiling, tile_targets, untile_targets

# Finite, so that an empty range never computes inf - inf; exp(NO_SCORE - LOWEST_PEAK) is zero.
NO_SCORE = -1e30
LOWEST_PEAK = -1e20


class Inputs(NamedTuple):
    """Inputs of the kernels.

    Attributes:
      query: Scaled queries by target tile.
      key: Keys by row, padded to whole history tiles.
      value: Values.
      start: First token of each target's range, repeated for its heads.
      end: One past its last token.
      first: First history tile that some target of the tile needs.
      last: One past the last one; not above `first` if none.
    """

    query: Float[Array, "J G E C"]
    key: Float[Array, "R G L E"]
    value: Float[Array, "R G L E"]
    start: Int[Array, "J 1 C"]
    end: Int[Array, "J 1 C"]
    first: Int[Array, " J"]
    last: Int[Array, " J"]


class Kernels(Protocol):
    """Forward and backward of one kind of device."""

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """Weighted sums [J, G, E, C] and log-sum-exps [J, G, 1, C], 0 where empty."""

    def backward(
        self, tiling: Tiling, inputs: Inputs, d_output: Array, log_sum_exp: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients of query, key and value."""


def kernel_attention(
    kernels: Kernels,
    query: Float[Array, "R M G A E"],
    tokens: Float[Array, "R L D"],
    weights: Weights,
    covered: Bool[Array, "R L"],
    history_start: Int[Array, "R M"],
    history_end: Int[Array, "R M"],
    history_score: Float[Array, "R L H"] | None,
    sizes: BlockSizes,
) -> tuple[Float[Array, "R M G A E"], Float[Array, "R M G A"]]:
    """`tiled_attention` by kernels; same arguments and results."""
    R, M, _, A, E = query.shape
    x = jnp.where(covered[..., None], tokens, 0)
    if weights.encoder is not None:
        x = encode_history(weights.encoder, x)
    if weights.w_key is None or weights.w_value is None:
        key = value = x[:, None]
    else:
        key, value = (jnp.einsum("rld,dgk->rglk", x, w) for w in (weights.w_key, weights.w_value))
    if history_score is not None:
        score = jnp.where(covered[..., None], history_score, 0).astype(jnp.float32)
        query, key = _with_score(query, key, score)
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, query.shape[-1] - E)])
    tiling = make_tiling(R, tokens.shape[1], M, sizes)
    padding = tiling.tiles_per_row * tiling.history - tokens.shape[1]
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (key, value))
    stacked = tile_targets(query, tiling).transpose(0, 2, 4, 3, 1)  # [J, G, E, A, m]
    first, last = _bands(history_start, history_end, tiling)
    start, end = (
        jnp.tile(tile_targets(x, tiling), A)[:, None] for x in (history_start, history_end)
    )
    inputs = Inputs(stacked.reshape(*stacked.shape[:3], -1), key, value, start, end, first, last)
    output, log_sum_exp = _attend(kernels, tiling, inputs)

    def unstack(x: Float[Array, "J G e C"]) -> Float[Array, "R M G A e"]:
        x = x.reshape(*x.shape[:3], A, tiling.targets).transpose(0, 4, 1, 3, 2)
        return untile_targets(x, tiling, M)

    return unstack(output)[..., :E], unstack(log_sum_exp)[..., 0]


def _with_score(
    query: Float[Array, "R M G A E"], key: Float[Array, "R G L E"], score: Float[Array, "R L H"]
) -> tuple[Array, Array]:
    """Adds a token's score to every query's through extra columns of keys and queries.

    Three columns per head sum to the float32 score in any dtype: bfloat16 keeps 8 bits in each.
    """
    R, M, G, A, _ = query.shape
    parts, rest = [], score
    for _ in range(3):
        parts.append(rest.astype(key.dtype))
        rest = rest - lax.stop_gradient(parts[-1]).astype(jnp.float32)
        rest = lax.stop_gradient(rest)
    columns = jnp.stack(parts, -1).reshape(R, -1, G, A * 3).swapaxes(1, 2)
    ones = jnp.repeat(jnp.eye(A, dtype=query.dtype), 3, axis=1)
    ones = jnp.broadcast_to(ones, (R, M, G, A, 3 * A))
    return jnp.concatenate([query, ones], -1), jnp.concatenate([key, columns], -1)


def _bands(start: Array, end: Array, tiling: Tiling) -> tuple[Int[Array, " J"], Int[Array, " J"]]:
    nonempty = end > start
    first = tile_targets(jnp.where(nonempty, start, jnp.iinfo(jnp.int32).max - 1), tiling)
    padded = tile_targets(nonempty, tiling)
    first = jnp.where(padded, first, jnp.iinfo(jnp.int32).max).min(1) // tiling.history
    last = tile_targets(jnp.where(nonempty, end, 0), tiling).max(1)
    return first.astype(jnp.int32), (-(-last // tiling.history)).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels: Kernels, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
    return _forward(kernels, tiling, inputs)[0]


def _forward(kernels: Kernels, tiling: Tiling, inputs: Inputs) -> tuple[Any, Any]:
    output, log_sum_exp = kernels.forward(tiling, inputs)
    nonempty = (inputs.end > inputs.start)[:, None]
    shown = jnp.where(nonempty, log_sum_exp, -jnp.inf)
    return (output, shown), (inputs, output, log_sum_exp)


def _backward(kernels: Kernels, tiling: Tiling, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    inputs, output, log_sum_exp = residuals
    nonempty = (inputs.end > inputs.start)[:, None]
    d_output, d_log_sum_exp = (jnp.where(nonempty, x, 0) for x in cotangents)
    # d(score) = weight * (d(weight) - delta), log-sum-exp included: its gradient is the weight.
    delta = (d_output * output).sum(2, keepdims=True) - d_log_sum_exp
    d_query, d_key, d_value = kernels.backward(
        tiling, inputs, d_output.astype(inputs.query.dtype), log_sum_exp, delta
    )
    gradients: dict[str, Any] = dict.fromkeys(Inputs._fields)  # None: integers have no gradient
    gradients |= {
        "query": d_query.astype(inputs.query.dtype),
        "key": d_key.astype(inputs.key.dtype),
        "value": d_value.astype(inputs.value.dtype),
    }
    return (Inputs(**gradients),)


_attend.defvjp(_forward, _backward)
