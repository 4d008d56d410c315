"""The tiled implementation: one pass over the touched pairs of tiles, forward and backward.

Each block of tokens is encoded (history FFN and LayerNorm, if fused; keys and values, if
projected), used by every target tile that touches it, and forgotten.  Softmax is computed online;
the backward pass recomputes the block and the scores.  Neither scores nor encoded tokens of a whole
row are ever stored, and blocks and pairs that no range touches cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.encoder import encode_transposed, transpose_out
from stca_jax.ops.implementation import GroupedImplementation, Tokens, TokenWeights
from stca_jax.ops.sharded import platform
from stca_jax.ops.tiles import (
    BlockSizes,
    PairList,
    Tiling,
    default_block_sizes,
    make_tiling,
    tile_targets,
    tile_tokens,
    touched_pairs,
    untile_targets,
)
from stca_jax.ranges import Ranges, SharedRanges

# Finite, so that an empty range never computes inf - inf; the lowest peak is far above it, so that
# exp(NO_SCORE - peak) is zero without another mask.
NO_SCORE = -1e30
LOWEST_PEAK = -1e20


class _Blocks(NamedTuple):
    """Tokens by block."""

    tokens: Float[Array, "blocks T D"]
    score: Float[Array, "blocks T H"] | None


class _Ranges(NamedTuple):
    """Integers: everything that has no gradient."""

    covered: Bool[Array, "blocks T"]
    start: Int[Array, "tiles C"]
    end: Int[Array, "tiles C"]
    pairs: PairList


class Tiled(GroupedImplementation):
    """Loops over touched pairs of tiles, anywhere: XLA compiles them for every platform."""

    def attend_grouped(
        self,
        query: Float[Array, "R M G A E"],
        tokens: Tokens,
        weights: TokenWeights,
        ranges: Ranges,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M G A E"], Float[Array, "R M G A"]]:
        """See `GroupedImplementation`."""
        if platform() == "cpu":
            query, tokens, weights = _in_float32((query, tokens, weights))
        R, M, G, A, E = query.shape
        length = tokens.value.shape[1]
        if weights.encoder is not None:
            weights = weights._replace(encoder=transpose_out(weights.encoder))
        is_shared = isinstance(ranges, SharedRanges)
        sizes = block_sizes or default_block_sizes(length, M, platform(), is_shared=is_shared)
        tiling = make_tiling(R, length, M, sizes)
        # XLA would fold ranges that it knows, such as starts of zero, into the loop of the
        # exponentials, and compile it several times slower.
        ranges = Ranges(*_stored(*ranges))
        tiled = _Ranges(
            covered=tile_tokens(ranges.covered(length), tiling),
            start=jnp.tile(tile_targets(ranges.start, tiling), A),
            end=jnp.tile(tile_targets(ranges.end, tiling), A),
            pairs=touched_pairs(ranges, tiling),
        )
        score = None if tokens.score is None else tile_tokens(tokens.score, tiling)
        blocks = _Blocks(tile_tokens(tokens.value, tiling), score)
        # [tiles, m, G, A, E] -> [tiles, G, A m, E]: a head's targets are neighbours.
        stacked = tile_targets(query, tiling).transpose(0, 2, 3, 1, 4)
        output, log_sum_exp = _attend(
            tiling, stacked.reshape(tiling.num_target_tiles, G, -1, E), weights, blocks, tiled
        )

        def unstack(x: Array) -> Array:
            x = x.reshape(tiling.num_target_tiles, G, A, tiling.targets, *x.shape[3:])
            return untile_targets(jnp.moveaxis(x, 3, 1), tiling, M)

        return unstack(output), unstack(log_sum_exp)


def _in_float32(tree: Any) -> Any:
    """On a CPU, half again to twice as fast as in bfloat16, and exact; see docs/performance.md."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tiling: Tiling,
    query: Float[Array, "tiles G C E"],
    weights: TokenWeights,
    blocks: _Blocks,
    ranges: _Ranges,
) -> tuple[Float[Array, "tiles G C E"], Float[Array, "tiles G C"]]:
    return _forward(tiling, query, weights, blocks, ranges)[0]


class _Softmax(NamedTuple):
    """Running maximum, sum and weighted sum of the online softmax."""

    peak: Float[Array, "tiles G C"]
    total: Float[Array, "tiles G C"]
    summed: Float[Array, "tiles G E C"]


