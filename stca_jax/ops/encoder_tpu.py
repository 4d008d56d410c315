"""The history encoder on TPUs (Mosaic): weights stay in VMEM, tiles of tokens stream through.

The backward kernel takes the gradients of a tile of encoded tokens from memory or computes them
itself, see `Incoming`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention_kernels import dot, split
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import (
    Unencoded,
    hidden_gradients,
    hidden_units,
    norm_gradients,
    normalise,
)

_VMEM_BYTES = 14 * 2**20  # see `pallas_tpu`
_LANES = 128
_SUBLANES = 16  # of a bfloat16 register
_TILE = 512


class Room(NamedTuple):
    """Bytes of VMEM that a kernel needs beside the encoder's own.

    Attributes:
      fixed: Whatever its tile.
      token: For each token of the tile.
    """

    fixed: int = 0
    token: int = 0


_NONE = Room()


class Refs(NamedTuple):
    """References to what a backward kernel reads and writes of the encoder and a tile.

    Attributes:
      covered: Of the tile.
      tokens: Of the tile.
      weights: W_u, W_v and W_o as [D, F], scale and bias.
      d_tokens: To be written.
      sums: Gradients of the weights, summed over the tiles of a core.
    """

    covered: Any
    tokens: Any
    weights: Sequence[Any]
    d_tokens: Any
    sums: Sequence[Any]


class Incoming(NamedTuple):
    """Where a backward kernel takes the gradients of its tile of encoded tokens from.

    Attributes:
      kernel: Has `backward_of_tile` done in a tile's last step; from `Refs`, references to what is
        prefetched and to the blocks of the arrays, to scratch, and `HistoryEncoder.skip`.
      tile: Tokens of a tile.
      steps: Of the grid for each tile.
      prefetched: Integers that blocks may depend on.
      arrays: What it is given for the gradients.
      specs: Their blocks, in a grid of cores, rows of a core, tiles and steps.
      scratch: Kept from step to step.
    """

    kernel: Callable[[Refs, Sequence[Any], Sequence[Any], bool], None]
    tile: int
    steps: int
    prefetched: Sequence[Array]
    arrays: Sequence[Array]
    specs: list[pl.BlockSpec]
    scratch: list[Any]


def can_encode(encoder: HistoryEncoder, dtype: Any) -> bool:
    """Whether the weights and a tile of tokens fit VMEM."""
    known = jnp.dtype(dtype).name in ("float32", "bfloat16")
    return known and tokens_of_tile(_TILE, encoder, dtype) >= _SUBLANES


def tokens_of_tile(length: int, encoder: HistoryEncoder, dtype: Any, beside: Room = _NONE) -> int:
    """Tokens of a tile: the most that fit beside the weights, and divide the padded row.

    Args:
      length: L, whole multiples of 16.
      encoder: Whose weights.
      dtype: Of the tokens.
      beside: What else has to fit.

    Returns:
      0 if none fit.
    """
    D, F = map(padded, encoder.up.shape)
    size = jnp.dtype(dtype).itemsize
    weights = 2 * 3 * D * F * (size + 4)  # and their gradients, each twice
    # Exact products of float32 are made of bfloat16 ones, whose operands take room as well.
    hidden = 14 if size == 4 else 8
    token = 2 * 3 * D * size + 8 * D * 4 + hidden * F * 4 + beside.token
    most = min(_TILE, (_VMEM_BYTES - weights - beside.fixed) // token)
    tiles = (t for t in range(most - most % _SUBLANES, 0, -_SUBLANES) if length % t == 0)
    return next(tiles, 0)


def forward_fits(tile: int, encoder: HistoryEncoder, dtype: Any, beside: Room) -> bool:
    """Whether that many tokens are encoded at once beside the weights, tokens twice.

    Args:
      tile: Tokens.
      encoder: Whose weights.
      dtype: Of the tokens.
      beside: What else has to fit.
    """
    D, F = map(padded, encoder.up.shape)
    size = jnp.dtype(dtype).itemsize
    exact = 2 if size == 4 else 1  # as in `tokens_of_tile`
    token = 2 * 2 * D * size + exact * 4 * (F + D) * 4 + beside.token
    return tile * token + 2 * 3 * D * F * size + beside.fixed <= _VMEM_BYTES


def padded(columns: int) -> int:
    """Columns that an array of so many has in VMEM."""
    return -(-columns // _LANES) * _LANES


def cores_and_rows(rows: int) -> tuple[int, int]:
    """How many cores share the rows, and rows of each.

    Some chips have two cores, which share the first axis of a grid.
    """
    cores = 2 if rows % 2 == 0 else 1
    return cores, rows // cores


def encode(unencoded: Unencoded, interpret: Any) -> Float[Array, "R L D"]:
    """See `Kernels.encode`."""
    encoder, tokens, covered = unencoded
    R, L, _ = covered.shape
    tile = tokens_of_tile(L, encoder, tokens.dtype)
    weights = weights_of(encoder, tokens.dtype)
    block = pl.BlockSpec((1, tile, tokens.shape[-1]), lambda r, i: (r, i, 0))
    return pl.pallas_call(
        functools.partial(_forward_kernel, skip=encoder.skip),
        grid=(R, L // tile),
        in_specs=[
            pl.BlockSpec((1, 1, 1, tile), lambda r, i: (r, i, 0, 0)), block, *map(whole, weights),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((R, L, tokens.shape[-1]), tokens.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="history_encoder_forward",
    )(by_tile(covered, tile), tokens, *weights)  # fmt: skip


def of_array(unencoded: Unencoded, d_encoded: Float[Array, "R L D"]) -> Incoming:
    """Gradients that are stored."""
    encoder, tokens, covered = unencoded
    R, L, _ = covered.shape
    tile = tokens_of_tile(L, encoder, tokens.dtype)

    def kernel(refs: Refs, given: Sequence[Any], scratch: Sequence[Any], skip: bool) -> None:
        del scratch
        x = where_covered(refs.covered, refs.tokens[0])
        d = where_covered(refs.covered, given[0][0]).astype(jnp.float32)
        backward_of_tile(refs, x, d, ffn_of_tile(x, refs.weights, skip), skip)

    block = _token_spec(R, tile, tokens.shape[-1])
    return Incoming(kernel, tile, 1, (), (d_encoded,), [block], [])


def encode_backward(
    unencoded: Unencoded, incoming: Incoming, interpret: Any
) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
    """See `Kernels.encode_backward`."""
    encoder, tokens, covered = unencoded
    R, L, _ = covered.shape
    D, F = encoder.up.shape
    tile, weights = incoming.tile, weights_of(encoder, tokens.dtype)
    cores, rows = cores_and_rows(R)
    block = _token_spec(R, tile, D)
    sums = [(D, F)] * 3 + [(1, D)] * 2
    d_tokens, *gradients = pl.pallas_call(
        functools.partial(_backward_kernel, incoming=incoming, skip=encoder.skip),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(incoming.prefetched),
            grid=(cores, rows, L // tile, incoming.steps),
            in_specs=[_token_spec(R, 1, 1, tile), block, *map(whole, weights), *incoming.specs],
            out_specs=[block, *(pl.BlockSpec((1, *s), lambda c, *_: (c, 0, 0)) for s in sums)],
            scratch_shapes=incoming.scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
            *(jax.ShapeDtypeStruct((cores, *s), jnp.float32) for s in sums),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="history_encoder_backward",
    )(*incoming.prefetched, by_tile(covered, tile), tokens, *weights, *incoming.arrays)
    up, gate, out, scale, bias = (x.sum(0) for x in gradients)
    return HistoryEncoder(up, gate, out.T, scale[0], bias[0], encoder.skip), d_tokens


def _token_spec(R: int, *block: int) -> pl.BlockSpec:
    """Of a tile, of arrays by row and tile."""
    _, rows = cores_and_rows(R)
    rest = (0,) * (len(block) - 1)
    return pl.BlockSpec((1, *block), lambda c, r, i, *_: (c * rows + r, i, *rest))


def weights_of(encoder: HistoryEncoder, dtype: Any) -> list[Array]:
    """See `Refs`."""
    products = [w.astype(dtype) for w in (encoder.up, encoder.gate, encoder.out.T)]
    return [*products, *(w[None].astype(jnp.float32) for w in (encoder.scale, encoder.bias))]


def by_tile(covered: Bool[Array, "R L 1"], tile: int) -> Float[Array, "R n 1 t"]:
    """What is covered, for `where_covered`."""
    return covered.astype(jnp.float32).reshape(len(covered), -1, 1, tile)


def whole(x: Any) -> pl.BlockSpec:
    """An array, whatever the program."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def where_covered(ref: Any, x: Float[Array, "t D"]) -> Float[Array, "t D"]:
    """Zero where nothing is covered, or behind the row's end, which holds anything.

    Args:
      ref: Which tokens are covered.
      x: The tile.
    """
    mask = jnp.broadcast_to(ref[0, 0], (x.shape[1], x.shape[0])).T
    return jnp.where(mask > 0, x, 0)


