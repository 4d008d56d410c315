"""Attention on TPUs (Mosaic): kernels, and the blocks that their programs are given.

Forward and for the gradients of the queries, a target tile's band of history tiles follow one
another.  For those of the history, the target tiles that need a tile of tokens do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from stca_jax.ops.attention_kernels import dot, mask_scores, score_gradients, softmax_step, split
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.encoder_tpu import (
    Incoming,
    Refs,
    Room,
    backward_of_tile,
    cores_and_rows,
    encoded_tile,
    ffn_of_tile,
    forward_fits,
    padded,
    tokens_of_tile,
    where_covered,
)
from stca_jax.ops.kernels import Inputs, Outcome
from stca_jax.ops.tiled import LOWEST_PEAK
from stca_jax.ops.tiles import Tiling, target_bands

_PRODUCT_ROWS = 128  # with fewer, the units that multiply matrices wait for the weights


@dataclasses.dataclass(frozen=True)
class TargetSpecs:
    """Blocks of arrays by target tile: [J, 1, C], [J, G, 1, C] and [J, G, E, C]."""

    row: pl.BlockSpec
    head_row: pl.BlockSpec
    wide: pl.BlockSpec

    @property
    def backward(self) -> list[pl.BlockSpec]:
        """Of `Targets`."""
        return [self.row, self.row, self.head_row, self.head_row, self.wide, self.wide]


def target_specs(E: int, C: int, tile_of: Any = lambda j, g, *_: (j, g)) -> TargetSpecs:
    """Specs for grids whose ids, and what is prefetched, `tile_of` maps to target tile and group.

    Args:
      E: Width of the keys.
      C: Targets x heads of a target tile.
      tile_of: By default, they are the first two ids.
    """

    def index(*ids: Any) -> tuple[Any, ...]:
        return (*tile_of(*ids), 0, 0)

    def row(*ids: Any) -> tuple[Any, ...]:
        return (tile_of(*ids)[0], 0, 0)

    return TargetSpecs(
        row=pl.BlockSpec((1, 1, C), row),
        head_row=pl.BlockSpec((1, 1, 1, C), index),
        wide=pl.BlockSpec((1, 1, E, C), index),
    )


def band_block(tiling: Tiling, *block: int, group: bool = False) -> pl.BlockSpec:
    """A tile of the band, of arrays by row, group if they have it, and history tile or token.

    Past the band's end the last block stays, and nothing is fetched.
    """

    def index(j: Any, g: Any, i: Any, first: Any, last: Any) -> tuple[Any, ...]:
        inside = jnp.clip(first[j] + i, 0, jnp.maximum(last[j] - 1, 0))
        row = lax.div(j, jnp.int32(tiling.target_tiles_per_row))
        return row, *[g] * group, inside, *[0] * (len(block) - 1)

    return pl.BlockSpec((1, *[1] * group, *block), index)


def key_specs(tiling: Tiling, inputs: Inputs) -> list[pl.BlockSpec]:
    """Keys and values of the band."""
    spec = band_block(tiling, tiling.history, inputs.query.shape[2], group=True)
    return [spec] * len(inputs.history)


def forward_kernel(first, last, start, end, query, *refs, tile):
    """Softmax and weighted sums of a target tile, history tile by history tile."""
    *history, output, log_sum_exp, peak, total, summed = refs

    def read() -> tuple[Array, Array]:
        return history[0][0, 0], history[-1][0, 0]

    targets, results = (start, end, query), (output, log_sum_exp)
    _attend((first, last), targets, read, results, (peak, total, summed), tile)


def layer_kernel(first, last, start, end, query, *refs, tile, skip):
    """The same, of tokens that it encodes, and stores if there is where."""
    (covered, tokens), weights, results, (*kept, peak, total, summed) = split(refs, 2, 5, 2)

    def read() -> tuple[Array, Array]:
        _, _, y = ffn_of_tile(where_covered(covered, tokens[0]), weights, skip)
        encoded = encoded_tile(y, weights).astype(tokens.dtype)
        for ref in kept:
            ref[0, 0] = encoded
        return encoded, encoded

    _attend((first, last), (start, end, query), read, results, (peak, total, summed), tile)


def _attend(
    bands: tuple[Any, Any], targets: tuple[Any, Any, Any],
    read: Callable[[], tuple[Array, Array]], results: Sequence[Any],
    scratch: tuple[Any, Any, Any], tile: int,
) -> None:  # fmt: skip
    """A step of a target tile: of its band, the keys and values that it reads."""
    (first, last), (start, end, query) = bands, targets
    peak, total, summed = scratch
    j, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST_PEAK)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(first[j] + i < last[j])
    def _():
        key, value = read()
        score = dot(key, query[0, 0], 1, 0)
        score = mask_scores(score, start[0], end[0], (first[j] + i) * tile)
        weight, rescale, peak[...], total[...] = softmax_step(score, peak[...], total[...])
        summed[...] = summed[...] * rescale + dot(value, weight.astype(value.dtype), 0, 0)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        output, log_sum_exp = results
        nonempty = total[...] > 0
        safe_total = jnp.where(nonempty, total[...], 1)
        output[0, 0] = summed[...] / safe_total
        log_sum_exp[0, 0] = jnp.where(nonempty, peak[...] + jnp.log(safe_total), 0)


def fits_layer(tiling: Tiling, inputs: Inputs, encoder: HistoryEncoder) -> bool:
    """Whether VMEM has room for `layer_kernel`."""
    E, C = inputs.query.shape[2:]
    room = Room(fixed=2 * 4 * E * padded(C) * 4, token=4 * padded(C) * 4)
    return forward_fits(tiling.history, encoder, inputs.query.dtype, room)


class Targets(NamedTuple):
    """What a backward kernel is given of a target tile; arrays, or references to its blocks.

    Attributes:
      start: See `Inputs`.
      end: See `Inputs`.
      log_sum_exp: See `Outcome`.
      delta: See `Outcome`.
      query: See `Inputs`.
      d_output: See `Outcome`.
    """

    start: Any
    end: Any
    log_sum_exp: Any
    delta: Any
    query: Any
    d_output: Any

    @classmethod
    def of(cls, inputs: Inputs, outcome: Outcome) -> Targets:
        """The arrays, in the order of `TargetSpecs.backward`."""
        return cls(inputs.start, inputs.end, outcome.log_sum_exp, outcome.delta, inputs.query,
                   outcome.d_output)  # fmt: skip

    def gradients(
        self, key: Float[Array, "t E"], value: Float[Array, "t E"], position: Any
    ) -> tuple[Float[Array, "t C"], Float[Array, "t C"]]:
        """Weights and gradients of the scores, in the dtype of the keys.

        Args:
          key: Of a tile of tokens.
          value: Of the same.
          position: Of the first one in its row.
        """
        score = mask_scores(dot(key, self.query[0, 0], 1, 0), self.start[0], self.end[0], position)
        d_weight = dot(value, self.d_output[0, 0], 1, 0)
        factors = score_gradients(score, d_weight, self.log_sum_exp[0, 0], self.delta[0, 0])
        weight, d_score = (x.astype(self.query.dtype) for x in factors)
        return weight, d_score

    def add_gradients(self, sums: Sequence[Any], key: Any, value: Any, position: Any) -> None:
        """Adds those of keys and values to references to [t, E], or both to one reference.

        Args:
          sums: Of the keys, and of the values.
          key: See `gradients`.
          value: See `gradients`.
          position: See `gradients`.
        """
        weight, d_score = self.gradients(key, value, position)
        sums[0][...] += dot(d_score, self.query[0, 0], 1, 1)
        sums[-1][...] += dot(weight, self.d_output[0, 0], 1, 1)


def query_kernel(first, last, *refs, tile):
    """Gradients of a target tile's queries, history tile by history tile."""
    targets, (*history, d_query, summed) = Targets(*refs[:6]), refs[6:]
    j, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        summed[...] = jnp.zeros_like(summed)

    @pl.when(first[j] + i < last[j])
    def _():
        key = history[0][0, 0]
        _, d_score = targets.gradients(key, history[-1][0, 0], (first[j] + i) * tile)
        summed[...] += dot(key, d_score, 0, 0)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        d_query[0, 0] = summed[...]


