"""The history encoder on Hopper GPUs (Mosaic): a program has 64 tokens, weights stream through.

Hidden units are taken in chunks, by pipelines that fetch the weights of the next one.  As on other
GPUs, the backward pass is two kernels: of the tokens, from gradients of the encoded tokens that are
read or computed in place, see `Incoming`; and of the weights, which some programs share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from stca_jax.ops.attention_kernels import split
from stca_jax.ops.encoder import LAYER_NORM_EPSILON, HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded, hidden_gradients, hidden_units
from stca_jax.ops.kernels import pad_to
from stca_jax.ops.mosaic_gpu import TILE, Generation, Turned, along_columns, along_rows, kernel


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the kernels are given of a layer.

    Attributes:
      weights: W_u, W_v and W_o as [D, F] in the tokens' dtype, with zeros up to whole chunks.
      norm: Scale and bias, float32 [D].
      tokens: Of all rows, padded to D columns and whole tiles.
      covered: 1 for tokens that some range covers, 0 for others, in the tokens' dtype.
      lengths: R, n and L: rows, and tokens of one, without and with the padding of `covered`.
      shape: D and F without padding.
      skip: See `HistoryEncoder`.
      gpu: What runs its kernels.
    """

    weights: tuple[Float[Array, "D F"], ...]
    norm: tuple[Float[Array, " D"], ...]
    tokens: Float[Array, "N D"]
    covered: Float[Array, " N"]
    lengths: tuple[int, int, int]
    shape: tuple[int, int]
    skip: bool
    gpu: Generation

    @property
    def padded(self) -> tuple[int, int]:
        """D and F with padding."""
        D, F = self.weights[0].shape
        return D, F

    @property
    def tiles(self) -> int:
        """Tiles of tokens of all rows."""
        return len(self.tokens) // TILE

    @property
    def tile(self) -> Any:
        """Shared memory of a tile of tokens."""
        return self.gpu.matrix(TILE, self.padded[0], self.tokens.dtype)

    @property
    def vectors(self) -> list[Any]:
        """Shared memory of `covered` of a tile, and of `norm`."""
        numbers = [plgpu.SMEM((self.padded[0],), jnp.float32)] * len(self.norm)
        return [plgpu.SMEM((TILE,), self.covered.dtype), *numbers]

    @property
    def array(self) -> jax.ShapeDtypeStruct:
        """Like the tokens."""
        return jax.ShapeDtypeStruct(self.tokens.shape, self.tokens.dtype)

    def by_row(self, x: Float[Array, "N D"], length: int) -> Float[Array, "R n D"]:
        """Without padding."""
        return x.reshape(self.lengths[0], -1, x.shape[-1])[:, :length, : self.shape[0]]


class Incoming(NamedTuple):
    """Where a program takes the gradients of its tile of encoded tokens from.

    Attributes:
      arrays: What it is given for them, in global memory.
      scratch: Shared memory for them.
      of_tile: float32 gradients [t, D], from references to the arrays and the scratch, the encoded
        tokens in shared memory, and the tile's number.
    """

    arrays: tuple[Array, ...]
    scratch: list[Any]
    of_tile: Callable[[Sequence[Any], Sequence[Any], Any, Any], Array]