def _forward(tiling: Tiling, query: Array, weights: TokenWeights, blocks: _Blocks, ranges: _Ranges):
    def block_step(i: Array, state: _Softmax) -> _Softmax:
        block = ranges.pairs.blocks[i]
        keys, values = _first_and_last(
            _keys_and_values(weights, blocks.tokens[block], ranges.covered[block])
        )
        values = values.swapaxes(1, 2)  # once here: XLA is slow to turn them in each pair's product

        def pair_step(p: Array, state: _Softmax) -> _Softmax:
            pair = _pair(tiling, ranges, block, p)
            score = _scores(tiling, query, keys, blocks, ranges, pair)
            peak, total, summed = (x[pair.target] for x in state)
            (new_peak,) = _stored(jnp.maximum(peak, score.max(1)))
            weight = jnp.exp(score - new_peak[:, None])
            rescale = jnp.exp(peak - new_peak)
            value = _tile_of(values, tiling, pair.history, axis=2)
            summed = summed * rescale[:, None] + _dot(value, weight.astype(value.dtype), 2, 1)
            updates = (new_peak, total * rescale + weight.sum(1), summed)
            return _Softmax(
                *(x.at[pair.target].set(u) for x, u in zip(state, updates, strict=True))
            )

        return lax.fori_loop(0, ranges.pairs.num_pairs[block], pair_step, state)

    shape = query.shape[:3]
    state = _Softmax(
        jnp.full(shape, LOWEST_PEAK, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(query.swapaxes(2, 3).shape, jnp.float32),
    )
    peak, total, summed = lax.fori_loop(0, ranges.pairs.num_blocks, block_step, state)
    nonempty = total > 0
    safe_total = jnp.where(nonempty, total, 1)
    output = summed.swapaxes(2, 3) / safe_total[..., None]
    log_sum_exp = jnp.where(nonempty, peak + jnp.log(safe_total), -jnp.inf)
    return (output, log_sum_exp), (query, weights, blocks, ranges, output, log_sum_exp)


def _backward(tiling: Tiling, residuals, cotangents):
    query, weights, blocks, ranges, output, log_sum_exp = residuals
    nonempty = log_sum_exp > -jnp.inf
    d_output = jnp.where(nonempty[..., None], cotangents[0], 0).astype(jnp.float32)
    # d(score) = weight * (d(weight) - delta), log-sum-exp included: its gradient is the weight.
    delta = (d_output * output).sum(-1) - jnp.where(nonempty, cotangents[1], 0)
    d_output = d_output.astype(query.dtype)
    log_sum_exp = jnp.where(nonempty, log_sum_exp, 0)

    def block_step(i: Array, gradients):
        d_query, d_weights, d_blocks = gradients
        block = ranges.pairs.blocks[i]
        encoded, encode_vjp = jax.vjp(
            lambda w, x: _keys_and_values(w, x, ranges.covered[block]),
            weights,
            blocks.tokens[block],
        )
        keys, values = _first_and_last(encoded)
        turned_keys = keys.swapaxes(1, 2)  # as the values of the forward pass

        def pair_step(p: Array, carry):
            d_query, d_encoded, d_score_block = carry
            pair = _pair(tiling, ranges, block, p)
            score = _scores(tiling, query, keys, blocks, ranges, pair)
            lse, shift = _stored(log_sum_exp[pair.target], delta[pair.target])
            weight = jnp.exp(score - lse[:, None])
            key, value = (_tile_of(x, tiling, pair.history) for x in (keys, values))
            d_out = d_output[pair.target]
            d_weight = _dot(value, d_out, 2, 2)
            d_score = weight * (d_weight - shift[:, None])
            low = d_score.astype(key.dtype)
            turned_key = _tile_of(turned_keys, tiling, pair.history, axis=2)
            d_query = d_query.at[pair.target].add(_dot(turned_key, low, 2, 1))
            d_key = _dot(low, query[pair.target], 2, 1)
            d_value = _dot(weight.astype(key.dtype), d_out, 2, 1)
            parts = (d_key, d_value) if len(encoded) == 2 else (d_key + d_value,)
            d_encoded = tuple(
                _add_tile(x, part, tiling, pair.history)
                for x, part in zip(d_encoded, parts, strict=True)
            )
            if d_score_block is not None:
                d_score_block = _add_score(d_score_block, d_score, tiling, pair.history)
            return d_query, d_encoded, d_score_block

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in encoded)
        d_score_block = (
            None if blocks.score is None else jnp.zeros(blocks.score.shape[1:], jnp.float32)
        )
        d_query, d_encoded, d_score_block = lax.fori_loop(
            0, ranges.pairs.num_pairs[block], pair_step, (d_query, zeros, d_score_block)
        )
        d_w, d_x = encode_vjp(
            tuple(d.astype(x.dtype) for d, x in zip(d_encoded, encoded, strict=True))
        )
        d_weights = jax.tree.map(
            lambda total, part: total + part.astype(jnp.float32), d_weights, d_w
        )
        d_tokens = d_blocks.tokens.at[block].set(d_x)
        d_score = d_blocks.score
        if d_score is not None:
            d_score = d_score.at[block].set(d_score_block.astype(d_score.dtype))
        return d_query, d_weights, _Blocks(d_tokens, d_score)

    gradients = (
        jnp.zeros(query.swapaxes(2, 3).shape, jnp.float32),
        jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights),
        jax.tree.map(jnp.zeros_like, blocks),
    )
    d_query, d_weights, d_blocks = lax.fori_loop(0, ranges.pairs.num_blocks, block_step, gradients)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return d_query.swapaxes(2, 3).astype(query.dtype), d_weights, d_blocks, None


