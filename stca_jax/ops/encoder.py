"""E1: the history encoder, as a function of plain arrays, so that tiles can call it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYER_NORM_EPSILON = 1e-6


class HistoryEncoder(NamedTuple):
    """Weights of a layer's history FFN (SwiGLU without biases) and LayerNorm.

    Attributes:
      up: W_u.
      gate: W_v.
      out: W_o.
      scale: LayerNorm scale.
      bias: LayerNorm bias.
    """

    up: Float[Array, "D F"]
    gate: Float[Array, "D F"]
    out: Float[Array, "F D"]
    scale: Float[Array, " D"]
    bias: Float[Array, " D"]


def encode_history(encoder: HistoryEncoder, tokens: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """LN(((x W_u) * swish(x W_v)) W_o), in the dtype of the tokens; statistics in float32."""
    return encode_transposed(transpose_out(encoder), tokens)


def transpose_out(encoder: HistoryEncoder) -> HistoryEncoder:
    """The same weights with `out` stored as [D, F], as `encode_transposed` reads them."""
    return encoder._replace(out=encoder.out.T)


def encode_transposed(
    encoder: HistoryEncoder, tokens: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """`encode_history` for weights from `transpose_out`.

    The gradient of W_o is then a [D, F] product, which XLA's CPU GEMMs do half again as fast as a
    [F, D] one; in a loop over blocks it must be accumulated in that layout too.
    """
    up, gate, out = (w.astype(tokens.dtype) for w in encoder[:3])
    hidden = (tokens @ up) * jax.nn.swish(tokens @ gate)
    y = jnp.einsum("...f,df->...d", hidden, out).astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    return (y * encoder.scale + encoder.bias).astype(tokens.dtype)
