"""The history encoder on GPUs (Triton): a program has a tile of tokens, hidden units in chunks.

The backward pass is two kernels.  In one, a program has a tile of tokens, takes the gradients of
the encoded tokens from memory or computes them itself, see `Incoming`, and writes those of the
tokens and of y, in front of the LayerNorm.  In the other it has a chunk of hidden units and
a share of all tokens, whose sums stay in registers; XLA adds the shares.  There are no atomics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention_kernels import dot
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import (
    Parts,
    Unencoded,
    hidden_gradients,
    hidden_units,
    norm_gradients,
    normalise,
    products,
)
from stca_jax.ops.kernels import pad_to
from stca_jax.ops.triton_cuts import Cut, Cuts, cuts_for

_SMALLEST = 16


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the kernels are given of a layer.

    Attributes:
      weights: W_u, W_v and W_o as [D, F] in the tokens' dtype; scale and bias as float32 [1, D].
        With zeros up to a multiple of 16 columns, and to whole chunks of hidden units.
      tokens: Tokens of the rows, padded to as many columns.
      covered: See `Kernels.encode`.
      shape: D and F without padding.
      skip: See `HistoryEncoder`.
      cuts: Of the kernels.
      interpret: See `TritonKernels`.
    """

    weights: tuple[Float[Array, "D F"], ...]
    tokens: Float[Array, "R n D"]
    covered: Bool[Array, "R L 1"]
    shape: tuple[int, int]
    skip: bool
    cuts: Cuts
    interpret: bool

    @property
    def width(self) -> int:
        """D without padding."""
        return self.shape[0]

    @property
    def rows(self) -> list[pl.BlockSpec]:
        """Blocks of `covered` and `tokens` in a grid whose first axis is rows."""
        return [_row(x) for x in (self.covered, self.tokens)]

    def call(self, kernel: Callable[..., None], cut: Cut, **options: Any) -> Callable[..., Any]:
        """`pl.pallas_call` of a kernel with what is static."""
        static = Static(parts_of(self.tokens.shape[-1]), cut.hidden, self.width, self.skip)
        params = plgpu.CompilerParams(num_warps=cut.warps, num_stages=2)
        return pl.pallas_call(
            functools.partial(kernel, static=static, tile=self.tile(cut)),
            compiler_params=params,
            interpret=self.interpret,
            **options,
        )

    def tile(self, cut: Cut) -> int:
        """Tokens of a tile, which divide a row: a row is whole history tiles of 16 at least."""
        return math.gcd(cut.tokens, self.covered.shape[1])


class Static(NamedTuple):
    """What is static in a kernel.

    Attributes:
      parts: Of the columns.
      chunk: Hidden units of a chunk.
      width: D without padding.
      skip: See `HistoryEncoder`.
    """

    parts: list[slice]
    chunk: int
    width: int
    skip: bool


class Incoming(NamedTuple):
    """Where a program takes the gradients of its tile of encoded tokens from.

    Attributes:
      cut: Of the kernel.
      arrays: What it is given for them.
      specs: Their blocks, in a grid of rows and tiles of tokens.
      of_tile: Gradients by parts of the columns, from references to the blocks, the encoded tokens,
        which of them is the first, and which are covered, [t, 1].
    """

    cut: Cut
    arrays: tuple[Array, ...]
    specs: list[pl.BlockSpec]
    of_tile: Callable[[Sequence[Any], Parts, Any, Array], Parts]


def of_array(layer: Layer, d_encoded: Float[Array, "R L D"]) -> Incoming:
    """Gradients that are stored."""
    parts = parts_of(layer.tokens.shape[-1])
    d_encoded = pad_to(d_encoded, *layer.covered.shape[:2], layer.tokens.shape[-1])

    def of_tile(refs: Sequence[Any], encoded: Parts, position: Any, covered: Array) -> Parts:
        d = _load(refs[0], (pl.ds(position, len(encoded[0])),), covered, parts)
        return [a.astype(jnp.float32) for a in d]

    return Incoming(layer.cuts.tokens, (d_encoded,), [_row(d_encoded)], of_tile)


