"""Attention on Hopper GPUs (Mosaic): kernels of one warp group each.

Forward and for the gradients of the queries, the C targets and heads of a target tile are the rows
of a product, and tokens its columns: a softmax is summed within a row.  For the gradients of the
history it is the other way around, for there the tokens are what is summed into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from stca_jax.ops.attention_kernels import split
from stca_jax.ops.encoder_mosaic_gpu import Incoming, Layer
from stca_jax.ops.kernels import Inputs, Outcome
from stca_jax.ops.mosaic_gpu import TILE, Generation, Turned, along_columns, along_rows, kernel
from stca_jax.ops.tiled import LOWEST_PEAK, NO_SCORE
from stca_jax.ops.tiles import Tiling, target_bands


class Kernel(NamedTuple):
    """What is static in the kernels of a call.

    Attributes:
      tiling: How the batch is cut.
      shape: J, G, E and C, see `Inputs`.
      dtype: Of the keys.
      arrays: Of keys and values: one if they are the same.
      shares: Programs that share the band of a target tile.
      gpu: What runs them.
    """

    tiling: Tiling
    shape: tuple[int, int, int, int]
    dtype: Any
    arrays: int
    shares: int
    gpu: Generation

    @property
    def queries(self) -> Any:
        """Shared memory of the queries of a target tile, or of the gradients of its outputs."""
        return self.gpu.matrix(*self.shape[2:], self.dtype)

    def vector(self, dtype: Any) -> Any:
        """Shared memory of a number per target and head of a target tile."""
        return plgpu.SMEM(self.shape[3:], dtype)


def kernel_of(tiling: Tiling, inputs: Inputs, shares: int, gpu: Generation) -> Kernel:
    """Of these inputs."""
    J, G, E, C = inputs.query.shape
    arrays = len(inputs.history)
    return Kernel(tiling, (J, G, E, C), inputs.key.dtype, arrays, shares, gpu)


def forward(k: Kernel, inputs: Inputs) -> tuple[Array, Array]:
    """See `Kernels.forward`."""
    J, G, E, C = k.shape

    def body(first, last, start, end, query, *refs):
        history, rest = split(refs, k.arrays)
        results, own, (sums, row, barrier) = split(rest, 2, 3)
        output, log_sum_exp = results
        j, g, share = (lax.axis_index(x) for x in ("tile", "group", "share"))
        q, *ranges = k.gpu.read([query.at[j, g], start.at[j], end.at[j]], own, barrier)

        def step(position, keys, values, carry):
            summed, peak, total = carry
            score = k.gpu.product((Turned(q), Turned(keys)))
            score = _mask(k, score, ranges, position, 1)
            new = jnp.maximum(peak, score.max(1))
            weight = jnp.exp(score - along_rows(new, score.shape))
            rescale = jnp.exp(peak - new)
            summed = summed * along_rows(rescale, summed.shape)
            summed = k.gpu.add(summed, (weight.astype(k.dtype), values))
            return summed, new, total * rescale + weight.sum(1)

        zeros = (
            jnp.zeros((C, E), jnp.float32),
            jnp.full((C,), LOWEST_PEAK, jnp.float32),
            jnp.zeros((C,), jnp.float32),
        )
        summed, peak, total = _over_band(k, (first, last), history, step, zeros)
        nonempty = total > 0
        safe = jnp.where(nonempty, total, 1.0)
        k.gpu.write(
            (summed / along_rows(safe, summed.shape), sums, output.at[share, j, g]),
            (jnp.where(nonempty, peak + jnp.log(safe), LOWEST_PEAK), row,
             log_sum_exp.at[share, j, g]),
        )  # fmt: skip

    shape = (k.shares, J, G, C)
    output, log_sum_exp = kernel(
        body,
        "target_to_history_forward",
        {"share": k.shares, "group": G, "tile": J},
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, E), shape)],
        [k.queries, k.vector(jnp.int32), k.vector(jnp.int32), plgpu.SMEM((C, E), jnp.float32),
         k.vector(jnp.float32), plgpu.Barrier(num_arrivals=3)],
        k.gpu,
    )(inputs.first, inputs.last, inputs.start[:, 0], inputs.end[:, 0], inputs.query,
      *inputs.history)  # fmt: skip
    joined = jax.nn.logsumexp(log_sum_exp, axis=0)
    output = (output * jnp.exp(log_sum_exp - joined)[..., None]).sum(0)
    return output.swapaxes(2, 3), jnp.where(joined > LOWEST_PEAK, joined, 0)[:, :, None]


def query_gradients(k: Kernel, inputs: Inputs, outcome: Outcome) -> Float[Array, "J G E C"]:
    """float32."""
    J, G, E, C = k.shape

    def body(first, last, start, end, log_sum_exp, delta, query, d_output, *refs):
        history, (d_query, *own, sums, barrier) = split(refs, k.arrays)
        j, g, share = (lax.axis_index(x) for x in ("tile", "group", "share"))
        sources = [x.at[j, g] for x in (query, d_output, log_sum_exp, delta)]
        sources += [start.at[j], end.at[j]]
        q, d_o, log_sum_exp_s, delta_s, *ranges = k.gpu.read(sources, own, barrier)

        def step(position, keys, values, summed):
            score = k.gpu.product((Turned(q), Turned(keys)))
            score = _mask(k, score, ranges, position, 1)
            weight = jnp.exp(score - along_rows(k.gpu.numbers(log_sum_exp_s, 0), score.shape))
            d_weight = k.gpu.product((Turned(d_o), Turned(values)))
            d_score = weight * (d_weight - along_rows(k.gpu.numbers(delta_s, 0), score.shape))
            return k.gpu.add(summed, (d_score.astype(k.dtype), keys))

        zeros = jnp.zeros((C, E), jnp.float32)
        summed = _over_band(k, (first, last), history, step, zeros)
        k.gpu.write((summed, sums, d_query.at[share, j, g]))

    vectors = [k.vector(x) for x in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)]
    shares = kernel(
        body,
        "target_to_history_backward_query",
        {"share": k.shares, "group": G, "tile": J},
        jax.ShapeDtypeStruct((k.shares, J, G, C, E), jnp.float32),
        [k.queries, k.queries, *vectors, plgpu.SMEM((C, E), jnp.float32),
         plgpu.Barrier(num_arrivals=6)],
        k.gpu,
    )(inputs.first, inputs.last, *statistics(inputs, outcome), *inputs.history)  # fmt: skip
    return shares.sum(0).swapaxes(2, 3)


def history_gradients(k: Kernel, inputs: Inputs, outcome: Outcome) -> tuple[Array, ...]:
    """Of `Inputs.history`."""
    _, G, E, _ = k.shape
    t, tiles = k.tiling.history, k.tiling.tiles_per_row
    bands = target_bands(inputs.first, inputs.last, k.tiling, t)

    def body(*refs):
        bands, targets, history, d_history, scratch = split(refs, 2, 6, k.arrays, k.arrays)
        i, g, r = (lax.axis_index(x) for x in ("tile", "group", "row"))
        rows = pl.ds(i * t, t)
        *own, barrier = scratch
        tiles_s = k.gpu.read([x.at[r, g, rows] for x in history], own, barrier)
        band = tuple(x[r, i] for x in bands)
        sums = [jnp.zeros((t, E), jnp.float32)] * k.arrays
        sums = add_history_gradients(
            k, targets, (tiles_s[0], tiles_s[-1]), (r, g, i * t), band, sums
        )
        for summed, s, d in zip(sums, tiles_s, d_history, strict=True):
            k.gpu.write((summed, s, d.at[r, g, rows]))

    return tuple(kernel(
        body,
        "target_to_history_backward_key",
        {"tile": tiles, "group": G, "row": k.tiling.rows},
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.history],
        [*[k.gpu.matrix(t, E, k.dtype)] * k.arrays, plgpu.Barrier(num_arrivals=k.arrays)],
        k.gpu,
    )(*bands, *statistics(inputs, outcome), *inputs.history))  # fmt: skip


def of_attention(k: Kernel, layer: Layer, inputs: Inputs, outcome: Outcome) -> Incoming:
    """Gradients of encoded tokens that are keys and values: they need not be stored."""
    bands = target_bands(inputs.first, inputs.last, k.tiling, TILE)
    tiles = layer.tiles // layer.lengths[0]

    def of_tile(arrays: Sequence[Any], scratch: Sequence[Any], encoded: Any, tile: Any) -> Array:
        del scratch
        row = lax.div(tile, jnp.int32(tiles))
        i = tile - row * tiles
        sums = [jnp.zeros((TILE, k.shape[2]), jnp.float32)]
        band, place = (arrays[0][row, i], arrays[1][row, i]), (row, 0, i * TILE)
        return add_history_gradients(k, arrays[2:], (encoded, encoded), place, band, sums)[0]

    return Incoming((*bands, *statistics(inputs, outcome)), [], of_tile)


def statistics(inputs: Inputs, outcome: Outcome) -> tuple[Array, ...]:
    """What the backward kernels read of target tiles: numbers [J, (G,) C], then [J, G, E, C]."""
    return (inputs.start[:, 0], inputs.end[:, 0], outcome.log_sum_exp[:, :, 0],
            outcome.delta[:, :, 0], inputs.query, outcome.d_output)  # fmt: skip


def add_history_gradients(
    k: Kernel, targets: Sequence[Any], history: tuple[Any, Any], place: tuple[Any, Any, Any],
    band: tuple[Any, Any], sums: list[Array],
) -> list[Array]:  # fmt: skip
    """`sums`, and the gradients of a tile of keys and of its values, in one sum or in two.

    Args:
      k: Static.
      targets: `statistics`, in global memory.
      history: Keys [t, E] and values in shared memory.
      place: Row, group, and the first token's position.
      band: First target tile of the row that reads the tile, and one past the last.
      sums: One float32 [t, E] if keys are the values, or two.
    """
    E, C = k.shape[2:]
    (row, group, position), per_row = place, k.tiling.target_tiles_per_row

    def step(n, start, end, log_sum_exp, delta, query, d_output, sums):
        del n
        keys, values = history
        score = k.gpu.product((keys, query))
        score = _mask(k, score, (start, end), position, 0)
        weight = jnp.exp(score - along_columns(k.gpu.numbers(log_sum_exp, 1), score.shape))
        d_weight = k.gpu.product((values, d_output))
        d_score = weight * (d_weight - along_columns(k.gpu.numbers(delta, 1), score.shape))
        parts = (
            (d_score.astype(k.dtype), Turned(query)),
            (weight.astype(k.dtype), Turned(d_output)),
        )
        if len(sums) == 1:
            return [k.gpu.add(sums[0], *parts)]
        return [k.gpu.add(s, p) for s, p in zip(sums, parts, strict=True)]

    def tile(n: Any) -> Any:
        return row * per_row + band[0] + n

    block, layout = k.gpu.block, k.gpu.layout(k.dtype)
    specs = [
        *[block((None, C), lambda n: (tile(n), 0))] * 2,
        *[block((None, None, C), lambda n: (tile(n), group, 0))] * 2,
        *[block((None, None, E, C), lambda n: (tile(n), group, 0, 0), layout)] * 2,
    ]
    return k.gpu.pipeline(step, jnp.maximum(band[1] - band[0], 0), specs, sums, *targets)


def _over_band(
    k: Kernel, band: tuple[Any, Any], history: Sequence[Any], step: Any, carry: Any
) -> Any:
    """`step(position, keys, values, carry)` over this program's share of a band."""
    j, g, share = (lax.axis_index(x) for x in ("tile", "group", "share"))
    (first, last), t = (x[j] for x in band), k.tiling.history
    most = pl.cdiv(jnp.maximum(last - first, 0), k.shares)
    begin = first + share * most
    steps = jnp.clip(last - begin, 0, most)
    row = lax.div(j, jnp.int32(k.tiling.target_tiles_per_row))
    spec = k.gpu.block(
        (None, None, t, k.shape[2]), lambda n: (row, g, begin + n, 0), k.gpu.layout(k.dtype)
    )

    def body(n: Any, *refs: Any) -> Any:
        *tiles, carry = refs
        return step((begin + n) * t, tiles[0], tiles[-1], carry)

    return k.gpu.pipeline(body, steps, [spec] * k.arrays, carry, *history)


def _mask(k: Kernel, score: Array, ranges: Sequence[Any], position: Any, axis: int) -> Array:
    """Scores whose tokens, along `axis`, are from `position` on; `NO_SCORE` outside a range."""
    along, other = (along_rows, 0) if axis == 1 else (along_columns, 1)
    start, end = (along(k.gpu.numbers(x, other), score.shape) for x in ranges)
    token = position + lax.broadcasted_iota(jnp.int32, score.shape, axis)
    return jnp.where((token >= start) & (token < end), score, NO_SCORE)