def of_array(layer: Layer, d_encoded: Float[Array, "R L D"]) -> Incoming:
    """Gradients that are stored."""
    rows = layer.lengths[0]
    d_encoded = pad_to(d_encoded, rows, len(layer.tokens) // rows, layer.padded[0])
    d_encoded = d_encoded.reshape(layer.tokens.shape)

    def of_tile(arrays: Sequence[Any], scratch: Sequence[Any], encoded: Any, tile: Any) -> Array:
        del encoded
        (d_s, barrier), rows = scratch, pl.ds(tile * TILE, TILE)
        layer.gpu.read([arrays[0].at[rows]], [d_s], barrier)
        return d_s[...].astype(jnp.float32)

    return Incoming((d_encoded,), [layer.tile, plgpu.Barrier()], of_tile)


def make_layer(unencoded: Unencoded, gpu: Generation) -> Layer:
    """What the kernels take of such a layer, whose tokens are at most 128 wide."""
    encoder, tokens, covered = unencoded
    width, hidden = encoder.up.shape
    R, L, _ = covered.shape
    D, F, padded = (-(-x // TILE) * TILE for x in (width, hidden, L))
    factors = (encoder.up, encoder.gate, encoder.out.T)
    weights = tuple(pad_to(w.astype(tokens.dtype), D, F) for w in factors)
    norm = tuple(pad_to(w.astype(jnp.float32), D) for w in (encoder.scale, encoder.bias))
    covered = pad_to(covered, R, padded, 1).reshape(-1).astype(tokens.dtype)
    lengths = (R, tokens.shape[1], L)
    tokens = pad_to(tokens, R, padded, D).reshape(-1, D)
    return Layer(weights, norm, tokens, covered, lengths, (width, hidden), encoder.skip, gpu)


def encode(layer: Layer) -> Float[Array, "R L D"]:
    """See `Kernels.encode`."""

    def body(covered, tokens, *refs):
        weights, scale_bias, (encoded, *own, barrier) = split(refs, 3, 2)
        rows = pl.ds(lax.axis_index("tile") * TILE, TILE)
        sources = (tokens.at[rows], covered.at[rows], *scale_bias)
        x, covered_s, *norm = layer.gpu.read(sources, own, barrier)
        value = encoded_tile(layer, x, covered_s, weights, norm)
        layer.gpu.write((value, x, encoded.at[rows]))

    encoded = kernel(
        body, "history_encoder_forward", {"tile": layer.tiles}, layer.array,
        [layer.tile, *layer.vectors, plgpu.Barrier(num_arrivals=4)], layer.gpu,
    )(layer.covered, layer.tokens, *layer.weights, *layer.norm)  # fmt: skip
    return layer.by_row(encoded, layer.lengths[2])


def encoded_tile(
    layer: Layer, x: Any, covered: Any, weights: Sequence[Any], norm: Sequence[Any]
) -> Float[Array, "t D"]:
    """float32 E1 of a tile of tokens in shared memory, of which those covered stay there."""
    _clean(layer, x, covered)
    normal, _ = _normalise(layer, _ffn(layer, x, weights))
    return _scaled(layer, normal, norm)


def encode_backward(
    layer: Layer, incoming: Incoming, programs: int
) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
    """See `Kernels.encode_backward`; about so many programs share the weights' gradients."""
    d_tokens, d_y, d_norm = _token_gradients(layer, incoming)
    (D, F), columns = layer.shape, d_norm.sum(0)[:, : layer.shape[0]]
    up, gate, out = (x[:D, :F] for x in _weight_gradients(layer, d_y, programs))
    gradients = HistoryEncoder(up, gate, out.T, columns[0], columns[1], layer.skip)
    return gradients, layer.by_row(d_tokens, layer.lengths[1])


def _token_gradients(layer: Layer, incoming: Incoming) -> list[Array]:
    """Of the tokens, of y, and sums of those of the scale and the bias by tile."""
    D, given = layer.padded[0], len(incoming.arrays)

    def body(covered, tokens, *refs):
        weights, scale_bias, arrays, results, own, sums, rest = split(refs, 3, 2, given, 3, 5, 2)
        d_tokens, d_output, d_norm = results
        (y, *own), (barrier, *scratch) = own, rest
        tile = lax.axis_index("tile")
        rows = pl.ds(tile * TILE, TILE)
        sources = (tokens.at[rows], covered.at[rows], *scale_bias)
        x, covered_s, *norm = layer.gpu.read(sources, own, barrier)
        _clean(layer, x, covered_s)
        normal, inverse = _normalise(layer, _ffn(layer, x, weights))
        y[...] = _scaled(layer, normal, norm).astype(y.dtype)
        layer.gpu.commit()
        d = incoming.of_tile(arrays, scratch, y, tile)
        d = jnp.where(_is_covered(layer, covered_s, d.shape), d, 0.0)
        totals = ((normal * d).sum(0), d.sum(0))
        d = d * along_columns(layer.gpu.numbers(norm[0], 1), d.shape)
        d = _norm_gradients(layer, normal, inverse, d)
        tiles = zip(totals, sums, (d_norm.at[tile, k] for k in range(2)), strict=True)
        layer.gpu.write(*tiles, (d, y, d_output.at[rows]), wait=False)
        d = _input_gradients(layer, x, y, weights, d)
        layer.gpu.write((d, x, d_tokens.at[rows]))

    sums = [plgpu.SMEM((D,), jnp.float32)] * 2
    return kernel(
        body, "history_encoder_backward_tokens", {"tile": layer.tiles},
        [layer.array, layer.array, jax.ShapeDtypeStruct((layer.tiles, 2, D), jnp.float32)],
        [layer.tile, layer.tile, *layer.vectors, *sums, plgpu.Barrier(num_arrivals=4),
         *incoming.scratch],
        layer.gpu,
    )(layer.covered, layer.tokens, *layer.weights, *layer.norm, *incoming.arrays)  # fmt: skip


def _weight_gradients(layer: Layer, d_y: Float[Array, "N D"], programs: int) -> list[Array]:
    """Of W_u, W_v and W_o."""
    (D, F), dtype, gpu = layer.padded, layer.tokens.dtype, layer.gpu
    chunk = TILE // 2  # the sums of more do not fit the registers
    shares = min(layer.tiles, -(-programs * chunk // F))
    most = -(-layer.tiles // shares)

    def body(covered, tokens, d_output, *refs):
        weights, gradients, chunks, (factor, total, barrier) = split(refs, 3, 3, 3)
        c, share = lax.axis_index("chunk"), lax.axis_index("share")
        columns = pl.ds(c * chunk, chunk)
        up, gate, out = gpu.read([w.at[:, columns] for w in weights], chunks, barrier)
        begin = share * most

        def add(summed, tokens, units):
            factor[...] = units.astype(dtype)
            gpu.commit()
            return gpu.add(summed, (Turned(tokens), factor))

        def step(n, covered_s, x, d_y, sums):
            del n
            _clean(layer, x, covered_s)
            u, v = gpu.product((x, up)), gpu.product((x, gate))
            sums = [*sums[:2], add(sums[2], d_y, hidden_units(u, v))]
            d_u, d_v = hidden_gradients(u, v, gpu.product((d_y, out)))
            return [add(sums[0], x, d_u), add(sums[1], x, d_v), sums[2]]

        specs = [
            gpu.block((TILE,), lambda n: (begin + n,)),
            *[gpu.block((TILE, D), lambda n: (begin + n, 0), gpu.layout(dtype, chunk))] * 2,
        ]
        steps = jnp.clip(layer.tiles - begin, 0, most)
        zeros = [jnp.zeros((D, chunk), jnp.float32)] * 3
        sums = gpu.pipeline(step, steps, specs, zeros, covered, tokens, d_output)
        for s, d in zip(sums, gradients, strict=True):
            gpu.write((s, total, d.at[share, :, columns]))

    sums = kernel(
        body, "history_encoder_backward_weights", {"chunk": F // chunk, "share": shares},
        [jax.ShapeDtypeStruct((shares, D, F), jnp.float32)] * 3,
        [*[gpu.matrix(D, chunk, dtype, chunk)] * 3, gpu.matrix(TILE, chunk, dtype, chunk),
         plgpu.SMEM((D, chunk), jnp.float32), plgpu.Barrier(num_arrivals=3)],
        gpu,
    )(layer.covered, layer.tokens, d_y, *layer.weights)  # fmt: skip
    return [x.sum(0) for x in sums]


def _clean(layer: Layer, x: Any, covered: Any) -> None:
    """Zero where nothing is covered, which may hold anything."""
    tokens = x[...]
    x[...] = jnp.where(_is_covered(layer, covered, tokens.shape), tokens, jnp.zeros_like(tokens))
    layer.gpu.commit()


def _is_covered(layer: Layer, covered: Any, shape: Sequence[int]) -> Bool[Array, "t D"]:
    return along_rows(layer.gpu.numbers(covered, 0), shape) > 0


def _over_chunks(layer: Layer, step: Callable[..., Array], weights: Any, carry: Array) -> Array:
    """`step(up, gate, out, carry)` over the chunks of hidden units."""
    D, F = layer.padded
    gpu = layer.gpu
    spec = gpu.block((D, TILE), lambda c: (0, c), gpu.layout(layer.tokens.dtype))
    return gpu.pipeline(lambda c, *refs: step(*refs), F // TILE, [spec] * 3, carry, *weights)


def _ffn(layer: Layer, x: Any, weights: Any) -> Float[Array, "t D"]:
    """float32 y of a tile."""
    gpu = layer.gpu

    def step(up: Any, gate: Any, out: Any, y: Array) -> Array:
        hidden = hidden_units(gpu.product((x, up)), gpu.product((x, gate)))
        return gpu.add(y, (hidden.astype(x.dtype), Turned(out)))

    tokens = x[...].astype(jnp.float32)
    return _over_chunks(layer, step, weights, tokens if layer.skip else jnp.zeros_like(tokens))


def _input_gradients(layer: Layer, x: Any, d_y: Any, weights: Any, d: Array) -> Array:
    """Of the tokens, from those of y: in shared memory in the tokens' dtype, and as they are."""
    gpu = layer.gpu

    def step(up: Any, gate: Any, out: Any, d_x: Array) -> Array:
        u, v = gpu.product((x, up)), gpu.product((x, gate))
        d_u, d_v = hidden_gradients(u, v, gpu.product((d_y, out)))
        return gpu.add(d_x, (d_u.astype(x.dtype), Turned(up)), (d_v.astype(x.dtype), Turned(gate)))

    return _over_chunks(layer, step, weights, d if layer.skip else jnp.zeros_like(d))


def _normalise(layer: Layer, y: Float[Array, "t D"]) -> tuple[Array, Float[Array, " t"]]:
    """See `encoder_kernels.normalise`."""
    width = layer.shape[0]
    y = y - along_rows(y.sum(1) / width, y.shape)
    if width < y.shape[1]:
        y = jnp.where(lax.broadcasted_iota(jnp.int32, y.shape, 1) < width, y, 0.0)
    inverse = lax.rsqrt((y * y).sum(1) / width + LAYER_NORM_EPSILON)
    return y * along_rows(inverse, y.shape), inverse


def _scaled(layer: Layer, normal: Float[Array, "t D"], norm: Sequence[Any]) -> Array:
    scale, bias = (along_columns(layer.gpu.numbers(x, 1), normal.shape) for x in norm)
    return normal * scale + bias


def _norm_gradients(
    layer: Layer, normal: Float[Array, "t D"], inverse: Float[Array, " t"], d: Float[Array, "t D"]
) -> Float[Array, "t D"]:
    """See `encoder_kernels.norm_gradients`."""
    width = layer.shape[0]
    mean, slope = (along_rows(x.sum(1) / width, d.shape) for x in (d, normal * d))
    return along_rows(inverse, d.shape) * (d - mean - normal * slope)
