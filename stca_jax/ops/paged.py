"""Attention of targets to histories that were encoded before and lie in pages: for serving.

A pool holds pages of `PAGE` slots; a user's history is a list of pages, of which the first n slots
are filled, in any order:

    pool     page 0   page 1   page 2   page 3   page 4   page 5
    user A   1 3      the first 512 slots of A are page 1, the others page 3
    user B   5 0 2

Softmax does not know the order of tokens, so that the oldest slot of a full history is overwritten
in place.  The pages of a user are read one after the other with an online softmax, up to the n-th
slot: one program serves every length.  A slot holds the keys and values of an event, or its encoded
token, from which both orders of the algebra can be computed (`stca_jax.ops.attention`).

Dimensions: U users, M targets of each, p pages of each, P pages of the pool, S slots of a page,
H heads, K head width, D token width.
"""

from __future__ import annotations

import dataclasses
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
      rate: Of each head and target, per day.
    """

    days: Float[Array, "U p S"]
    rate: Float[Array, "H M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysAndValues:
    """Keys and values, by page.

    Attributes:
      keys: K of E3, transposed: slots are neighbours.
      values: V of E4.
    """

    keys: Float[Array, "P H K S"]
    values: Float[Array, "P H S K"]

    def of_heads(
        self, page: Array, first: Array, count: int
    ) -> tuple[Float[Array, "h K S"], Float[Array, "h S K"]]:
        """Keys and values of some heads of one page."""
        if count == self.keys.shape[1]:
            return self.keys[page], self.values[page]
        assert count == 1
        return self.keys[page, first][None], self.values[page, first][None]

    def of_pages(self, pages: Array) -> tuple[Float[Array, "*n H K S"], Float[Array, "*n H S K"]]:
        """Keys and values of all heads of several pages."""
        return self.keys[pages], self.values[pages]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedTokens:
    """Encoded tokens X~ of E1, by page: keys and values of one head of width D, in absorbed order.

    Attributes:
      tokens: X~, or int8 numbers that `scale` multiplies.
      scale: Of each slot; None is 1.
    """

    tokens: Float[Array, "P S D"] | Int[Array, "P S D"]
    scale: Float[Array, "P S"] | None = None

    def of_heads(
        self, page: Array, first: Array, count: int
    ) -> tuple[Float[Array, "1 D S"], Float[Array, "1 S D"]]:
        """Keys and values of one page; there is one head."""
        del first, count
        return self.of_pages(page)

    def of_pages(self, pages: Array) -> tuple[Float[Array, "*n 1 D S"], Float[Array, "*n 1 S D"]]:
        """Keys and values of several pages."""
        tokens = self.of_page(pages)[..., None, :, :]
        return tokens.swapaxes(-1, -2), tokens

    def of_page(self, page: Array) -> Float[Array, "*n S D"]:
        """X~ of pages."""
        tokens = self.tokens[page]
        if self.scale is None:
            return tokens
        return tokens.astype(_FLOAT) * self.scale[page][..., None]


def paged_attention(
    query: Float[Array, "U M H K"],
    cache: KeysAndValues | EncodedTokens,
    where: Pages,
    recency: Recency | None = None,
) -> tuple[Float[Array, "U M H K"], Float[Array, "U M H"]]:
    """Softmax attention of each user's targets to that user's history (E3, E4).

    Lowered for a CPU, it reads a page of one user at a time, for all heads of few targets, or for
    one head of `TARGET_TILE` targets; for other platforms several pages for all heads, targets and
    users.

    Args:
      query: Queries in the space of the keys, scaled; M is a multiple of `TARGET_TILE`, or any
        number if it is small.
      cache: Keys and values.
      where: Of each user.
      recency: Optional additive score.

    Returns:
      float32 weighted sums of values and log-sum-exps; 0 and -inf for an empty history.
    """
    return lax.platform_dependent(query, cache, where, recency, cpu=_by_tile, default=_by_pages)


def project_pages(
    cache: EncodedTokens,
    where: Pages,
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
) -> tuple[KeysAndValues, Pages]:
    """Keys and values of the users' histories, and where those lie: pages of their own.

    Args:
      cache: Encoded tokens.
      where: Of each user.
      w_key: W_K of E3 for all heads.
      w_value: W_V of E4 for all heads.

    Returns:
      K and V of E3 and E4, in the dtype of `w_key`, zero in pages that no user fills.
    """
    U, p = where.pages.shape
    _, H, K = w_key.shape
    dtype = w_key.dtype
    empty = KeysAndValues(
        jnp.zeros((U * p, H, K, PAGE), dtype), jnp.zeros((U * p, H, PAGE, K), dtype)
    )

    def project(step: Array, projected: KeysAndValues) -> KeysAndValues:
        # All first pages, then all second ones: the loop ends with the longest history.
        user, j = step % U, step // U
        tokens = cache.of_page(where.pages[user, j]).astype(dtype)
        page = user * p + j
        keys = jnp.einsum("sd,dhk->hks", tokens, w_key)
        values = jnp.einsum("sd,dhk->hsk", tokens, w_value)
        return KeysAndValues(
            lax.dynamic_update_index_in_dim(projected.keys, keys, page, 0),
            lax.dynamic_update_index_in_dim(projected.values, values, page, 0),
        )

    steps = -(-jnp.max(where.num_events) // PAGE) * U
    own = jnp.arange(U * p, dtype=jnp.int32).reshape(U, p)
    return lax.fori_loop(0, steps, project, empty), Pages(own, where.num_events)


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
    query: Array, cache: KeysAndValues | EncodedTokens, where: Pages, recency: Recency | None
) -> tuple[Array, Array]:
    U, M, H, K = query.shape
    # A symbolic M is either the one or the other, which it says by its divisibility. All heads at
    # once are quicker for few targets, and no quicker for many.
    tile, heads = (TARGET_TILE, 1) if _is_tiled(M) else (M, H)
    num_tiles, groups = M // tile, H // heads
    tiles = query.reshape(U, num_tiles, tile, groups, heads, K).transpose(0, 3, 1, 4, 2, 5)
    tiles = tiles.reshape(U * groups * num_tiles, heads, tile, K)
    rates = None
    if recency is not None:
        rates = recency.rate.reshape(groups, heads, num_tiles, tile).swapaxes(1, 2)
        rates = rates.reshape(groups * num_tiles, heads, tile, 1)

    def attend(item: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q = item
        user, group = i // (groups * num_tiles), i // num_tiles % groups
        pages, n = where.pages[user], where.num_events[user]

        def read(j: Array, state: _Softmax) -> _Softmax:
            keys, values = cache.of_heads(pages[j], group, heads)
            score = _products(q, keys)
            if recency is not None and rates is not None:
                score += rates[i % (groups * num_tiles)] * recency.days[user, j]
            score = jnp.where(_filled(j, n), score, NO_SCORE)
            peak = lax.optimization_barrier(jnp.maximum(state.peak, score.max(-1)))
            weight = jnp.exp(score - peak[..., None])
            rescale = jnp.exp(state.peak - peak)
            return _Softmax(
                peak,
                state.total * rescale + weight.sum(-1),
                state.summed * rescale[..., None] + _products(weight.astype(values.dtype), values),
            )

        return lax.fori_loop(0, -(-n // PAGE), read, _Softmax.start(q.shape)).result()

    output, log_sum_exp = lax.map(attend, (jnp.arange(tiles.shape[0]), tiles))

    def untile(x: Array) -> Array:
        x = x.reshape(U, groups, num_tiles, heads, tile, *x.shape[3:])
        x = jnp.moveaxis(x, (1, 3), (3, 4))  # [U, num_tiles, tile, groups, heads, ...]
        return x.reshape(U, M, H, *x.shape[5:])

    return untile(output), untile(log_sum_exp)


def _products(left: Float[Array, "h a b"], right: Float[Array, "h b c"]) -> Float[Array, "h a c"]:
    """A float32 product for each head."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=_FLOAT)


def _is_tiled(num_targets: int) -> bool:
    try:
        return num_targets % TARGET_TILE == 0
    except Exception:  # inconclusive for a symbolic size that is not a multiple
        return False


def _by_pages(
    query: Array, cache: KeysAndValues | EncodedTokens, where: Pages, recency: Recency | None
) -> tuple[Array, Array]:
    U, M, H, K = query.shape
    p = where.pages.shape[1]
    at_once = min(_PAGES_AT_ONCE, p)

    def read(step: Array, state: _Softmax) -> _Softmax:
        # The last step may begin earlier, for equal shapes: what it reads twice counts once.
        first = jnp.minimum(step * at_once, p - at_once)
        pages = lax.dynamic_slice_in_dim(where.pages, first, at_once, 1)
        keys, values = cache.of_pages(pages)  # [U, a, H, ...]
        score = jnp.einsum("umhk,uahks->uhmas", query, keys, preferred_element_type=_FLOAT)
        if recency is not None:
            days = lax.dynamic_slice_in_dim(recency.days, first, at_once, 1)
            score += recency.rate[..., None, None] * days[:, None, None]
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
