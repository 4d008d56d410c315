"""Layers that every part of the model uses: SwiGLU, LayerNorm, and parameters with logical axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from stca_jax.ops.encoder import LAYER_NORM_EPSILON, gated_linear, layer_norm
from stca_jax.ops.sharded import platform

_ROWS_OF_A_CHUNK = 256  # a hidden layer of 128 for four tokens of each is half a megabyte

Initializer = Callable[[Array, tuple[int, ...]], Array]


def recomputed(function: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """The function; if `remat`, the backward pass keeps its inputs only and runs it again."""
    return jax.checkpoint(lambda *args: function(*args)) if remat else function


def in_chunks(function: Callable[[Any], Array], rows: Any) -> Array:
    """`function(rows)`, which treats each row alone; on one CPU device a chunk after the other.

    There, memory traffic is what element-wise chains cost: a chunk's activations stay in the cache,
    and the backward pass computes them again rather than read them from memory.

    Args:
      function: Maps arrays [*N, width] to one array [*N, out], for any N.
      rows: Its argument, a pytree of arrays.
    """
    shape = jax.tree.leaves(rows)[0].shape[:-1]
    num_rows = math.prod(shape)
    # What is exported for any number of rows has a symbol for it.
    if not _on_one_cpu() or not isinstance(num_rows, int) or num_rows <= _ROWS_OF_A_CHUNK:
        return function(rows)
    num_chunks = -(-num_rows // _ROWS_OF_A_CHUNK)
    size = -(-num_rows // num_chunks)
    padding = num_chunks * size - num_rows

    def cut(x: Array) -> Array:
        padded = jnp.pad(x.reshape(num_rows, x.shape[-1]), ((0, padding), (0, 0)))
        return padded.reshape(num_chunks, size, x.shape[-1])

    found = lax.map(recomputed(function, True), jax.tree.map(cut, rows))
    return found.reshape(-1, found.shape[-1])[:num_rows].reshape(*shape, found.shape[-1])


def in_two_axes(function: Callable[[Array], Array], x: Float[Array, "... in"]) -> Array:
    """`function(x)`, which maps the last axis; on one CPU device of a matrix.

    There, XLA copies operands of products with more axes, to turn them.  Several devices may divide
    those axes.
    """
    if not _on_one_cpu():
        return function(x)
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _on_one_cpu() -> bool:
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def scaled_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Normal with variance 1 / fan-in: what a bias-free linear map starts from."""
    return jax.random.normal(key, shape) / jnp.sqrt(shape[0])


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    init: Initializer = scaled_normal,
) -> nnx.Param:
    """A float32 parameter that names its axes.

    `stca_jax.training.sharding` maps the names to mesh axes; the model knows nothing of meshes.
    """
    return nnx.Param(init(rngs.params(), shape), logical_axes=logical_axes)


def is_matrix(name: str, parameter: Any) -> bool:
    """Whether a parameter multiplies activations: no scale, bias, sink, rate, or table.

    Args:
      name: Its attribute's; `rows` is a table, and what ends with `bias` is added.
      parameter: Anything with a number of dimensions.
    """
    return parameter.ndim > 1 and name != "rows" and not name.endswith("bias")


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    """All zeros; takes a key to be an `Initializer`."""
    del key
    return jnp.zeros(shape)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
    """All ones; takes a key to be an `Initializer`."""
    del key
    return jnp.ones(shape)


class Linear(nnx.Module):
    """x W, computed in the dtype of x; with a bias only where the equations have one."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        logical_axes: tuple[str | None, str | None] = ("embed", "embed_out"),
        use_bias: bool = False,
    ):
        self.weight = parameter(rngs, (in_width, out_width), logical_axes)
        self.bias = parameter(rngs, (out_width,), logical_axes[1:], zeros) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Maps the last axis."""
        y = in_two_axes(lambda x: x @ self.weight[...].astype(x.dtype), x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class SwiGLU(nnx.Module):
    """((x W_u) * swish(x W_v)) W_o without biases.

    `up` and `gate` are separate weights: one fused [in, 2 hidden] matrix was measured slower.
    """

    def __init__(self, in_width: int, hidden_width: int, out_width: int, *, rngs: nnx.Rngs):
        self.up = parameter(rngs, (in_width, hidden_width), ("embed", "mlp"))
        self.gate = parameter(rngs, (in_width, hidden_width), ("embed", "mlp"))
        self.out = parameter(rngs, (hidden_width, out_width), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Maps the last axis."""

        def ffn(x: Float[Array, "N in"]) -> Float[Array, "N out"]:
            return gated_linear(x, self.up[...], self.gate[...]) @ self.out[...].astype(x.dtype)

        return in_two_axes(ffn, x)


class LayerNorm(nnx.Module):
    """Normalises the last axis, with scale and bias; statistics in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), ("embed",), ones)
        self.bias = parameter(rngs, (width,), ("embed",), zeros)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Keeps shape and dtype."""
        return layer_norm(x, self.scale[...], self.bias[...]).astype(x.dtype)


class RmsNorm(nnx.Module):
    """Divides the last axis by its root mean square, with a scale; statistics in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), ("embed",), ones)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Keeps shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
        return (y * self.scale[...]).astype(x.dtype)
