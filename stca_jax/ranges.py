"""Ranges: which contiguous tokens of its row each target reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Int

# Array types of the host (NumPy) and of the device (JAX) are used alike.
Array = Any


class Ranges(NamedTuple):
    """Half-open ranges of tokens, one for each target of each row; `start == end` is empty.

    Attributes:
      start: First token.
      end: One past the last token.
    """

    start: Int[Array, "R M"]
    end: Int[Array, "R M"]

    @property
    def lengths(self) -> Int[Array, "R M"]:
        """n, the number of tokens in each range."""
        return self.end - self.start

    def contain(self, position: Int[Array, " L"]) -> Bool[Array, "R M L"]:
        """Which of those positions of the row each range contains."""
        return (position >= self.start[..., None]) & (position < self.end[..., None])

    def covered(self, row_length: int) -> Bool[Array, "R L"]:
        """Which tokens at least one range contains; the others are padding.

        O(M + L).  Every range must satisfy 0 <= start <= end <= row_length.
        """
        rows = jnp.arange(self.start.shape[0])[:, None]
        steps = jnp.zeros((self.start.shape[0], row_length + 1), jnp.int32)
        steps = steps.at[rows, self.start].add(1).at[rows, self.end].add(-1)
        return jnp.cumsum(steps, axis=1)[:, :-1] > 0


class SharedRanges(Ranges):
    """Ranges that are one and the same for all targets of a row, as those of one request are.

    What is computed is the same; ops choose sizes that are faster for such rows.
    """