_attend.defvjp(_forward, _backward)


def _keys_and_values(
    weights: TokenWeights, tokens: Float[Array, "T D"], covered: Bool[Array, " T"]
) -> tuple[Float[Array, "G T E"], ...]:
    """Keys and values of a block; one array that is both in the absorbed order."""
    x = jnp.where(covered[:, None], tokens, 0)
    if weights.encoder is not None:
        x = encode_transposed(weights.encoder, x)
    if weights.w_key is None or weights.w_value is None:
        return (x[None],)
    return tuple(jnp.einsum("td,dgk->gtk", x, w) for w in (weights.w_key, weights.w_value))


class _Pair(NamedTuple):
    """One pair of tiles.

    Attributes:
      block: Index of the block.
      history: History tile within the block.
      target: Target tile of the batch.
    """

    block: Int[Array, ""]
    history: Int[Array, ""]
    target: Int[Array, ""]


def _pair(tiling: Tiling, ranges: _Ranges, block: Array, p: Array) -> _Pair:
    return _Pair(block, ranges.pairs.history_tile[block, p], ranges.pairs.target_tile[block, p])


def _scores(
    tiling: Tiling, query: Array, keys: Array, blocks: _Blocks, ranges: _Ranges, pair: _Pair
) -> Float[Array, "G t C"]:
    """float32 scores of a pair; `NO_SCORE`, whose exp is zero, outside a target's range."""
    G, C = query.shape[1:3]
    heads_per_group = C // tiling.targets
    score = _dot(_tile_of(keys, tiling, pair.history), query[pair.target], 2, 2)
    if blocks.score is not None:
        token_score = lax.dynamic_slice_in_dim(
            blocks.score[pair.block], pair.history * tiling.history, tiling.history
        )
        token_score = token_score.astype(jnp.float32).reshape(-1, G, heads_per_group, 1)
        token_score = jnp.broadcast_to(token_score, (*token_score.shape[:3], tiling.targets))
        score += token_score.reshape(-1, G, C).swapaxes(0, 1)
    tile = (pair.block * tiling.tiles_per_block + pair.history) % tiling.tiles_per_row
    position = (tile * tiling.history + jnp.arange(tiling.history))[:, None]
    start, end = _stored(ranges.start[pair.target], ranges.end[pair.target])
    return jnp.where((position >= start) & (position < end), score, NO_SCORE)


def _stored(*values: Array) -> Sequence[Array]:
    """Keeps XLA from indexing small arrays anew for every element of the fusions that use them."""
    return lax.optimization_barrier(values)


def _first_and_last(x: Sequence[Array]) -> tuple[Array, Array]:
    return x[0], x[-1]


def _tile_of(x: Float[Array, "G ..."], tiling: Tiling, index: Array, axis: int = 1) -> Array:
    """Tokens of a history tile; `axis` is theirs in the block."""
    return lax.dynamic_slice_in_dim(x, index * tiling.history, tiling.history, axis)


def _add_tile(x: Array, part: Array, tiling: Tiling, index: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(
        x, _tile_of(x, tiling, index) + part, index * tiling.history, 1
    )


def _add_score(total: Array, d_score: Float[Array, "G t C"], tiling: Tiling, index: Array) -> Array:
    """Adds a pair's score gradients to those of the tokens, summed over the targets."""
    G, t, _ = d_score.shape
    part = d_score.reshape(G, t, -1, tiling.targets).sum(-1).swapaxes(0, 1).reshape(t, -1)
    start = index * tiling.history
    old = lax.dynamic_slice_in_dim(total, start, t)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, 0)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Float[Array, "G x y"]:
    """Batched product over the groups, summed in float32."""
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
