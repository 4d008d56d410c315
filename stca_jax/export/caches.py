"""What is kept of an event so that it is encoded once, and how a layer attends to it.

A kind of cache is a few arrays [N, P, ...]: layers, pages, and what a page holds, one of whose axes
are its slots. `stca_jax.serving` allocates them by their shapes and never looks inside.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stca_jax.models.stca import Stca, StcaLayer
from stca_jax.ops.attention import AttentionOutput
from stca_jax.ops.paged import (
    PAGE,
    EncodedTokens,
    KeysAndValues,
    Pages,
    Recency,
    paged_attention,
    project_pages,
)
from stca_jax.schema import SECONDS_PER_DAY

Pool = dict[str, Array]  # [N, P, ...]
_TIME = "time"


@dataclasses.dataclass(frozen=True)
class PageArray:
    """An array of a pool.

    Attributes:
      layers: N.
      shape: Of a page.
      slot_axis: Which of its axes are the slots.
      dtype: Its dtype.
    """

    layers: int
    shape: tuple[int, ...]
    slot_axis: int
    dtype: str


class Cache(abc.ABC):
    """A kind of cache, of one model.

    Attributes:
      stca: The sequence module.
      dtype: Compute dtype.
    """

    def __init__(self, stca: Stca, dtype: str):
        self.stca = stca
        self.dtype = dtype
        self.num_layers = len(stca.layers)

    @property
    @abc.abstractmethod
    def encoded_arrays(self) -> dict[str, PageArray]:
        """What holds encoded events."""

    @abc.abstractmethod
    def encode(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        """Encoded events, [N, T, ...] with T in the place of the slots."""

    @abc.abstractmethod
    def attend(
        self,
        pool: Pool,
        layer: StcaLayer,
        query: Float[Array, "U M H K"],
        where: Pages,
        recency: Recency | None,
    ) -> tuple[Float[Array, "U M H K"], Float[Array, "U M H"]]:
        """E3 and E4 of a layer over pages, which are of that layer."""

    @property
    def arrays(self) -> dict[str, PageArray]:
        """All arrays of the pool; with a recency score, the events' times too."""
        arrays = self.encoded_arrays
        if self.stca.config.recency_score:
            arrays[_TIME] = PageArray(1, (PAGE,), 0, "int32")
        return arrays

    def write(
        self,
        pool: Pool,
        tokens: Float[Array, "T D"],
        time: Int[Array, " T"],
        places: tuple[Int[Array, " T"], Int[Array, " T"]],
        count: Int[Array, ""],
    ) -> Pool:
        """Writes the first `count` of T events, each into a slot of a page."""
        page, slot = places
        blocks = self._blocks(tokens, time)

        def write_one(t: Array, pool: Pool) -> Pool:
            written = {}
            for name, array in self.arrays.items():
                axis = 2 + array.slot_axis
                event = lax.dynamic_slice_in_dim(blocks[name], t, 1, axis)
                start: list[Any] = [0] * pool[name].ndim
                start[1], start[axis] = page[t], slot[t]
                written[name] = lax.dynamic_update_slice(pool[name], event, start)
            return written

        return lax.fori_loop(0, count, write_one, pool)

    def write_page(
        self, pool: Pool, tokens: Float[Array, "S D"], time: Int[Array, " S"], page: Array
    ) -> Pool:
        """Writes all slots of a page."""
        blocks = self._blocks(tokens, time)
        return {n: lax.dynamic_update_slice_in_dim(pool[n], blocks[n], page, 1) for n in pool}

    def _blocks(self, tokens: Array, time: Array) -> dict[str, Array]:
        blocks = {name: block[:, None] for name, block in self.encode(tokens).items()}
        return {**blocks, _TIME: time[None, None]} if _TIME in self.arrays else blocks


