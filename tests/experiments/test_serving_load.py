"""The arithmetic of the server's load test."""

import math

import pytest
from scipy.optimize import brentq

from stca_jax.experiments.benchmarks import serving_load


def test_ideal_queue_of_one_server():
    """Alone a score takes its own time; under load the tail of the waiting is that of M/D/1."""
    alone = serving_load.ideal_queue(rate=0.001, saturating=10.0)
    assert alone["ideal p50 (ms)"] == pytest.approx(125.0)  # a tenth is 125 ms of four in five
    scores, service = 7.0 * 0.8, 0.125
    decay = brentq(lambda k: scores * (math.exp(k * service) - 1) - k, 1.0, 20.0)
    busy = serving_load.ideal_queue(rate=7.0, saturating=10.0)
    tail = busy["ideal p99.9 (ms)"] - busy["ideal p99 (ms)"]
    assert tail == pytest.approx(1e3 * math.log(10) / decay, rel=0.15)
