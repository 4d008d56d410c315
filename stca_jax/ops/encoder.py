"""E1: the history encoder, and what it is made of, as functions of plain arrays.

`stca_jax.models.layers` has the same two layers as modules, which call these functions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYER_NORM_EPSILON = 1e-6


def gated_linear(
    x: Float[Array, "... D"], up: Float[Array, "D F"], gate: Float[Array, "D F"]
) -> Float[Array, "... F"]:
    """(x W_u) * swish(x W_v), the hidden units of a SwiGLU, in the dtype of x."""
    return (x @ up.astype(x.dtype)) * jax.nn.swish(x @ gate.astype(x.dtype))


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"]
) -> Float[Array, "... D"]:
    """Normalises the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    return y * scale + bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryEncoder:
    """Weights of a layer's history FFN (SwiGLU without biases) and LayerNorm.

    Implementations of the op encode tokens by `encode_history` or `encode_transposed`; Pallas
    kernels have their own (`stca_jax.ops.encoder_kernels`).

    Attributes:
      up: W_u.
      gate: W_v.
      out: W_o.
      scale: LayerNorm scale.
      bias: LayerNorm bias.
      skip: Static. Adds the token to what its FFN gives, before the LayerNorm; E1 has no such path.
    """

    up: Float[Array, "D F"]
    gate: Float[Array, "D F"]
    out: Float[Array, "F D"]
    scale: Float[Array, " D"]
    bias: Float[Array, " D"]
    skip: bool = dataclasses.field(default=False, metadata={"static": True})


def encode_history(encoder: HistoryEncoder, tokens: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """E1: LN([x +] ((x W_u) * swish(x W_v)) W_o), in the tokens' dtype; statistics in float32."""
    return encode_transposed(transpose_out(encoder), tokens)


def transpose_out(encoder: HistoryEncoder) -> HistoryEncoder:
    """The same weights with `out` stored as [D, F], as `encode_transposed` reads them."""
    return dataclasses.replace(encoder, out=encoder.out.T)


def encode_transposed(
    encoder: HistoryEncoder, tokens: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """`encode_history` for weights from `transpose_out`.

    The gradient of W_o is then a [D, F] product, which XLA's CPU GEMMs do half again as fast as a
    [F, D] one; in a loop over blocks it must be accumulated in that layout too.
    """
    hidden = gated_linear(tokens, encoder.up, encoder.gate)
    y = jnp.einsum("...f,df->...d", hidden, encoder.out.astype(tokens.dtype))
    if encoder.skip:
        y = y.astype(jnp.float32) + tokens.astype(jnp.float32)
    return layer_norm(y, encoder.scale, encoder.bias).astype(tokens.dtype)