def ffn_of_tile(
    x: Float[Array, "t D"], weights: Sequence[Any], skip: bool
) -> tuple[Float[Array, "t F"], Float[Array, "t F"], Float[Array, "t D"]]:
    """float32 u, v and y of a tile, see `encoder_kernels`.

    Args:
      x: The tile.
      weights: See `Refs`.
      skip: See `HistoryEncoder`.
    """
    up, gate, out = weights[:3]
    u, v = dot(x, up[...], 1, 0), dot(x, gate[...], 1, 0)
    y = dot(hidden_units(u, v).astype(x.dtype), out[...], 1, 1)
    return u, v, y + x.astype(jnp.float32) if skip else y


def encoded_tile(y: Float[Array, "t D"], weights: Sequence[Any]) -> Float[Array, "t D"]:
    """float32 LayerNorm of y.

    Args:
      y: Of `ffn_of_tile`.
      weights: See `Refs`.
    """
    scale, bias = weights[3:]
    (normal,), _ = normalise([y], y.shape[1])
    return normal * scale[...] + bias[...]


def backward_of_tile(
    refs: Refs, x: Float[Array, "t D"], d: Float[Array, "t D"], ffn: Sequence[Array], skip: bool
) -> None:
    """Writes a tile's gradients, and adds to those of the weights.

    Args:
      refs: Of the kernel.
      x: The tile.
      d: Gradients of the encoded tokens, float32.
      ffn: What `ffn_of_tile` returned.
      skip: See `HistoryEncoder`.
    """
    (up, gate, out, scale, _), (u, v, y) = refs.weights, ffn
    d_up, d_gate, d_out, d_scale, d_bias = refs.sums
    (normal,), inverse = normalise([y], y.shape[1])
    (d_y,) = norm_gradients([normal], inverse, [d * scale[...]], y.shape[1])
    low = d_y.astype(x.dtype)
    d_u, d_v = (g.astype(x.dtype) for g in hidden_gradients(u, v, dot(low, out[...], 1, 0)))
    d_x = dot(d_u, up[...], 1, 1) + dot(d_v, gate[...], 1, 1)
    refs.d_tokens[0] = (d_x + d_y if skip else d_x).astype(x.dtype)
    d_up[0] += dot(x, d_u, 0, 0)
    d_gate[0] += dot(x, d_v, 0, 0)
    d_out[0] += dot(low, hidden_units(u, v).astype(x.dtype), 0, 0)
    d_scale[0] += (normal * d).sum(0, keepdims=True)
    d_bias[0] += d.sum(0, keepdims=True)


def _forward_kernel(covered, tokens, *refs, skip):
    *weights, encoded = refs
    _, _, y = ffn_of_tile(where_covered(covered, tokens[0]), weights, skip)
    encoded[0] = encoded_tile(y, weights).astype(encoded.dtype)


def _backward_kernel(*refs, incoming, skip):
    counts = (len(incoming.prefetched), 2, 5, len(incoming.arrays), 1, 5)
    prefetched, (covered, tokens), weights, arrays, (d_tokens,), sums, scratch = split(
        refs, *counts
    )

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        for s in sums:
            s[...] = jnp.zeros_like(s)

    layer = Refs(covered, tokens, weights, d_tokens, sums)
    incoming.kernel(layer, (*prefetched, *arrays), scratch, skip)
