"""How much a program of the encoder's Triton kernels works on at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Cut:
    """How much a program works on at a time; it changes the speed, never the result.

    Attributes:
      tokens: Most tokens of a tile; a power of two.
      hidden: Hidden units of a chunk; a power of two.
      warps: Warps of a program.
    """

    tokens: int
    hidden: int
    warps: int


class Cuts(NamedTuple):
    """Of the kernels.

    Attributes:
      forward: Of the forward pass.
      tokens: Of the tokens' gradients, from stored ones of the encoded tokens.
      layer: Of the tokens' gradients, where it computes those of the encoded tokens as well.
      weights: Of the weights' gradients.
    """

    forward: Cut
    tokens: Cut
    layer: Cut
    weights: Cut


# By the least power of two that D is not above: the largest that spill no register, on an A100 as
# on an H100.  Wider tokens are left to XLA: their products take longer than their hidden units take
# to be stored and read, and here every tile of tokens would read all of the weights again.
CUTS = {
    "bfloat16": {
        64: Cuts(Cut(64, 32, 4), Cut(64, 32, 4), Cut(64, 32, 4), Cut(64, 32, 8)),
        128: Cuts(Cut(64, 32, 8), Cut(64, 32, 8), Cut(64, 32, 8), Cut(64, 32, 8)),
        256: Cuts(Cut(64, 32, 8), Cut(32, 32, 8), Cut(32, 32, 8), Cut(32, 32, 8)),
    },
    "float32": {
        64: Cuts(Cut(32, 16, 8), Cut(32, 16, 4), Cut(32, 16, 8), Cut(32, 16, 8)),
        128: Cuts(Cut(32, 16, 8), Cut(16, 16, 8), Cut(32, 16, 8), Cut(32, 16, 8)),
        256: Cuts(Cut(32, 16, 8), Cut(16, 16, 8), Cut(16, 16, 16), Cut(16, 16, 8)),
    },
}


def cuts_for(width: int, dtype: Any) -> Cuts | None:
    """For tokens of that width and dtype; None if XLA encodes them."""
    return CUTS.get(jnp.dtype(dtype).name, {}).get(_power(width))


def _power(width: int) -> int:
    return max(64, pl.next_power_of_2(width))


# Where the forward pass attends as well, and the most targets x heads of a tile for that.  With
# fewer tokens at a time, programs would read the weights more often than it saves of the tokens.
_ATTENDING = {
    "bfloat16": {64: (Cut(64, 32, 8), 64), 128: (Cut(64, 32, 8), 16)},
    "float32": {64: (Cut(32, 16, 8), 16), 128: (Cut(32, 16, 16), 16), 256: (Cut(32, 16, 8), 16)},
}


def attending_cut(width: int, columns: int, dtype: Any, of_gpu: int) -> Cut | None:
    """For tokens of that width and dtype, and so many targets x heads; None if it does not pay.

    `of_gpu` is its `attending_columns`.
    """
    power = _power(width)
    cut, most = _ATTENDING.get(jnp.dtype(dtype).name, {}).get(power, (None, 0))
    return cut if columns <= min(most, 64 * of_gpu // power) else None
