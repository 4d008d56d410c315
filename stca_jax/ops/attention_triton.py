"""Attention on GPUs (Triton): kernels, and the blocks that their programs are given.

Forward and for the gradients of the queries, a program has a target tile and a share of its band of
history tiles.  For those of the history, it has a tile of tokens and all target tiles that need it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from stca_jax.ops.attention_kernels import dot, mask_scores, score_gradients, softmax_step, split
from stca_jax.ops.encoder_kernels import Parts
from stca_jax.ops.encoder_triton import Incoming, Layer, encoded_tile, parts_of, whole
from stca_jax.ops.kernels import Inputs
from stca_jax.ops.tiled import LOWEST_PEAK, NO_SCORE
from stca_jax.ops.tiles import Tiling, target_bands
from stca_jax.ops.triton_cuts import Cut


@dataclasses.dataclass(frozen=True)
class Specs:
    """Blocks of the kernels' inputs.

    Attributes:
      ranges: Of the band's two ends, then of `start` and `end`.
      row: Of a number per target and head: log-sum-exp or delta.
      wide: Of queries, or gradients of outputs.
      key: Of keys or values.
    """

    ranges: list[pl.BlockSpec]
    row: pl.BlockSpec
    wide: pl.BlockSpec
    key: pl.BlockSpec

    def backward(self, arrays: int) -> list[pl.BlockSpec]:
        """Of all inputs of a backward kernel, of them one or two of keys and values."""
        return [*self.ranges, self.row, self.row, self.wide, self.wide, *[self.key] * arrays]


def band_specs(tiling: Tiling, E: int, C: int) -> Specs:
    """One target tile and its whole row of history; grid (target tile, group, share)."""

    def key(j: Any, g: Any, s: Any) -> tuple[Any, ...]:
        return lax.div(j, jnp.int32(tiling.target_tiles_per_row)), g, 0, 0

    length = tiling.tiles_per_row * tiling.history
    band = pl.BlockSpec((1,), lambda j, g, s: (j,))
    span = pl.BlockSpec((None, 1, C), lambda j, g, s: (j, 0, 0))
    return Specs(
        ranges=[band, band, span, span],
        row=pl.BlockSpec((None, None, 1, C), lambda j, g, s: (j, g, 0, 0)),
        wide=pl.BlockSpec((None, None, E, C), lambda j, g, s: (j, g, 0, 0)),
        key=pl.BlockSpec((None, None, length, E), key),
    )


def history_specs(
    tiling: Tiling, E: int, C: int, ids: Callable[..., tuple[Any, Any, Any]] = lambda *ids: ids
) -> Specs:
    """One history tile and all target tiles of its row.

    Args:
      tiling: How the batch is cut.
      E: Width of the keys.
      C: Targets x heads of a target tile.
      ids: History tile, group and row, from the ids of the grid.
    """
    per_row = tiling.target_tiles_per_row

    def block(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(*ids(*grid)))

    band = block((1, 1), lambda i, g, r: (r, i))
    span = block((per_row, 1, C), lambda i, g, r: (r, 0, 0))
    return Specs(
        ranges=[band, band, span, span],
        row=block((per_row, None, 1, C), lambda i, g, r: (r, g, 0, 0)),
        wide=block((per_row, None, E, C), lambda i, g, r: (r, g, 0, 0)),
        key=block((None, None, tiling.history, E), lambda i, g, r: (r, g, i, 0)),
    )


def share_spec(*block: int) -> pl.BlockSpec:
    """Of what a program of a band's share writes; grid (target tile, group, share)."""
    return pl.BlockSpec((None, None, None, *block), lambda j, g, s: (s, j, g, 0, 0))


def shares(*shape: int) -> jax.ShapeDtypeStruct:
    """Of what all programs write."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _share(first: Any, last: Any) -> tuple[Array, Array]:
    """This program's tiles of the band."""
    most = pl.cdiv(jnp.maximum(last - first, 0), pl.num_programs(2))
    begin = first + pl.program_id(2) * most
    return begin, jnp.minimum(begin + most, last)


def _keys_and_values(
    history: Sequence[Any], tokens: Any, parts: list[slice]
) -> tuple[Parts, Parts]:
    """A tile of each of `Inputs.history`, in parts."""
    loaded = [[x[tokens, p] for p in parts] for x in history]
    return loaded[0], loaded[-1]


def _product(a: Parts, b: Parts) -> Any:
    """[t, C] product of keys or values [t, E] with [E, C], both in parts of E."""
    return sum(dot(x, y, 1, 0) for x, y in zip(a, b, strict=True))


