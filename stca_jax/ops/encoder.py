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


def encode_history(
    encoder: HistoryEncoder, tokens: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """LN(((x W_u) * swish(x W_v)) W_o), in the dtype of the tokens; statistics in float32."""
    up, gate, out = (w.astype(tokens.dtype) for w in encoder[:3])
    hidden = (tokens @ up) * jax.nn.swish(tokens @ gate)
    y = (hidden @ out).astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    return (y * encoder.scale + encoder.bias).astype(tokens.dtype)
