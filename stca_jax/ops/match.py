"""Exact-match statistics of a target over its own range of history: the match channel.

What feature stores call user-item cross counts, computed on the device from the same row as the
attention, so exact for every window, without leakage and without skew between training and serving.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stca_jax.ops.sharded import on_mesh, platform
from stca_jax.ops.tiles import (
    BlockSizes,
    make_tiling,
    tile_targets,
    tile_tokens,
    touched_pairs,
    untile_targets,
)
from stca_jax.ranges import Ranges

# Nothing is encoded here, so a block is one tile; comparisons are cheap, so tiles are large.
_BLOCK_SIZES = BlockSizes(tokens=1, history=512, targets=64)

Implementation = Literal["dense", "tiled"]
_Targets = tuple[Int[Array, "R M fields"], Int[Array, "R M"]]  # ids, time of the request
_Tokens = tuple[Int[Array, "R L fields"], Int[Array, "R L"]]  # ids, time of the event


class MatchStatistics(NamedTuple):
    """Statistics of the events of a target's range that carry the target's id.

    Attributes:
      matches: How many events match, per id field in the order given.
      decayed_matches: Matches of the first field, each weighing exp(-age / decay).
      last_age: Age in seconds of the latest match of the first field; +inf if none.
    """

    matches: Float[Array, "R M fields"]
    decayed_matches: Float[Array, "R M"]
    last_age: Float[Array, "R M"]


def match_statistics(
    target_ids: Mapping[str, Int[Array, "R M"]],
    history_ids: Mapping[str, Int[Array, "R L"]],
    history_time: Int[Array, "R L"],
    request_time: Int[Array, "R M"],
    ranges: Ranges,
    *,
    decay_seconds: float,
    implementation: Implementation | None = None,
) -> MatchStatistics:
    """Counts exact matches of each target's ids within its range.

    Not differentiable, and it needs no gradient: nothing in it is learned.

    Args:
      target_ids: Id fields of the targets; the first one also gets decayed count and age.
      history_ids: The same fields of the events.
      history_time: Seconds.
      request_time: Seconds; ages are relative to it.
      ranges: Of each target.
      decay_seconds: Time constant of the decayed count.
      implementation: "tiled" compares within the tiles that ranges touch, so the cost follows the
        ranges; "dense" compares every target with every token of its row.  None takes "dense" on
        GPUs, where a loop whose length depends on data waits for the host at every step, and
        comparisons are nearly free.
    """
    fields = list(target_ids)
    if 0 in ranges.start.shape or history_time.shape[1] == 0:
        none = jnp.zeros(ranges.start.shape, jnp.float32)
        return MatchStatistics(jnp.stack([none] * len(fields), -1), none, none + jnp.inf)
    implementation = implementation or ("dense" if platform() == "gpu" else "tiled")
    single_device = _dense_statistics if implementation == "dense" else _tiled_statistics
    found = on_mesh(
        functools.partial(single_device, decay_seconds=decay_seconds),
        _merge,
        (),
        (jnp.stack([target_ids[f] for f in fields], -1), request_time),
        (jnp.stack([history_ids[f] for f in fields], -1), history_time),
        ranges,
    )
    return jax.tree.map(lax.stop_gradient, found)


def _merge(parts: MatchStatistics, axis: str) -> MatchStatistics:
    matches, decayed_matches = lax.psum(parts[:2], axis)
    return MatchStatistics(matches, decayed_matches, lax.pmin(parts.last_age, axis))


def _dense_statistics(
    weights: tuple[()],
    per_target: _Targets,
    per_token: _Tokens,
    ranges: Ranges,
    *,
    decay_seconds: float,
) -> MatchStatistics:
    """In one pass over M x L on a GPU; XLA stores only `in_range` of it, a byte each."""
    del weights  # nothing is learned
    (target_ids, now), (token_ids, time) = per_target, per_token
    in_range = ranges.contain(jnp.arange(time.shape[1]))
    hits = [
        in_range & (token_ids[:, None, :, field] == target_ids[:, :, None, field])
        for field in range(target_ids.shape[-1])
    ]
    age = (now[..., None] - time[:, None]).astype(jnp.float32)
    return MatchStatistics(
        jnp.stack([hit.sum(-1, dtype=jnp.float32) for hit in hits], -1),
        jnp.where(hits[0], jnp.exp(-age / decay_seconds), 0).sum(-1),
        jnp.where(hits[0], age, jnp.inf).min(-1),
    )


def _tiled_statistics(
    weights: tuple[()],
    per_target: _Targets,
    per_token: _Tokens,
    ranges: Ranges,
    *,
    decay_seconds: float,
) -> MatchStatistics:
    del weights  # nothing is learned
    R, M = ranges.start.shape
    tiling = make_tiling(R, per_token[1].shape[1], M, _BLOCK_SIZES)
    pairs = touched_pairs(ranges, tiling)
    target_ids, now = (tile_targets(x, tiling) for x in per_target)
    token_ids, time = (tile_tokens(x, tiling) for x in per_token)
    start, end = (tile_targets(x, tiling) for x in ranges)

    def block_step(i: Array, state: MatchStatistics) -> MatchStatistics:
        block = pairs.blocks[i]
        position = (block % tiling.tiles_per_row) * tiling.history + jnp.arange(tiling.history)
        ids = token_ids[block].T[..., None]  # [fields, t, 1]

        def pair_step(p: Array, state: MatchStatistics) -> MatchStatistics:
            j = pairs.target_tile[block, p]
            in_range = (position[:, None] >= start[j]) & (position[:, None] < end[j])
            hits = in_range & (ids == target_ids[j].T[:, None])  # [fields, t, m]
            age = (now[j] - time[block][:, None]).astype(jnp.float32)
            decayed = jnp.where(hits[0], jnp.exp(-age / decay_seconds), 0).sum(0)
            return MatchStatistics(
                state.matches.at[j].add(hits.sum(1, dtype=jnp.float32).T),
                state.decayed_matches.at[j].add(decayed),
                state.last_age.at[j].min(jnp.where(hits[0], age, jnp.inf).min(0)),
            )

        return lax.fori_loop(0, pairs.num_pairs[block], pair_step, state)

    zeros = jnp.zeros(start.shape, jnp.float32)
    matches = jnp.zeros(target_ids.shape, jnp.float32)
    state = MatchStatistics(matches, zeros, zeros + jnp.inf)
    state = lax.fori_loop(0, pairs.num_blocks, block_step, state)
    return MatchStatistics(*(untile_targets(x, tiling, M) for x in state))
