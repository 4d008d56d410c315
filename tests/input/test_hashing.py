from __future__ import annotations

import numpy as np

from stca_jax.input.hashing import counter_hash, uniform


def test_counter_hash_is_splitmix64():
    # First outputs of SplitMix64 seeded with 0, as published with its reference implementation.
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], np.uint64)
    assert [hex(v) for v in counter_hash(0, states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_uniform_is_uniform_over_consecutive_keys():
    values = uniform(3, np.arange(200)[:, None], np.arange(1_000)).ravel()
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 4_000) ** 2 / 4_000).sum()
    assert chi_square < 49 + 5 * np.sqrt(2 * 49)
    assert not np.array_equal(values[:1_000], uniform(4, 0, np.arange(1_000)))
