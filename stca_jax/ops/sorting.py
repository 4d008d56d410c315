"""Ids in order, and where each was: a radix sort of single integers."""

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
