"""The history encoder on TPUs (Mosaic): weights stay in VMEM, tiles of tokens stream through."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention_kernels import dot
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import hidden_gradients, hidden_units, norm_gradients, normalise
from stca_jax.ops.kernels import Unencoded

_VMEM_BYTES = 14 * 2**20  # see `pallas_tpu`
_LANES = 128
_SUBLANES = 16  # of a bfloat16 register
_TILE = 512


def can_encode(encoder: HistoryEncoder, dtype: Any) -> bool:
    """Whether the weights and a tile of tokens fit VMEM."""
    known = jnp.dtype(dtype).name in ("float32", "bfloat16")
    return known and _tile(_TILE, encoder, dtype) >= _SUBLANES


def _tile(length: int, encoder: HistoryEncoder, dtype: Any) -> int:
    """Tokens of a tile: the most that fit beside the weights, and divide the padded row."""
    D, F = (-(-x // _LANES) * _LANES for x in encoder.up.shape)
    size = jnp.dtype(dtype).itemsize
    weights = 2 * 3 * D * F * (size + 4)  # and their gradients, each twice
    # Exact products of float32 are made of bfloat16 ones, whose operands take room as well.
    hidden = 14 if size == 4 else 8
    token = 2 * 3 * D * size + 8 * D * 4 + hidden * F * 4
    most = min(_TILE, (_VMEM_BYTES - weights) // token)
    tiles = (t for t in range(most - most % _SUBLANES, 0, -_SUBLANES) if length % t == 0)
    return next(tiles, 0)


def encode(unencoded: Unencoded, interpret: Any) -> Float[Array, "R L D"]:
    """See `Kernels.encode`."""
    encoder, tokens, covered = unencoded
    R, L, _ = covered.shape
    tile = _tile(L, encoder, tokens.dtype)
    weights = _weights(encoder, tokens.dtype)
    block = pl.BlockSpec((1, tile, tokens.shape[-1]), lambda r, i: (r, i, 0))
    return pl.pallas_call(
        functools.partial(_forward_kernel, skip=encoder.skip),
        grid=(R, L // tile),
        in_specs=[
            pl.BlockSpec((1, 1, 1, tile), lambda r, i: (r, i, 0, 0)), block, *map(_whole, weights),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((R, L, tokens.shape[-1]), tokens.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="history_encoder_forward",
    )(_by_tile(covered, tile), tokens, *weights)  # fmt: skip


def encode_backward(
    unencoded: Unencoded, d_encoded: Float[Array, "R L D"], interpret: Any
) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
    """See `Kernels.encode_backward`."""
    encoder, tokens, covered = unencoded
    R, L, _ = covered.shape
    D, F = encoder.up.shape
    tile = _tile(L, encoder, tokens.dtype)
    weights = _weights(encoder, tokens.dtype)[:4]
    # Some chips have two cores, which share the first axis of a grid.
    cores = 2 if R % 2 == 0 else 1
    rows = R // cores
    block = pl.BlockSpec((1, tile, D), lambda c, r, i: (c * rows + r, i, 0))
    mask = pl.BlockSpec((1, 1, 1, tile), lambda c, r, i: (c * rows + r, i, 0, 0))
    sums = [(D, F)] * 3 + [(1, D)] * 2
    d_tokens, *gradients = pl.pallas_call(
        functools.partial(_backward_kernel, skip=encoder.skip),
        grid=(cores, rows, L // tile),
        in_specs=[mask, block, block, *map(_whole, weights)],
        out_specs=[block, *(pl.BlockSpec((1, *s), lambda c, r, i: (c, 0, 0)) for s in sums)],
        out_shape=[
            jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
            *(jax.ShapeDtypeStruct((cores, *s), jnp.float32) for s in sums),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="history_encoder_backward",
    )(_by_tile(covered, tile), tokens, d_encoded, *weights)
    up, gate, out, scale, bias = (x.sum(0) for x in gradients)
    return HistoryEncoder(up, gate, out.T, scale[0], bias[0], encoder.skip), d_tokens


def _weights(encoder: HistoryEncoder, dtype: Any) -> list[Array]:
    products = [w.astype(dtype) for w in (encoder.up, encoder.gate, encoder.out.T)]
    return [*products, *(w[None].astype(jnp.float32) for w in (encoder.scale, encoder.bias))]


def _by_tile(covered: Bool[Array, "R L 1"], tile: int) -> Float[Array, "R n 1 t"]:
    return covered.astype(jnp.float32).reshape(len(covered), -1, 1, tile)


def _whole(x) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _covered(ref: Any, x: Array) -> Array:
    """Zero where nothing is covered, or behind the row's end, which holds anything."""
    mask = jnp.broadcast_to(ref[0, 0], (x.shape[1], x.shape[0])).T
    return jnp.where(mask > 0, x, 0)


def _forward_kernel(covered, tokens, up, gate, out, scale, bias, encoded, *, skip):
    x = _covered(covered, tokens[0])
    u, v = dot(x, up[...], 1, 0), dot(x, gate[...], 1, 0)
    y = dot(hidden_units(u, v).astype(x.dtype), out[...], 1, 1)
    if skip:
        y = y + x.astype(jnp.float32)
    (normal,), _ = normalise([y], y.shape[1])
    encoded[0] = (normal * scale[...] + bias[...]).astype(encoded.dtype)


def _backward_kernel(covered, tokens, d_encoded, up, gate, out, scale, d_tokens, d_up, d_gate,
                     d_out, d_scale, d_bias, *, skip):  # fmt: skip
    sums = (d_up, d_gate, d_out, d_scale, d_bias)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        for s in sums:
            s[...] = jnp.zeros_like(s)

    x = _covered(covered, tokens[0])
    d = _covered(covered, d_encoded[0]).astype(jnp.float32)
    u, v = dot(x, up[...], 1, 0), dot(x, gate[...], 1, 0)
    hidden = hidden_units(u, v).astype(x.dtype)
    y = dot(hidden, out[...], 1, 1)
    if skip:
        y = y + x.astype(jnp.float32)
    (normal,), inverse = normalise([y], y.shape[1])
    (d_y,) = norm_gradients([normal], inverse, [d * scale[...]], y.shape[1])
    low = d_y.astype(x.dtype)
    d_u, d_v = (g.astype(x.dtype) for g in hidden_gradients(u, v, dot(low, out[...], 1, 0)))
    d_x = dot(d_u, up[...], 1, 1) + dot(d_v, gate[...], 1, 1)
    d_tokens[0] = (d_x + d_y if skip else d_x).astype(d_tokens.dtype)
    d_up[0] += dot(x, d_u, 0, 0)
    d_gate[0] += dot(x, d_v, 0, 0)
    d_out[0] += dot(low, hidden, 0, 0)
    d_scale[0] += (normal * d).sum(0, keepdims=True)
    d_bias[0] += d.sum(0, keepdims=True)