def _add_products(summed: Parts, a: Array, b: Parts) -> Parts:
    """Adds the [t, E] product of [t, C] with [E, C], in parts of E."""
    return [x + dot(a, y, 1, 1) for x, y in zip(summed, b, strict=True)]


def forward_kernel(first, last, start, end, query, *refs, tile):
    """Partial softmax of a target tile over a share of its band."""
    *history, output, log_sum_exp = refs
    parts = parts_of(query.shape[0])

    def read(i: Any) -> tuple[Parts, Parts]:
        return _keys_and_values(history, pl.ds(i * tile, tile), parts)

    _attend((first, last, start, end, query), read, (output, log_sum_exp))


def layer_kernel(first, last, start, end, query, *refs, static, tile):
    """The same, of tokens that it encodes, and stores if there is where."""
    (covered, tokens), weights, results, kept = split(refs, 2, 5, 2)

    def read(i: Any) -> tuple[Parts, Parts]:
        rows = pl.ds(i * tile, tile)
        encoded = encoded_tile(covered, tokens, weights, rows, static)
        for ref in kept:
            for p, x in zip(static.parts, encoded, strict=True):
                ref[rows, p] = x
        return encoded, encoded

    _attend((first, last, start, end, query), read, results)


def _attend(
    target: tuple[Any, ...], read: Callable[[Any], tuple[Parts, Parts]], results: Sequence[Any]
) -> None:
    """Stores weighted sums and log-sum-exps of a target tile, over tiles of keys and values."""
    first, last, start, end, query = target
    parts = parts_of(query.shape[0])
    queries, ranges = [query[p, :] for p in parts], (start[...], end[...])
    row = (1, query.shape[1])

    def step(i: Any, carry: Any) -> Any:
        peak, total, *summed = carry
        keys, values = read(i)
        score = mask_scores(_product(keys, queries), *ranges, i * len(keys[0]))
        weight, rescale, peak, total = softmax_step(score, peak, total)
        weight = weight.astype(query.dtype)
        summed = [x * rescale + dot(v, weight, 0, 0) for x, v in zip(summed, values, strict=True)]
        return peak, total, *summed

    peak, total, *summed = lax.fori_loop(
        *_share(first[0], last[0]),
        step,
        (
            jnp.full(row, LOWEST_PEAK, jnp.float32),
            jnp.zeros(row, jnp.float32),
            *(jnp.zeros(q.shape, jnp.float32) for q in queries),
        ),
    )
    output, log_sum_exp = results
    nonempty = total > 0
    safe_total = jnp.where(nonempty, total, 1)
    for p, x in zip(parts, summed, strict=True):
        output[p, :] = x / safe_total
    log_sum_exp[...] = jnp.where(nonempty, peak + jnp.log(safe_total), NO_SCORE)


def layer_forward(
    inputs: Inputs, tiling: Tiling, layer: Layer, cut: Cut, splits: int, keep: bool
) -> list[Array]:
    """Weighted sums and log-sum-exps of shares, see `forward_kernel`, and the encoded tokens.

    Args:
      inputs: Of rows with one target tile each, without keys.
      tiling: How the batch is cut.
      layer: Encodes the tokens.
      cut: Of its programs.
      splits: Programs that share a row.
      keep: Store what is encoded.
    """
    J, G, E, C = inputs.query.shape
    R, L, _ = layer.covered.shape
    tile, specs = layer.tile(cut), band_specs(tiling, E, C)
    band = inputs.first * tiling.history // tile, -(-inputs.last * tiling.history // tile)
    rows = [
        pl.BlockSpec((None, *x.shape[1:]), lambda j, g, s: (j, 0, 0))
        for x in (layer.covered, layer.tokens)
    ]
    return layer.call(
        layer_kernel,
        cut,
        grid=(J, G, splits),
        in_specs=[*specs.ranges, specs.wide, *rows, *map(whole, layer.weights)],
        out_specs=[share_spec(E, C), share_spec(1, C), *[specs.key] * keep],
        out_shape=[
            shares(splits, J, G, E, C),
            shares(splits, J, G, 1, C),
            *[jax.ShapeDtypeStruct((R, G, L, E), layer.tokens.dtype)] * keep,
        ],
        name="history_layer_forward",
    )(*band, inputs.start, inputs.end, inputs.query, layer.covered, layer.tokens, *layer.weights)


