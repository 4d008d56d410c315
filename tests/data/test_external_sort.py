"""Rows come out by key and value, however they come in and into however many ranges they go."""

import numpy as np
import pytest

from stca_jax.data import external_sort


@pytest.mark.parametrize("rows_at_once", [100, 1_000, 100_000])
@pytest.mark.parametrize("distinct", [3, 1_000, 2**63])
def test_rows_are_sorted(tmp_path, monkeypatch, rows_at_once, distinct):
    monkeypatch.setattr(external_sort, "ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(distinct)
    key, value = rng.integers(0, distinct, 5_000, np.uint64), rng.integers(0, 4, 5_000, np.uint64)

    def blocks(every):
        for begin in range(0, 5_000, 700):
            yield key[begin : begin + 700 : every], value[begin : begin + 700 : every]

    folder = tmp_path / "temporary"
    folder.mkdir()
    (folder / "00000").write_bytes(b"of an attempt that was killed")
    pieces = list(external_sort.sort_rows(blocks, 5_000, folder))
    order = np.lexsort((value, key))
    np.testing.assert_array_equal(np.concatenate([k for k, _ in pieces]), key[order])
    np.testing.assert_array_equal(np.concatenate([v for _, v in pieces]), value[order])
    assert not folder.exists()
    if distinct > 3 and rows_at_once < 5_000:  # equal keys are of one range
        assert len(pieces) == 5_000 // rows_at_once
        assert max(len(k) for k, _ in pieces) < 2 * rows_at_once
