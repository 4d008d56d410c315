"""The TPU kernels in interpret mode: races detected, scratch and padding full of NaN."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_matches_oracle, make_case, random_ranges, run
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # races have no public name
from jax.experimental.pallas import tpu as pltpu
from test_attention import ORDERS, SMALL, ragged_case

from stca_jax.ops.pallas_tpu import MosaicKernels

FAST = MosaicKernels(interpret=True)
STRICT = MosaicKernels(
    interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
)


@pytest.mark.parametrize("order", ORDERS)
def test_ragged_rows_match_oracle(order):
    case = ragged_case(fused=True, score=True)
    assert_matches_oracle(case, implementation=FAST, order=order, block_sizes=SMALL)


def test_bfloat16_matches_oracle():
    case = ragged_case(score=True)
    assert_matches_oracle(
        case, dtype=jnp.bfloat16, tolerance=0.03, implementation=FAST, order="absorbed",
        block_sizes=SMALL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_without_races_or_uninitialised_memory(order, dtype):
    case = ragged_case(fused=dtype == jnp.float32, score=True)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.03
    assert_matches_oracle(
        case, dtype=dtype, tolerance=tolerance, implementation=STRICT, order=order,
        block_sizes=SMALL,
    )  # fmt: skip
    assert not interpret_pallas_call.races.races_found


def test_all_ranges_empty():
    case = make_case(np.full((1, 3), 4), np.full((1, 3), 4), 9, score=True)
    out, gradients = run(case, implementation=FAST, block_sizes=SMALL)
    assert np.all(out.output == 0)
    assert np.all(out.log_sum_exp == -np.inf)
    assert all(np.all(g == 0) for g in gradients if g is not None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_ranges(seed):
    rng = np.random.default_rng(seed)
    R, M, L = rng.integers(1, 3), rng.integers(1, 30), rng.integers(1, 60)
    start, end = random_ranges(rng, R, M, L)
    case = make_case(start, end, L, H=3, score=bool(seed % 2), seed=seed)
    assert_matches_oracle(case, implementation=FAST, order=ORDERS[seed % 2], block_sizes=SMALL)
