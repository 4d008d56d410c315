"""Exact-match statistics of a target over its own range of history: the match channel.

What feature stores call user-item cross counts, computed on the device from the same row as the
attention, so exact for every window, without leakage and without skew between training and serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    history_start: Int[Array, "R M"],
    history_end: Int[Array, "R M"],
    *,
    decay_seconds: float,
) -> MatchStatistics:
    """Counts exact matches of each target's ids within its range, in m x L integer comparisons.

    Not differentiable, and it needs no gradient: nothing in it is learned.

    Args:
      target_ids: Id fields of the targets; the first one also gets decayed count and age.
      history_ids: The same fields of the events.
      history_time: Seconds.
      request_time: Seconds; ages are relative to it.
      history_start: First token of each target's range.
      history_end: One past its last token.
      decay_seconds: Time constant of the decayed count.
    """
    position = jnp.arange(history_time.shape[1])
    in_range = (position >= history_start[..., None]) & (position < history_end[..., None])
    hits = [
        in_range & (ids[..., None] == history_ids[name][:, None])
        for name, ids in target_ids.items()
    ]
    age = (request_time[..., None] - history_time[:, None]).astype(jnp.float32)
    first = hits[0]
    return MatchStatistics(
        matches=jnp.stack([m.sum(-1, dtype=jnp.float32) for m in hits], -1),
        decayed_matches=jnp.where(first, jnp.exp(-age / decay_seconds), 0).sum(-1),
        last_age=jnp.where(first, age, jnp.inf).min(-1),
    )
