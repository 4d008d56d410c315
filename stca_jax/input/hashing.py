"""Random choices that depend on a seed and on what is chosen, and on nothing drawn before.

Nothing that makes records, plans or batches draws from a sequential generator: every choice is a
hash, the same in whatever order, file, process or thread it is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def counter_hash(seed: int, *keys: np.ndarray | int) -> UInt64[np.ndarray, " n"]:
    """Uniform 64-bit integers, one for each combination of a seed and integer keys.

    A chain of SplitMix64 finalisers (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195).

    Args:
      seed: Any integer.
      *keys: Integer arrays or integers, broadcast against each other.
    """
    state = np.full((), seed & (2**64 - 1), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            z = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return np.atleast_1d(state)


def text_hash(values: Iterable[str]) -> Int[np.ndarray, " n"]:
    """A 64-bit integer for each text, the same in every run."""
    digests = b"".join(hashlib.blake2b(v.encode(), digest_size=8).digest() for v in values)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def uniform(seed: int, *keys: np.ndarray | int) -> Float[np.ndarray, " n"]:
    """Uniform numbers in [0, 1): a pure function of the seed and the integer keys.

    Args:
      seed: Any integer.
      *keys: Integers or integer arrays, such as a stream, an epoch and request ids.
    """
    return (counter_hash(seed, *keys) >> np.uint64(11)) * 2.0**-53
