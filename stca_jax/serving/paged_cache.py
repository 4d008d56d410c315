"""A cache of encoded events in pages of one pool on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stca_jax.errors import UserError
from stca_jax.serving.cache import CachedUser, Query, UserCache
from stca_jax.serving.model import ServingModel

_APPENDED_AT_ONCE = 16  # more events than so many are written by whole pages


def bytes_of_page(model: ServingModel) -> int:
    """Bytes of a page of the model's cache."""
    arrays = model.info.caches[str(model.cache)].arrays.values()
    return sum(a.layers * int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in arrays)


def bytes_of_user(model: ServingModel) -> int:
    """Bytes of a full history in the model's cache."""
    return bytes_of_page(model) * -(-model.info.max_history // model.info.page)


class PagedCache(UserCache):
    """Encoded events in pages of one pool."""

    def __init__(self, model: ServingModel, max_bytes: int):
        """Allocates the pool.

        Raises:
          UserError: it would not hold one user.
        """
        super().__init__(model, max_bytes)
        info = model.info
        arrays = info.caches[str(model.cache)].arrays
        self.page_bytes = bytes_of_page(model)
        self._pages_of_user = -(-info.max_history // info.page)
        num_pages = max_bytes // self.page_bytes
        if num_pages < self._pages_of_user:
            raise UserError(
                f"a cache of {max_bytes:,} bytes does not hold one user of {info.max_history:,} "
                f"events, who takes {self._pages_of_user * self.page_bytes:,}: give it more"
            )
        self._free = list(range(num_pages))[::-1]
        self._pool: dict[str, Array] = {
            name: jnp.zeros((a.layers, num_pages, *a.shape), a.dtype) for name, a in arrays.items()
        }
        self._erase = jax.jit(
            lambda pool, page: {
                name: jax.lax.dynamic_update_slice_in_dim(
                    x, jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype), page, 1
                )
                for name, x in pool.items()
            },
            donate_argnums=0,
        )

    def score(
        self, users: Sequence[CachedUser], queries: Sequence[Query], at_least: int = 1
    ) -> list[Float[np.ndarray, "m tasks"]]:
        """See `UserCache`; one call for all users."""
        sizes = [q.num_targets for q in queries]
        name, size, _ = self.model.score_program(max(*sizes, at_least), 0)
        pages = np.zeros((len(users), self._pages_of_user), np.int32)
        for u, user in enumerate(users):
            pages[u, : len(user.pages)] = user.pages
        num_events = np.array([user.window.size for user in users], np.int32)
        inputs = self._inputs(users, queries, size)
        program = self.model.program(name)
        logits = program(self.model.weights, self._pool, (pages, num_events), inputs)
        return [of_user[:m] for of_user, m in zip(np.asarray(logits), sizes, strict=True)]

    def _bytes_of(self, user: CachedUser) -> int:
        return user.window.num_bytes + len(user.pages) * self.page_bytes

    def _make_room(self, user: CachedUser, kept: set[Hashable]) -> None:
        page = self.model.info.page
        while len(user.pages) * page < user.window.size:
            if not self._free and not self._evict(kept):
                raise UserError(
                    "the cache is too small for the users of one call: give it more bytes"
                )
            user.pages.append(self._free.pop())

    def _write_all(self, user: CachedUser) -> None:
        self._write_pages(user, range(len(user.pages)))

    def _write(self, user: CachedUser, slots: Int[np.ndarray, " k"]) -> None:
        page = self.model.info.page
        if len(slots) > _APPENDED_AT_ONCE:
            self._write_pages(user, np.unique(slots // page).tolist())
        elif len(slots):
            bucket = 1 if len(slots) == 1 else _APPENDED_AT_ONCE
            packed = np.zeros((bucket, sum(self.model.info.levels["history"].widths)), np.float32)
            columns = {name: column[slots] for name, column in user.window.columns.items()}
            packed[: len(slots)] = self.model.embed("history", columns)
            places = np.zeros((3, bucket), np.int32)
            places[0, : len(slots)] = user.window.time[slots]
            places[1, : len(slots)] = np.array(user.pages)[slots // page]
            places[2, : len(slots)] = slots % page
            self._pool = self.model.program("append")(
                self.model.weights, self._pool, packed, places, np.int32(len(slots))
            )

    def _write_pages(self, user: CachedUser, which: Sequence[int]) -> None:
        size = self.model.info.page
        write = self.model.program("write_page")
        packed = np.zeros((size, sum(self.model.info.levels["history"].widths)), np.float32)
        time = np.zeros(size, np.int32)
        for k in which:
            slots = slice(k * size, (k + 1) * size)
            columns = {name: column[slots] for name, column in user.window.columns.items()}
            count = len(user.window.time[slots])
            packed[:count] = self.model.embed("history", columns)
            time[:count] = user.window.time[slots]
            page = np.int32(user.pages[k])
            # Copies: the host may not wait, and the arrays are filled again.
            self._pool = write(self.model.weights, self._pool, packed.copy(), time.copy(), page)

    def _release(self, user: CachedUser, erase: bool) -> None:
        if erase:
            for page in user.pages:
                self._pool = self._erase(self._pool, page)
        self._free += user.pages
        user.pages = []
