"""Ids in order, and where each was, by a radix sort of single integers; and the distinct ones."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def sort_ids(ids: Int[Array, " N"]) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Ids in ascending order, and the position of each; positions of equal ids ascend.

    A CPU sorts single integers several times faster than it sorts pairs. So an integer holds the
    position and as many bits of the id as fit beside it, the lower bits first: two sorts for up to
    2^16 ids, three for up to 2^20.

    Args:
      ids: Not negative; garbage is sorted by its bits.
    """
    bits = max(1, (len(ids) - 1).bit_length())
    unsigned = ids.astype(jnp.uint32)
    slots = jnp.arange(len(ids), dtype=jnp.uint32)
    position = slots
    for start in range(0, 32, 32 - bits):
        digit = unsigned[position] >> start << bits  # higher bits are shifted out
        position = position[lax.sort(digit | slots) & ((1 << bits) - 1)]
    return ids[position], position.astype(jnp.int32)


def distinct_ids(
    ids: Int[Array, " N"], *, size: int, fill_value: int
) -> tuple[Int[Array, " size"], Int[Array, " N"]]:
    """The distinct ids in ascending order, and where among them each id is.

    Args:
      ids: As for `sort_ids`, at least one.
      size: Of the result; no fewer than there are distinct ids.
      fill_value: Of places that are left over.
    """
    ordered, position = sort_ids(ids)
    place = jnp.cumsum(jnp.diff(ordered, prepend=ordered[:1]) != 0)
    distinct = jnp.full(size, fill_value, ids.dtype).at[place].set(ordered, indices_are_sorted=True)
    places = jnp.zeros_like(position).at[position].set(place, unique_indices=True)
    return distinct, places
