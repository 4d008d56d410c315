"""Attention of targets to histories that were encoded before and lie in pages: for serving.

A pool holds pages of `PAGE` slots; a user's history is a list of pages, of which the first n slots
are filled, in any order:

    pool     page 0   page 1   page 2   page 3   page 4   page 5
    user A   1 3      the first 512 slots of A are page 1, the others page 3
    user B   5 0 2

Softmax does not know the order of tokens, so that the oldest slot of a full history is overwritten
in place.  The pages of a user are read one after the other with an online softmax, up to the n-th
slot: one program serves every length.  What a slot holds is one of `PagedHistory`'s subclasses.

Dimensions: U users, M targets of each, p pages of each, P pages of the pool, S slots of a page,
H heads, K head width, D token width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.tiled import LOWEST_PEAK, NO_SCORE

PAGE = 512  # slots
TARGET_TILE = 128  # targets that a CPU core reads a page for at once
_PAGES_AT_ONCE = 4  # that an accelerator reads
_FLOAT = jnp.float32


class Pages(NamedTuple):
    """Where the histories of U users lie.

    Attributes:
      pages: Pages of the pool; those beyond the n-th slot may be anything valid.
      num_events: n, filled slots.
    """

    pages: Int[Array, "U p"]
    num_events: Int[Array, " U"]


class Recency(NamedTuple):
    """An additive score of each token and head, rate * (event time - request time) in days.

    Attributes:
      days: Minus the age of each slot's event at the request, in days.
      rate: Of each head, per day.
    """

    days: Float[Array, "U p S"]
    rate: Float[Array, " H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysAndValues:
    """Keys and values of one layer, by page.

    Attributes:
      keys: K of E3, transposed: slots are neighbours.
      values: V of E4.
    """

    keys: Float[Array, "P H K S"]
    values: Float[Array, "P H S K"]


def paged_attention(
    query: Float[Array, "U M H K"],
    cache: KeysAndValues,
    where: Pages,
    recency: Recency | None = None,
) -> tuple[Float[Array, "U M H K"], Float[Array, "U M H"]]:
    """Softmax attention of each user's targets to that user's history (E3, E4).

    Lowered for a CPU, it reads a page for one head and `TARGET_TILE` targets at a time; for other
    platforms several pages for all heads, targets and users.

    Args:
      query: Queries after W_Q, not yet scaled; M is at most `TARGET_TILE` or a multiple of it.
      cache: Of one layer.
      where: Of each user.
      recency: Optional additive score.

    Returns:
      Weighted sums of values, in the dtype of the query, and float32 log-sum-exps; 0 and -inf for
      an empty history.
    """
    scaled = (query.astype(_FLOAT) / math.sqrt(query.shape[-1])).astype(query.dtype)
    output, log_sum_exp = lax.platform_dependent(
        scaled, cache, where, recency, cpu=_by_tile, default=_by_pages
    )
    return output.astype(query.dtype), log_sum_exp


class _Softmax(NamedTuple):
    """Running maximum, sum and weighted sum; the last axis of `summed` is K."""

    peak: Float[Array, "*C"]
    total: Float[Array, "*C"]
    summed: Float[Array, "*C K"]

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> _Softmax:
        return cls(
            jnp.full(shape[:-1], LOWEST_PEAK, _FLOAT),
            jnp.zeros(shape[:-1], _FLOAT),
            jnp.zeros(shape, _FLOAT),
        )

    def result(self) -> tuple[Array, Array]:
        nonempty = self.total > 0
        total = jnp.where(nonempty, self.total, 1)
        log_sum_exp = jnp.where(nonempty, self.peak + jnp.log(total), -jnp.inf)
        return self.summed / total[..., None], log_sum_exp


def _by_tile(
    query: Array, cache: KeysAndValues, where: Pages, recency: Recency | None
) -> tuple[Array, Array]:
    U, M, H, K = query.shape
    # A symbolic M is either the one or the other, which it says by its divisibility.
    tile = TARGET_TILE if _is_tiled(M) else M
    num_tiles = M // tile
    tiles = query.reshape(U, num_tiles, tile, H, K).transpose(0, 3, 1, 2, 4)
    tiles = tiles.reshape(U * H * num_tiles, tile, K)

    def attend(item: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q = item
        user, head = i // (H * num_tiles), i // num_tiles % H
        pages, n = where.pages[user], where.num_events[user]

        def read(j: Array, state: _Softmax) -> _Softmax:
            keys, values = cache.keys[pages[j], head], cache.values[pages[j], head]
            score = jnp.dot(q, keys, preferred_element_type=_FLOAT)
            if recency is not None:
                score += recency.days[user, j] * recency.rate[head]
            score = jnp.where(_filled(j, n), score, NO_SCORE)
            peak = lax.optimization_barrier(jnp.maximum(state.peak, score.max(1)))
            weight = jnp.exp(score - peak[:, None])
            rescale = jnp.exp(state.peak - peak)
            gathered = jnp.dot(weight.astype(values.dtype), values, preferred_element_type=_FLOAT)
            return _Softmax(
                peak,
                state.total * rescale + weight.sum(1),
                state.summed * rescale[:, None] + gathered,
            )

        return lax.fori_loop(0, -(-n // PAGE), read, _Softmax.start(q.shape)).result()

    output, log_sum_exp = lax.map(attend, (jnp.arange(len(tiles)), tiles))

    def untile(x: Array) -> Array:
        x = x.reshape(U, H, num_tiles, tile, *x.shape[2:])
        return jnp.moveaxis(x, 1, 3).reshape(U, M, H, *x.shape[4:])

    return untile(output), untile(log_sum_exp)


def _is_tiled(num_targets: int) -> bool:
    try:
        return num_targets % TARGET_TILE == 0
    except Exception:  # inconclusive for a symbolic size that is not a multiple
        return False


def _by_pages(
    query: Array, cache: KeysAndValues, where: Pages, recency: Recency | None
) -> tuple[Array, Array]:
    U, M, H, K = query.shape
    p = where.pages.shape[1]
    at_once = min(_PAGES_AT_ONCE, p)

    def read(step: Array, state: _Softmax) -> _Softmax:
        # The last step may begin earlier, for equal shapes: what it reads twice counts once.
        first = jnp.minimum(step * at_once, p - at_once)
        pages = lax.dynamic_slice_in_dim(where.pages, first, at_once, 1)
        keys, values = cache.keys[pages], cache.values[pages]  # [U, a, H, ...]
        score = jnp.einsum("umhk,uahks->uhmas", query, keys, preferred_element_type=_FLOAT)
        if recency is not None:
            days = lax.dynamic_slice_in_dim(recency.days, first, at_once, 1)
            score += (days[:, None] * recency.rate[:, None, None])[:, :, None]
        j = first + jnp.arange(at_once)
        is_new = (j >= step * at_once)[:, None]
        counts = is_new & _filled(j[:, None], where.num_events[:, None, None])
        score = jnp.where(counts[:, None, None], score, NO_SCORE)
        peak = jnp.maximum(state.peak, score.max((-2, -1)))
        weight = jnp.exp(score - peak[..., None, None])
        rescale = jnp.exp(state.peak - peak)
        gathered = jnp.einsum(
            "uhmas,uahsk->uhmk", weight.astype(values.dtype), values, preferred_element_type=_FLOAT
        )
        return _Softmax(
            peak,
            state.total * rescale + weight.sum((-2, -1)),
            state.summed * rescale[..., None] + gathered,
        )

    steps = -(-jnp.max(where.num_events) // (PAGE * at_once))
    output, log_sum_exp = lax.fori_loop(0, steps, read, _Softmax.start((U, H, M, K))).result()
    return output.swapaxes(1, 2), log_sum_exp.swapaxes(1, 2)


def _filled(page: Array, num_events: Array) -> Bool[Array, "*B S"]:
    """Which slots of a user's j-th page hold an event."""
    return page * PAGE + jnp.arange(PAGE) < num_events
