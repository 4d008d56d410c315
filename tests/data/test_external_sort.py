"""Numbers come out in order, however they come in and into however many ranges they go."""

import numpy as np
import pytest

from stca_jax.data import external_sort


@pytest.mark.parametrize("at_once", [100, 1_000, 100_000])
@pytest.mark.parametrize("distinct", [3, 1_000, 2**63])
def test_numbers_are_sorted(tmp_path, monkeypatch, at_once, distinct):
    monkeypatch.setattr(external_sort, "NUMBERS_AT_ONCE", at_once)
    numbers = np.random.default_rng(distinct).integers(0, distinct, 5_000, np.uint64)
    blocks = (numbers[begin : begin + 700] for begin in range(0, 5_000, 700))
    folder = tmp_path / "temporary"
    folder.mkdir()
    (folder / "00000").write_bytes(b"of an attempt that was killed")
    pieces = list(external_sort.sort_numbers(blocks, 5_000, folder))
    np.testing.assert_array_equal(np.concatenate(pieces), np.sort(numbers))
    assert not folder.exists()
    if distinct > 3 and at_once < 5_000:  # equal numbers are of one range
        assert len(pieces) == 5_000 // at_once
        assert max(map(len, pieces)) < 2 * at_once
