"""What the benchmarks call a floor, by hand."""

import pytest

from stca_jax.experiments.benchmarks import sequence_modules, timing

RATES = timing.Rates(flops=100.0, exponentials=10.0, bandwidth=1.0)


def test_a_core_computes_products_and_exponentials_one_after_the_other():
    assert RATES.floor(flops=200.0, exponentials=5.0) == pytest.approx(2.5)


def test_memory_is_read_meanwhile():
    assert RATES.floor(flops=200.0, exponentials=5.0, num_bytes=1.0) == pytest.approx(2.5)
    assert RATES.floor(flops=200.0, exponentials=5.0, num_bytes=7.0) == pytest.approx(7.0)


def test_work_of_a_request():
    """Two layers, 10 tokens of width 4 with gates of 8, 3 targets with 2 heads."""
    assert sequence_modules.model_exponentials(10, 3, 2, 4, 2, 2) == 2 * 10 * (3 * 2 + 8)
    assert sequence_modules.model_bytes(10, 2, 4, 2) == 2 * 3 * (10 * 4 * 2)


def test_rates_are_measured():
    rates = timing.measure_rates("float32", 8)
    assert min(rates.flops, rates.exponentials, rates.bandwidth) > 1e6
