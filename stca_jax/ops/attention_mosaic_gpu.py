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

from stca_jax.ops.attention_kernels import join_shares, split
from stca_jax.ops.encoder_mosaic_gpu import Incoming, Layer, encoded_tile
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
    return Kernel(tiling, (J, G, E, C), inputs.query.dtype, inputs.arrays, shares, gpu)


def forward(k: Kernel, inputs: Inputs) -> tuple[Array, Array]:
    """See `Kernels.forward`."""

    def body(first, last, start, end, query, *refs):
        history, results, own, rest = split(refs, k.arrays, 2, 3)
        j, g = (lax.axis_index(x) for x in ("tile", "group"))
        q, *ranges = k.gpu.read([query.at[j, g], start.at[j], end.at[j]], own, rest[-1])
        _attend(k, (q, *ranges), results, rest, lambda step, carry: _over_band(
            k, (first, last), history, step, carry
        ))  # fmt: skip

    shares = _attention_kernel(k, body, "target_to_history_forward")(
        inputs.first, inputs.last, inputs.start[:, 0], inputs.end[:, 0], inputs.query,
        *inputs.history,
    )  # fmt: skip
    return _joined(*shares)


def layer_forward(
    k: Kernel, layer: Layer, inputs: Inputs, keep: bool
) -> tuple[Array, Array, Array | None]:
    """See `Kernels.layer_forward`: a row has one target tile, history tiles are of 64 tokens."""
    D, tiles = layer.padded[0], layer.tiles // layer.lengths[0]

    def body(first, last, start, end, query, covered, tokens, *refs):
        weights, scale_bias, results, kept, own, rest = split(refs, 3, 2, 2, keep, 5)
        encoded, *rest = rest
        j, g = (lax.axis_index(x) for x in ("tile", "group"))
        sources = [query.at[j, g], start.at[j], end.at[j], *scale_bias]
        q, start_s, end_s, *norm = k.gpu.read(sources, own, rest[-1])

        def over(step: Any, carry: Any) -> Any:
            def tile(i: Any, covered_s: Any, x: Any, carry: Any) -> Any:
                value = encoded_tile(layer, x, covered_s, weights, norm)
                if keep:
                    rows = pl.ds((j * tiles + i) * TILE, TILE)
                    k.gpu.write((value, encoded, kept[0].at[rows]), wait=False)
                else:
                    encoded[...] = value.astype(encoded.dtype)
                    k.gpu.commit()
                carry = step(i * TILE, encoded, encoded, carry)
                k.gpu.wait()
                return carry

            begin, steps = _share(k, (first[j], last[j]))
            n0 = j * tiles + begin
            specs = [
                k.gpu.block((TILE,), lambda n: (n0 + n,)),
                k.gpu.block((TILE, D), lambda n: (n0 + n, 0), k.gpu.layout(k.dtype)),
            ]
            return k.gpu.pipeline(
                lambda n, *refs: tile(begin + n, *refs), steps, specs, carry, covered, tokens
            )

        _attend(k, (q, start_s, end_s), results, rest, over)

    numbers = [plgpu.SMEM((D,), jnp.float32)] * 2
    output, log_sum_exp, *kept = _attention_kernel(
        k, body, "history_layer_forward", numbers, [layer.tile], [layer.array] * keep
    )(inputs.first, inputs.last, inputs.start[:, 0], inputs.end[:, 0], inputs.query,
      layer.covered, layer.tokens, *layer.weights, *layer.norm)  # fmt: skip
    key = kept[0].reshape(layer.lengths[0], 1, -1, D) if keep else None
    return *_joined(output, log_sum_exp), key


def _attention_kernel(
    k: Kernel, body: Any, name: str, read: Sequence[Any] = (), scratch: Sequence[Any] = (),
    results: Sequence[Any] = (),
) -> Any:  # fmt: skip
    """Of programs that share bands.

    Args:
      k: Static.
      body: Results are weighted sums and log-sum-exps of shares, then `results`; scratch is a
        target tile's queries and ranges, `read`, `scratch`, and what `_attend` takes.
      name: See `kernel`.
      read: Shared memory of what is read with the queries.
      scratch: See `body`.
      results: See `body`.
    """
    J, G, E, C = k.shape
    shape = (k.shares, J, G, C)
    return kernel(
        body, name, {"share": k.shares, "group": G, "tile": J},
        [*[jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, E), shape)], *results],
        [k.queries, k.vector(jnp.int32), k.vector(jnp.int32), *read, *scratch,
         plgpu.SMEM((C, E), jnp.float32), k.vector(jnp.float32),
         plgpu.Barrier(num_arrivals=3 + len(read))],
        k.gpu,
    )  # fmt: skip


def _attend(
    k: Kernel, targets: Sequence[Any], results: Sequence[Any], scratch: Sequence[Any], over: Any
) -> None:
    """Stores weighted sums and log-sum-exps of a target tile over a share of its band.

    Args:
      k: Static.
      targets: Queries and ranges.
      results: Where to, by share, target tile and group.
      scratch: For each of them, and a barrier.
      over: `over(step, carry)` has `step(position, keys, values, carry)` done for every tile.
    """
    E, C = k.shape[2:]
    q, *ranges = targets

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
    summed, peak, total = over(step, zeros)
    nonempty = total > 0
    safe = jnp.where(nonempty, total, 1.0)
    place = tuple(lax.axis_index(x) for x in ("share", "tile", "group"))
    output, log_sum_exp = (x.at[place] for x in results)
    sums, row, _ = scratch
    k.gpu.write(
        (summed / along_rows(safe, summed.shape), sums, output),
        (jnp.where(nonempty, peak + jnp.log(safe), LOWEST_PEAK), row, log_sum_exp),
    )


def _joined(
    output: Float[Array, "s J G C E"], log_sum_exp: Float[Array, "s J G C"]
) -> tuple[Array, Array]:
    """What the programs that share a band found, as `Kernels.forward` returns it."""
    output, log_sum_exp = join_shares(output, log_sum_exp[..., None])
    return output.swapaxes(2, 3), log_sum_exp.swapaxes(2, 3)


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
    j, g, t = lax.axis_index("tile"), lax.axis_index("group"), k.tiling.history
    begin, steps = _share(k, tuple(x[j] for x in band))
    row = lax.div(j, jnp.int32(k.tiling.target_tiles_per_row))
    spec = k.gpu.block(
        (None, None, t, k.shape[2]), lambda n: (row, g, begin + n, 0), k.gpu.layout(k.dtype)
    )

    def body(n: Any, *refs: Any) -> Any:
        *tiles, carry = refs
        return step((begin + n) * t, tiles[0], tiles[-1], carry)

    return k.gpu.pipeline(body, steps, [spec] * k.arrays, carry, *history)


def _share(k: Kernel, band: tuple[Any, ...]) -> tuple[Array, Array]:
    """The first history tile of this program's share of a band, and how many it has."""
    first, last = band
    most = pl.cdiv(jnp.maximum(last - first, 0), k.shares)
    begin = first + lax.axis_index("share") * most
    return begin, jnp.clip(last - begin, 0, most)


def _mask(k: Kernel, score: Array, ranges: Sequence[Any], position: Any, axis: int) -> Array:
    """Scores whose tokens, along `axis`, are from `position` on; `NO_SCORE` outside a range."""
    along, other = (along_rows, 0) if axis == 1 else (along_columns, 1)
    start, end = (along(k.gpu.numbers(x, other), score.shape) for x in ranges)
    token = position + lax.broadcasted_iota(jnp.int32, score.shape, axis)
    return jnp.where((token >= start) & (token < end), score, NO_SCORE)