class _Targets(NamedTuple):
    """What a backward kernel is given of its target tile, or of all those of its row.

    `first` and `last` are the band: of history tiles, or of the row's target tiles.
    """

    first: Any
    last: Any
    start: Any
    end: Any
    log_sum_exp: Any
    delta: Any
    query: Any
    d_output: Any


def query_kernel(*refs, tile):
    """Gradients of a target tile's queries, summed over a share of its band."""
    t, (*history, d_query) = _Targets(*refs[:8]), refs[8:]
    parts = parts_of(t.query.shape[0])
    queries, d_outputs = ([x[p, :] for p in parts] for x in (t.query, t.d_output))
    ranges, statistics = (t.start[...], t.end[...]), (t.log_sum_exp[...], t.delta[...])

    def step(i, summed):
        keys, values = _keys_and_values(history, pl.ds(i * tile, tile), parts)
        score = mask_scores(_product(keys, queries), *ranges, i * tile)
        _, d_score = score_gradients(score, _product(values, d_outputs), *statistics)
        d_score = d_score.astype(t.query.dtype)
        return [x + dot(k, d_score, 0, 0) for x, k in zip(summed, keys, strict=True)]

    zeros = [jnp.zeros(q.shape, jnp.float32) for q in queries]
    summed = lax.fori_loop(*_share(t.first[0], t.last[0]), step, zeros)
    for p, x in zip(parts, summed, strict=True):
        d_query[p, :] = x


def key_kernel(*refs):
    """Gradients of a tile of keys and values."""
    targets, refs = _Targets(*refs[:8]), refs[8:]
    history, d_history = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    tile, width = history[0].shape
    parts = parts_of(width)
    keys, values = _keys_and_values(history, slice(None), parts)

    def read() -> Parts:
        # Held for the whole loop, float32 values would spill registers, were they the keys as well.
        float32 = history[-1].dtype == jnp.float32
        return [history[-1][:, p] for p in parts] if float32 else values

    sums = _history_gradients(targets, keys, read, pl.program_id(0) * tile, 2)
    if len(history) == 1:  # keys are the values: both gradients are of one array
        sums = [[x + y for x, y in zip(*sums, strict=True)]]
    for d_ref, summed in zip(d_history, sums, strict=True):
        for p, x in zip(parts, summed, strict=True):
            d_ref[:, p] = x.astype(d_ref.dtype)


def of_attention(
    inputs: Inputs, tiling: Tiling, layer: Layer, statistics: Sequence[Array]
) -> Incoming:
    """Gradients of encoded tokens that are keys and values: they need not be stored.

    Args:
      inputs: Of the forward pass.
      tiling: How the batch is cut.
      layer: Of the encoder.
      statistics: Log-sum-exps, delta, queries and gradients of the outputs, see `Kernels.backward`.
    """
    E, C = inputs.query.shape[2:]
    specs = history_specs(tiling, E, C, lambda r, i: (i, 0, r))

    def of_tile(refs: Sequence[Any], encoded: Parts, position: Any, covered: Array) -> Parts:
        del covered  # no range has other tokens
        return _history_gradients(_Targets(*refs), encoded, lambda: encoded, position, 1)[0]

    cut = layer.cuts.layer
    bands = target_bands(inputs.first, inputs.last, tiling, layer.tile(cut))
    arrays = (*bands, inputs.start, inputs.end, *statistics)
    return Incoming(cut, arrays, specs.backward(0), of_tile)


def _history_gradients(
    t: _Targets, keys: Parts, values: Callable[[], Parts], position: Any, sums: int
) -> list[Parts]:
    """float32 gradients of a tile's keys and of its values, in one sum or in two."""
    parts = parts_of(t.query.shape[1])

    def step(j: Any, summed: list[Parts]) -> list[Parts]:
        queries, d_outputs = ([x[j, p, :] for p in parts] for x in (t.query, t.d_output))
        score = mask_scores(_product(keys, queries), t.start[j], t.end[j], position)
        d_weight = _product(values(), d_outputs)
        factors = score_gradients(score, d_weight, t.log_sum_exp[j], t.delta[j])
        weight, d_score = (x.astype(t.query.dtype) for x in factors)
        summed = list(summed)
        summed[0] = _add_products(summed[0], d_score, queries)
        summed[-1] = _add_products(summed[-1], weight, d_outputs)
        return summed

    zeros = [jnp.zeros(k.shape, jnp.float32) for k in keys]
    return lax.fori_loop(t.first[0, 0], t.last[0, 0], step, [zeros] * sums)