class KeysValuesCache(Cache):
    """Keys and values of every layer."""

    @property
    def encoded_arrays(self) -> dict[str, PageArray]:
        """See `Cache`."""
        config = self.stca.config
        heads, width = config.num_heads, config.head_width
        return {
            "keys": PageArray(self.num_layers, (heads, width, PAGE), 2, self.dtype),
            "values": PageArray(self.num_layers, (heads, PAGE, width), 1, self.dtype),
        }

    def encode(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        """See `Cache`."""
        pairs = list(zip(self.stca.encode(tokens), self.stca.layers, strict=True))

        def project(equation: str, name: str) -> Array:
            weights = ((x, getattr(layer, name)[...].astype(x.dtype)) for x, layer in pairs)
            return jnp.stack([jnp.einsum(equation, x, w) for x, w in weights])

        return {
            "keys": project("td,dhk->hkt", "w_key"),
            "values": project("td,dhk->htk", "w_value"),
        }

    def attend(
        self,
        pool: Pool,
        layer: StcaLayer,
        query: Float[Array, "U M H K"],
        where: Pages,
        recency: Recency | None,
    ) -> tuple[Float[Array, "U M H K"], Float[Array, "U M H"]]:
        """See `Cache`."""
        del layer
        cache = KeysAndValues(*(_all_layers(pool[n]) for n in ("keys", "values")))
        return paged_attention(query, cache, where, recency)


class TokensCache(Cache):
    """Encoded tokens of every layer: 1/2 of the memory, and more work for each request.

    Few targets read the tokens themselves (absorbed order); for many, the user's keys and values
    are made first (projected order).
    """

    def __init__(self, stca: Stca, dtype: str, *, absorbed: bool):
        super().__init__(stca, dtype)
        self.absorbed = absorbed

    @property
    def encoded_arrays(self) -> dict[str, PageArray]:
        """See `Cache`."""
        shape = (PAGE, self.stca.config.width)
        return {"tokens": PageArray(self.num_layers, shape, 0, self.dtype)}

    def encode(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        """See `Cache`."""
        return {"tokens": self.stca.encode(tokens)}

    def pages_of(self, pool: Pool) -> EncodedTokens:
        """The pool's arrays."""
        return EncodedTokens(_all_layers(pool["tokens"]))

    def attend(
        self,
        pool: Pool,
        layer: StcaLayer,
        query: Float[Array, "U M H K"],
        where: Pages,
        recency: Recency | None,
    ) -> tuple[Float[Array, "U M H K"], Float[Array, "U M H"]]:
        """See `Cache`."""
        w_key, w_value = (w[...].astype(query.dtype) for w in (layer.w_key, layer.w_value))
        cache = self.pages_of(pool)
        if not self.absorbed:
            cache_of_users, own = project_pages(cache, where, w_key, w_value)
            return paged_attention(query, cache_of_users, own, recency)
        U, M, H, _ = query.shape
        # One head of width D, whose targets are pairs of a target and a head.
        paired = jnp.einsum("umhk,dhk->umhd", query, w_key).reshape(U, M * H, 1, -1)
        if recency is not None:
            recency = recency._replace(rate=recency.rate.T.reshape(1, M * H))
        gathered, log_sum_exp = paged_attention(paired, cache, where, recency)
        gathered = gathered.reshape(U, M, H, -1)
        output = jnp.einsum("umhd,dhk->umhk", gathered, w_value.astype(gathered.dtype))
        return output, log_sum_exp.reshape(U, M, H)


class Int8TokensCache(TokensCache):
    """Encoded tokens in int8, with a scale for each token and layer: 1/8 of keys and values."""

    @property
    def encoded_arrays(self) -> dict[str, PageArray]:
        """See `Cache`."""
        shape = (PAGE, self.stca.config.width)
        return {
            "tokens": PageArray(self.num_layers, shape, 0, "int8"),
            "scale": PageArray(self.num_layers, (PAGE,), 0, "float32"),
        }

    def encode(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        """See `Cache`."""
        encoded = self.stca.encode(tokens).astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(encoded).max(-1), 1e-20) / 127
        return {"tokens": jnp.round(encoded / scale[..., None]).astype(jnp.int8), "scale": scale}

    def pages_of(self, pool: Pool) -> EncodedTokens:
        """See `TokensCache`."""
        return EncodedTokens(_all_layers(pool["tokens"]), _all_layers(pool["scale"]))


class PagedHistory:
    """Histories in a pool: what the layers of STCA attend to, see `stca_jax.models.stca.History`.

    Attributes:
      num_events: Of each user, for each of the user's targets.
    """

    def __init__(
        self, cache: Cache, pool: Pool, where: Pages, now: Int[Array, " U"], num_targets: int
    ):
        """Args: kind and arrays of the pool; of each user the pages and the request's time; M."""
        self._cache, self._pool, self._where, self._now = cache, pool, where, now
        shape = (*where.num_events.shape, num_targets)
        self.num_events = jnp.broadcast_to(where.num_events[:, None], shape)

    def attend(self, layer: StcaLayer, query: Float[Array, "U M H K"]) -> AttentionOutput:
        """See `History`."""
        recency = None
        if layer.recency_rate is not None:
            time = self._pool[_TIME][0, self._where.pages]  # [U, p, S]
            age = self._now[:, None, None] - time
            rate = jnp.broadcast_to(layer.recency_rate[...][:, None], query.shape[2:0:-1])
            recency = Recency(-age.astype(jnp.float32) / SECONDS_PER_DAY, rate)
        scaled = (query.astype(jnp.float32) / jnp.sqrt(query.shape[-1])).astype(query.dtype)
        num_pages = next(iter(self._pool.values())).shape[1]
        where = self._where._replace(pages=self._where.pages + layer.index * num_pages)
        output, log_sum_exp = self._cache.attend(self._pool, layer, scaled, where, recency)
        return AttentionOutput(output.astype(query.dtype), log_sum_exp)


def _all_layers(array: Float[Array, "N P ..."]) -> Float[Array, "Q ..."]:
    """Pages of all layers in one axis: a slice of one layer would be a copy of the pool."""
    return array.reshape(-1, *array.shape[2:])


def make_caches(stca: Stca, dtype: str) -> Mapping[str, tuple[Cache, Cache]]:
    """The kinds of caches by name, each as it scores few targets, and many."""
    keys_values = KeysValuesCache(stca, dtype)
    return {
        "keys_values": (keys_values, keys_values),
        "tokens": (
            TokensCache(stca, dtype, absorbed=True),
            TokensCache(stca, dtype, absorbed=False),
        ),
        "int8": (
            Int8TokensCache(stca, dtype, absorbed=True),
            Int8TokensCache(stca, dtype, absorbed=False),
        ),
    }