def make_layer(unencoded: Unencoded, interpret: bool) -> Layer:
    """What the kernels take of such a layer; `cuts_for` must have cuts for it."""
    encoder, tokens, covered = unencoded
    width, hidden = encoder.up.shape
    cuts = cuts_for(width, tokens.dtype)
    assert cuts is not None, width
    chunk = max(cut.hidden for cut in cuts)
    columns, units = -(-width // _SMALLEST) * _SMALLEST, -(-hidden // chunk) * chunk
    factors = (encoder.up, encoder.gate, encoder.out.T)
    weights = (
        *(pad_to(w.astype(tokens.dtype), columns, units) for w in factors),
        *(pad_to(w[None].astype(jnp.float32), 1, columns) for w in (encoder.scale, encoder.bias)),
    )
    tokens = pad_to(tokens, *tokens.shape[:2], columns)
    return Layer(weights, tokens, covered, (width, hidden), encoder.skip, cuts, interpret)


def encode(layer: Layer) -> Float[Array, "R L D"]:
    """See `Kernels.encode`."""
    cut = layer.cuts.forward
    shape = (*layer.covered.shape[:2], layer.tokens.shape[-1])
    encoded = jax.ShapeDtypeStruct(shape, layer.tokens.dtype)
    encoded = layer.call(
        _forward_kernel,
        cut,
        grid=(shape[0], shape[1] // layer.tile(cut)),
        in_specs=[*layer.rows, *map(whole, layer.weights)],
        out_specs=_row(encoded),
        out_shape=encoded,
        name="history_encoder_forward",
    )(layer.covered, layer.tokens, *layer.weights)
    return encoded[..., : layer.width]


def encode_backward(
    layer: Layer, incoming: Incoming, programs: int
) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
    """See `Kernels.encode_backward`; about so many programs share the weights' gradients."""
    d_tokens, d_y, d_norm = _token_gradients(layer, incoming)
    (D, F), columns = layer.shape, d_norm.sum((0, 1))[:, : layer.width]
    up, gate, out = (x[:D, :F] for x in _weight_gradients(layer, d_y, programs))
    gradients = HistoryEncoder(up, gate, out.T, columns[0], columns[1], layer.skip)
    return gradients, d_tokens[..., :D]


def _token_gradients(layer: Layer, incoming: Incoming) -> tuple[Array, Array, Array]:
    """Of the tokens, of y, and sums of those of the scale and the bias by tile."""
    cut = incoming.cut
    (R, L, _), D = layer.covered.shape, layer.tokens.shape[-1]
    tiles = L // layer.tile(cut)
    d_y = jax.ShapeDtypeStruct((R, L, D), layer.tokens.dtype)
    d_norm = jax.ShapeDtypeStruct((R, tiles, 2, D), jnp.float32)
    return layer.call(
        functools.partial(_token_kernel, incoming=incoming.of_tile),
        cut,
        grid=(R, tiles),
        in_specs=[*layer.rows, *map(whole, layer.weights), *incoming.specs],
        out_specs=[
            _row(layer.tokens),
            _row(d_y),
            pl.BlockSpec((None, None, 2, D), lambda r, i: (r, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(layer.tokens.shape, layer.tokens.dtype),
            d_y,
            d_norm,
        ],
        name="history_encoder_backward_tokens",
    )(layer.covered, layer.tokens, *layer.weights, *incoming.arrays)


def _weight_gradients(layer: Layer, d_y: Float[Array, "R L D"], programs: int) -> list[Array]:
    """Of W_u, W_v and W_o."""
    cut = layer.cuts.weights
    arrays = (layer.covered, layer.tokens, d_y, *layer.weights[:3])
    D, F = layer.weights[0].shape
    chunks, tiles = F // cut.hidden, d_y.shape[0] * d_y.shape[1] // layer.tile(cut)
    shares = min(tiles, -(-programs // chunks))
    sums = layer.call(
        _weight_kernel,
        cut,
        grid=(chunks, shares),
        in_specs=[whole(x) for x in arrays],
        out_specs=[pl.BlockSpec((None, D, F), lambda c, s: (s, 0, 0))] * 3,
        out_shape=[jax.ShapeDtypeStruct((shares, D, F), jnp.float32)] * 3,
        name="history_encoder_backward_weights",
    )(*arrays)
    return [x.sum(0) for x in sums]


def _row(x: Any) -> pl.BlockSpec:
    """All of a row of an array [R, n, D], in a grid whose first axis is rows."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda r, i: (r, 0, 0))


def whole(x: Any) -> pl.BlockSpec:
    """An array, whatever the program."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def parts_of(width: int) -> list[slice]:
    """Cuts a multiple of 16 into powers of two, the largest first: Triton loads nothing else."""
    parts, offset = [], 0
    while offset < width:
        size = 1 << ((width - offset).bit_length() - 1)
        parts.append(slice(offset, offset + size))
        offset += size
    return parts


def _load(ref: Any, index: tuple[Any, ...], mask: Array, parts: list[slice]) -> Parts:
    """A tile of tokens, zero where nothing is covered: nothing is read there."""
    return [
        plgpu.load(
            ref.at[(*index, p)],
            mask=jnp.broadcast_to(mask, (mask.shape[0], p.stop - p.start)),
            other=0.0,
        )
        for p in parts
    ]


def _chunk(weights: Any, c: Any, static: Static) -> list[Parts]:
    """A chunk of hidden units of each weight."""
    chunk = pl.ds(c * static.chunk, static.chunk)
    return [[w[p, chunk] for p in static.parts] for w in weights]


def _ffn(x: Parts, weights: Any, static: Static) -> Parts:
    """float32 y of a tile."""

    def step(c: Any, y: Parts) -> Parts:
        up, gate, out = _chunk(weights, c, static)
        hidden = hidden_units(products(x, up), products(x, gate)).astype(x[0].dtype)
        return [a + dot(hidden, w, 1, 1) for a, w in zip(y, out, strict=True)]

    y = [a.astype(jnp.float32) if static.skip else jnp.zeros(a.shape, jnp.float32) for a in x]
    return lax.fori_loop(0, weights[0].shape[1] // static.chunk, step, y)


def encoded_tile(covered: Any, tokens: Any, weights: Any, rows: Any, static: Static) -> Parts:
    """Encoded tokens of a row, in their dtype."""
    *factors, scale, bias = weights
    x = _load(tokens, (rows,), covered[rows], static.parts)
    normal, _ = normalise(_ffn(x, factors, static), static.width)
    return [a.astype(tokens.dtype) for a in _scaled(normal, scale, bias, static)]


def _forward_kernel(covered, tokens, *refs, static, tile):
    *weights, encoded = refs
    rows = pl.ds(pl.program_id(1) * tile, tile)
    for p, a in zip(
        static.parts, encoded_tile(covered, tokens, weights, rows, static), strict=True
    ):
        encoded[rows, p] = a


def _scaled(normal: Parts, scale: Any, bias: Any, static: Static) -> Parts:
    return [n * scale[:, p] + bias[:, p] for n, p in zip(normal, static.parts, strict=True)]


def _token_kernel(covered, tokens, up, gate, out, scale, bias, *refs, static, tile, incoming):
    *given, d_tokens, d_output, d_norm = refs
    parts, weights, position = static.parts, (up, gate, out), pl.program_id(1) * tile
    rows = pl.ds(position, tile)
    x = _load(tokens, (rows,), covered[rows], parts)
    normal, inverse = normalise(_ffn(x, weights, static), static.width)
    encoded = [a.astype(x[0].dtype) for a in _scaled(normal, scale, bias, static)]
    d = incoming(given, encoded, position, covered[rows])
    for p, n, a in zip(parts, normal, d, strict=True):
        d_norm[0, p] = (n * a).sum(0)
        d_norm[1, p] = a.sum(0)
    d = [a * scale[:, p] for a, p in zip(d, parts, strict=True)]
    d = norm_gradients(normal, inverse, d, static.width)
    d_y = [a.astype(x[0].dtype) for a in d]
    for p, a in zip(parts, d_y, strict=True):
        d_output[rows, p] = a

    def step(c, d_x):
        up, gate, out = _chunk(weights, c, static)
        d_hidden = products(d_y, out)
        d_u, d_v = hidden_gradients(products(x, up), products(x, gate), d_hidden)
        d_u, d_v = d_u.astype(x[0].dtype), d_v.astype(x[0].dtype)
        return [
            a + dot(d_u, w, 1, 1) + dot(d_v, z, 1, 1) for a, w, z in zip(d_x, up, gate, strict=True)
        ]

    d_x = d if static.skip else [jnp.zeros(a.shape, jnp.float32) for a in d]
    d_x = lax.fori_loop(0, up.shape[1] // static.chunk, step, d_x)
    for p, a in zip(parts, d_x, strict=True):
        row = position + lax.broadcasted_iota(jnp.int32, a.shape, 0)
        plgpu.store(d_tokens.at[rows, p], a.astype(d_tokens.dtype), mask=row < d_tokens.shape[0])


def _weight_kernel(covered, tokens, d_output, up, gate, out, d_up, d_gate, d_out, *, static, tile):
    up, gate, out = _chunk((up, gate, out), pl.program_id(0), static)
    tiles = jnp.int32(covered.shape[1] // tile)
    most = pl.cdiv(covered.shape[0] * tiles, pl.num_programs(1))
    begin = pl.program_id(1) * most

    def step(n, sums):
        r, rows = lax.div(n, tiles), pl.ds(lax.rem(n, tiles) * tile, tile)
        x = _load(tokens, (r, rows), covered[r, rows], static.parts)
        d_y = [d_output[r, rows, p] for p in static.parts]
        u, v = products(x, up), products(x, gate)
        factors = (*hidden_gradients(u, v, products(d_y, out)), hidden_units(u, v))
        return [
            [a + dot(b, f.astype(b.dtype), 0, 0) for a, b in zip(s, y, strict=True)]
            for s, y, f in zip(sums, (x, x, d_y), factors, strict=True)
        ]

    zeros = [jnp.zeros(w.shape, jnp.float32) for w in up]
    end = jnp.minimum(begin + most, covered.shape[0] * tiles)
    sums = lax.fori_loop(begin, end, step, [zeros] * 3)
    chunk = pl.ds(pl.program_id(0) * static.chunk, static.chunk)
    for ref, s in zip((d_up, d_gate, d_out), sums, strict=True):
        for p, a in zip(static.parts, s, strict=True):
            ref[p, chunk] = a