def key_kernel(first, last, *refs, tile, tiles_per_row):
    """Gradients of a tile of keys and values, target tile by target tile."""
    arrays = (len(refs) - 6) // 3
    targets, history, d_history, sums = split(refs, 6, arrays, arrays)
    targets = Targets(*targets)
    r, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    target_tile = r * tiles_per_row + j

    @pl.when(j == 0)
    def _():
        for summed in sums:
            summed[...] = jnp.zeros_like(summed)

    @pl.when((first[target_tile] <= i) & (i < last[target_tile]))
    def _():
        targets.add_gradients(sums, history[0][0, 0], history[-1][0, 0], i * tile)

    @pl.when(j == tiles_per_row - 1)
    def _():
        for d_ref, summed in zip(d_history, sums, strict=True):
            d_ref[0, 0] = summed[...].astype(d_ref.dtype)


def of_attention(
    tiling: Tiling, inputs: Inputs, unencoded: Unencoded, outcome: Outcome
) -> Incoming | None:
    """Gradients of encoded tokens that are keys and values: they do not leave VMEM.

    Keys are not read either, but encoded again: what that computes, the backward pass needs anyway.

    Args:
      tiling: How the batch is cut.
      inputs: Of the forward pass.
      unencoded: Of what was encoded for it.
      outcome: Of the forward pass.

    Returns:
      None if VMEM has room for few tokens at a time, or for none.
    """
    E, C = inputs.query.shape[2:]
    (D, F), length = unencoded.encoder.up.shape, unencoded.covered.shape[1]
    dtype = inputs.query.dtype
    tile = tokens_of_tile(length, unencoded.encoder, dtype, _room(E, C, dtype.itemsize))
    if tile < min(_PRODUCT_ROWS, tokens_of_tile(length, unencoded.encoder, dtype)):
        return None
    begin, end = target_bands(inputs.first, inputs.last, tiling, tile)
    _, rows = cores_and_rows(tiling.rows)

    def tile_of(c: Any, r: Any, i: Any, j: Any, begin: Any, end: Any, *_: Any) -> tuple[Any, int]:
        """Outside of the target tiles that need these tokens, a block stays: none is fetched."""
        row = c * rows + r
        n = row * (length // tile) + i
        needed = jnp.clip(j, begin[n], jnp.maximum(end[n] - 1, begin[n]))
        return row * tiling.target_tiles_per_row + needed, 0

    return Incoming(
        kernel=functools.partial(_layer_kernel, history=tiling.history),
        tile=tile,
        steps=tiling.target_tiles_per_row,
        prefetched=(begin.ravel(), end.ravel(), inputs.first, inputs.last),
        arrays=Targets.of(inputs, outcome),
        specs=target_specs(E, C, tile_of).backward,
        scratch=[
            pltpu.VMEM((tile, F), jnp.float32),
            pltpu.VMEM((tile, F), jnp.float32),
            pltpu.VMEM((tile, D), jnp.float32),
            pltpu.VMEM((tile, D), dtype),
            pltpu.VMEM((tile, D), jnp.float32),
        ],
    )


def _room(E: int, C: int, size: int) -> Room:
    """What `_layer_kernel` needs of VMEM beside the encoder's backward pass.

    That has u, v and y as well, though not from step to step.
    """
    wide, lanes = padded(E), padded(C)
    targets = 2 * 2 * E * lanes * size + 2 * 4 * 8 * lanes * 4
    encoded, scores = wide * (size + 4), 4 * lanes * 4
    return Room(targets, encoded + scores)


def _layer_kernel(refs: Refs, given: Sequence[Any], scratch: Sequence[Any], skip: bool, *,
                  history: int) -> None:  # fmt: skip
    """See `Incoming`: encodes a tile, adds what target tiles add to its gradients, goes back."""
    (begin, end, first, last), targets = given[:4], Targets(*given[4:])
    *ffn, encoded, summed = scratch
    tile = len(summed)
    row = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    i, j, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    n, target_tile = row * pl.num_programs(2) + i, row * steps + j
    is_read = begin[n] < end[n]

    @pl.when(is_read & (j == 0))
    def _():
        x = where_covered(refs.covered, refs.tokens[0])
        for ref, a in zip(ffn, ffn_of_tile(x, refs.weights, skip), strict=True):
            ref[...] = a
        encoded[...] = encoded_tile(ffn[-1][...], refs.weights).astype(encoded.dtype)
        summed[...] = jnp.zeros_like(summed)

    band = first[target_tile] * history, last[target_tile] * history

    @pl.when((band[0] < (i + 1) * tile) & (i * tile < band[1]))
    def _():
        targets.add_gradients([summed], encoded[...], encoded[...], i * tile)

    @pl.when(is_read & (j == steps - 1))
    def _():
        x = where_covered(refs.covered, refs.tokens[0])
        backward_of_tile(refs, x, summed[...], [ref[...] for ref in ffn], skip)

    @pl.when(~is_read & (j == steps - 1))
    def _():
        refs.d_tokens[...] = jnp.zeros_like(refs.d_tokens)
