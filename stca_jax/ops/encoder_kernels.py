"""The history FFN and its LayerNorm (E1) on a tile of tokens, forward and backward, for Pallas.

    u = x W_u   v = x W_v   h = u * swish(v)   y = h W_o [+ x]   x~ = LN(y)

A tile's hidden units u, v, h never reach memory.  Nothing of the forward pass is kept but the
tokens: the backward pass computes the rest again.  Arrays [t, D] come as lists of parts of D, for
Triton has powers of two only.  W_o is stored as [D, F] here, like W_u and W_v.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention_kernels import dot
from stca_jax.ops.encoder import LAYER_NORM_EPSILON, HistoryEncoder

Parts = list[Array]


class Unencoded(NamedTuple):
    """Tokens, and what encodes them.

    Attributes:
      encoder: Weights of any dtype.
      tokens: What is not covered may hold anything.
      covered: Padded with False to whole history tiles.
    """

    encoder: HistoryEncoder
    tokens: Float[Array, "R n D"]
    covered: Bool[Array, "R L 1"]


def products(x: Parts, weight: Parts) -> Float[Array, "t f"]:
    """X W, for parts [t, d] of the tokens and parts [d, f] of the weight."""
    return sum(dot(a, b, 1, 0) for a, b in zip(x, weight, strict=True))  # type: ignore[return-value]


def hidden_units(u: Float[Array, "t f"], v: Float[Array, "t f"]) -> Float[Array, "t f"]:
    """float32 u * swish(v)."""
    return u * v * jax.nn.sigmoid(v)


def hidden_gradients(
    u: Float[Array, "t f"], v: Float[Array, "t f"], d_hidden: Float[Array, "t f"]
) -> tuple[Float[Array, "t f"], Float[Array, "t f"]]:
    """Gradients of u and v, float32."""
    gate = jax.nn.sigmoid(v)
    swish = v * gate
    return d_hidden * swish, d_hidden * u * (gate + swish * (1 - gate))


def normalise(y: Parts, width: int) -> tuple[Parts, Float[Array, "t 1"]]:
    """Zero mean and unit variance over the first `width` columns; what it was divided by, inverse.

    Columns from `width` on are 0, and stay so.
    """
    centre = sum(a.sum(1, keepdims=True) for a in y) / width
    y, offset = [a - centre for a in y], 0
    for k, a in enumerate(y):
        offset += a.shape[1]
        if offset > width:
            column = offset - a.shape[1] + lax.broadcasted_iota(jnp.int32, a.shape, 1)
            y[k] = jnp.where(column < width, a, 0)
    variance = sum((a * a).sum(1, keepdims=True) for a in y) / width
    inverse = lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return [a * inverse for a in y], inverse


def norm_gradients(
    normal: Parts, inverse: Float[Array, "t 1"], d_normal: Parts, width: int
) -> Parts:
    """Gradients of y, from those of what `normalise` returned first."""
    mean = sum(d.sum(1, keepdims=True) for d in d_normal) / width
    pairs = zip(normal, d_normal, strict=True)
    slope = sum((n * d).sum(1, keepdims=True) for n, d in pairs) / width
    return [inverse * (d - mean - n * slope) for n, d in zip(normal, d_normal, strict=True)]
