"""Exact-match statistics of a target over its own range of history: the match channel.

What feature stores call user-item cross counts, computed on the device from the same row as the
attention, so exact for every window, without leakage and without skew between training and serving.

Each row's tokens are sorted by (id, position), field by field, so that the events of a range that
carry an id are neighbours, `[first, end)` in that order:

    row            a b a c a b        range [1, 5)
    sorted         a a a b b c        the range's a's: sorted places [1, 3)
    position       0 2 4 1 5 3

Two binary searches find the places of a target.  The count is their distance, the last match is the
one before `end`, and a decayed count is the difference of two running ones.  The cost is
O((L + M) log L) for each field, whatever the ranges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.sharded import on_mesh, platform
from stca_jax.ops.sorting import sort_ids
from stca_jax.ranges import Ranges

_Targets = tuple[Int[Array, "R M F"], Int[Array, "R M"]]  # ids, time of the request
_Tokens = tuple[Int[Array, "R L F"], Int[Array, "R L"]]  # ids, time of the event


class MatchStatistics(NamedTuple):
    """Statistics of the events of a target's range that carry the target's id, per id field.

    Attributes:
      matches: How many there are.
      decayed_matches: The same for each time constant, an event weighing exp(-age / constant).
      last_age: Age in seconds of the latest; +inf if none.
    """

    matches: Float[Array, "R M F"]
    decayed_matches: Float[Array, "R M F decays"]
    last_age: Float[Array, "R M F"]


def match_statistics(
    target_ids: Mapping[str, Int[Array, "R M"]],
    history_ids: Mapping[str, Int[Array, "R L"]],
    history_time: Int[Array, "R L"],
    request_time: Int[Array, "R M"],
    ranges: Ranges,
    *,
    decay_seconds: tuple[float, ...],
) -> MatchStatistics:
    """Statistics of exact matches of each target's ids within its range.

    Not differentiable, and it needs no gradient: nothing in it is learned.

    Args:
      target_ids: Id fields of the targets, in the order of the result.
      history_ids: The same fields of the events.
      history_time: Seconds; within a range they do not decrease.
      request_time: Seconds; ages are relative to it.
      ranges: Of each target.
      decay_seconds: Time constants of the decayed counts.

    Returns:
      float32 statistics; 0, 0 and +inf where there are no targets, tokens or matches.

    Raises:
      ValueError: rows or length do not divide over the mesh, see `on_mesh`.
    """
    fields = list(target_ids)
    if 0 in ranges.start.shape or history_time.shape[1] == 0:
        shape = (*ranges.start.shape, len(fields))
        decayed = jnp.zeros((*shape, len(decay_seconds)))
        return MatchStatistics(jnp.zeros(shape), decayed, jnp.full(shape, jnp.inf))
    found = on_mesh(
        functools.partial(_statistics, decay_seconds=decay_seconds),
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


def _statistics(
    weights: tuple[()],
    per_target: _Targets,
    per_token: _Tokens,
    ranges: Ranges,
    *,
    decay_seconds: tuple[float, ...],
) -> MatchStatistics:
    del weights  # nothing is learned
    (target_ids, now), (token_ids, time) = per_target, per_token
    covered = ranges.covered(time.shape[1])
    time = jnp.where(covered, time, 0)
    token_ids = jnp.where(covered[..., None], token_ids, 0)  # negative ones would not be in order
    of_field = functools.partial(_statistics_of_row, decays=jnp.asarray(decay_seconds, jnp.float32))
    of_row = jax.vmap(of_field, in_axes=(1, None, 1, None, None, None, None), out_axes=1)
    return jax.vmap(of_row)(target_ids, now, token_ids, time, covered, *ranges)


def _statistics_of_row(
    target_id: Int[Array, " M"],
    now: Int[Array, " M"],
    token_id: Int[Array, " L"],
    time: Int[Array, " L"],
    covered: Bool[Array, " L"],
    start: Int[Array, " M"],
    end: Int[Array, " M"],
    *,
    decays: Float[Array, " decays"],
) -> MatchStatistics:
    """Of one row and one id field."""
    token_id, position = sort_ids(token_id)
    time, counted = time[position], covered[position].astype(jnp.float32)
    first, stop = (_places(token_id, position, target_id, x) for x in (start, end))
    found = stop > first
    running, run = _running_counts(token_id, time, counted, decays)
    last, before = jnp.maximum(stop - 1, 0), jnp.maximum(first - 1, 0)
    last_age = (now - time[last]).astype(jnp.float32)

    def weight(age: Array) -> Float[Array, "M decays"]:
        return jnp.exp(-jnp.maximum(age, 0).astype(jnp.float32)[:, None] / decays)

    # What came before the range is in the running count too, unless a new run began since.
    earlier = (first > 0) & (run[before] == run[last])
    not_counted = jnp.where(
        earlier[:, None], running[before] * weight(time[last] - time[before]), 0
    )
    decayed = jnp.maximum(running[last] - not_counted, 0) * weight(now - time[last])
    return MatchStatistics(
        (stop - first).astype(jnp.float32),
        jnp.where(found[:, None], decayed, 0),
        jnp.where(found, last_age, jnp.inf),
    )


def _running_counts(
    token_id: Int[Array, " L"],
    time: Int[Array, " L"],
    counted: Float[Array, " L"],
    decays: Float[Array, " decays"],
) -> tuple[Float[Array, "L decays"], Int[Array, " L"]]:
    """Decayed count of each sorted token's run up to it, and which run that is.

    A run is of one id and of times that do not decrease: where the next user's tokens begin, time
    may fall, and a weight of a negative age would overflow.
    """
    same = (token_id[1:] == token_id[:-1]) & (time[1:] >= time[:-1])
    age = jnp.where(same, time[1:] - time[:-1], 0).astype(jnp.float32)
    kept = jnp.where(same[:, None], jnp.exp(-age[:, None] / decays), 0)
    kept = jnp.pad(kept, ((1, 0), (0, 0)))

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    running = jnp.broadcast_to(counted[:, None], kept.shape)
    _, running = lax.associative_scan(join, (kept, running))
    return running, jnp.cumsum(jnp.pad(~same, (1, 0)))


def _places(
    token_id: Int[Array, " L"],
    position: Int[Array, " L"],
    target_id: Int[Array, " M"],
    bound: Int[Array, " M"],
) -> Int[Array, " M"]:
    """How many sorted tokens come before (target id, bound): a binary search for each target."""

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) // 2
        found_id = token_id[middle]
        is_before = (found_id < target_id) | ((found_id == target_id) & (position[middle] < bound))
        is_open = low < high
        return (
            jnp.where(is_open & is_before, middle + 1, low),
            jnp.where(is_open & ~is_before, middle, high),
        )

    L = len(token_id)
    # On a GPU each step of a loop would wait for the host; on a CPU what is not in a loop is fused
    # into whatever reads it, and searched for again by each column of the result.
    unroll = platform() == "gpu"
    ends = jnp.zeros_like(bound), jnp.full_like(bound, L)
    return lax.fori_loop(0, math.ceil(math.log2(L + 1)), halve, ends, unroll=unroll)[0]
