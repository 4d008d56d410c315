"""Every implementation of the op against a float64 oracle, values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, assert_matches_oracle, make_case, random_ranges, run
from hypothesis import given, settings
from hypothesis import strategies as st

from stca_jax.ops.attention import (
    AttentionOptions,
    cheaper_order,
    history_layer,
    target_to_history_attention,
)
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges

SMALL = BlockSizes(tokens=16, history=8, targets=4)
IMPLEMENTATIONS = ("reference", "xla")
ORDERS = ("absorbed", "projected")


def ragged_case(**options) -> Case:
    """Two packed rows with nested, disjoint, empty and single-token ranges; tokens 20+ are padding.

    20 tokens and 7 targets are no multiple of any block.
    """
    start = [[0, 0, 5, 5, 11, 3, 19], [0, 2, 2, 9, 9, 16, 8]]
    end = [[5, 20, 11, 11, 20, 3, 20], [2, 9, 9, 16, 17, 17, 8]]
    return make_case(start, end, 23, **options)


@pytest.mark.parametrize(
    ("fused", "skip"),
    [(False, False), (True, False), (True, True)],
    ids=["attention", "history_layer", "skip_path"],
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ragged_rows_match_oracle(implementation, order, fused, skip):
    case = ragged_case(fused=fused, skip=skip, score=True)
    assert_matches_oracle(case, implementation=implementation, order=order, block_sizes=SMALL)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_matches_oracle(implementation, order):
    case = ragged_case(fused=True, score=True)
    assert_matches_oracle(
        case, dtype=jnp.bfloat16, tolerance=0.03,
        implementation=implementation, order=order, block_sizes=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_uncovered_tokens_never_matter(implementation, garbage):
    options = {"implementation": implementation, "block_sizes": SMALL}
    dirty = run(ragged_case(fused=True, score=True, garbage=garbage), **options)
    clean = run(ragged_case(fused=True, score=True, garbage=0.0), **options)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits(implementation, order):
    """Scores of about +-1e4, where only an online maximum keeps exp finite."""
    case = ragged_case(logit_scale=1e4)
    out, gradients = run(case, implementation=implementation, order=order, block_sizes=SMALL)
    score = np.concatenate([out.log_sum_exp[np.isfinite(out.log_sum_exp)]])
    assert np.abs(score).max() > 1e4
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert_matches_oracle(
        case._replace(d_output=case.d_output * 0, d_log_sum_exp=case.d_log_sum_exp),
        tolerance=2e-4, implementation=implementation, order=order, block_sizes=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ranges_empty(implementation):
    case = make_case(np.full((2, 3), 4), np.full((2, 3), 4), 9, fused=True, score=True)
    out, gradients = run(case, implementation=implementation, block_sizes=SMALL)
    assert np.all(out.output == 0)
    assert np.all(out.log_sum_exp == -np.inf)
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradients))


def test_infinite_cotangent_of_an_empty_range_stays_there():
    case = ragged_case()
    p = jax.tree.map(jnp.asarray, case.problem)

    def loss(tokens):
        out = target_to_history_attention(
            p.query, tokens, p.w_key, p.w_value, case.ranges,
            options=AttentionOptions(block_sizes=SMALL),
        )  # fmt: skip
        return jnp.exp(-out.log_sum_exp).sum()  # exp(inf) where empty

    assert np.isfinite(jax.grad(loss)(p.tokens)).all()


LATTICE = {
    "R": st.integers(1, 3),
    "M": st.integers(1, 40),
    "L": st.integers(1, 70),
    "H": st.sampled_from([1, 2, 3]),
    "order": st.sampled_from(ORDERS),
    "fused": st.booleans(),
    "score": st.booleans(),
    "blocks": st.builds(BlockSizes, st.integers(1, 80), st.integers(5, 40), st.integers(1, 20)),
    "seed": st.integers(0, 2**16),
}


def check_lattice_point(R, M, L, H, order, fused, score, blocks, seed):
    start, end = random_ranges(np.random.default_rng(seed), R, M, L)
    case = make_case(start, end, L, H=H, fused=fused, score=score, seed=seed)
    assert_matches_oracle(case, order=order, block_sizes=blocks)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(**LATTICE)
def test_lattice(**point):
    check_lattice_point(**point)


@pytest.mark.exhaustive
@settings(max_examples=25, deadline=None)
@given(**LATTICE)
def test_large_lattice(**point):
    check_lattice_point(**point)


@pytest.mark.slow
@pytest.mark.parametrize(("M", "L", "order"), [(1000, 700, None), (3, 20_000, None)])
def test_default_blocks_at_size(M, L, order):
    start, end = random_ranges(np.random.default_rng(0), 1, M, L)
    assert_matches_oracle(make_case(start, end, L, H=2, fused=True), order=order, tolerance=1e-4)


def test_order_by_flops():
    def flops(m: int, h: int, d: int, order: str) -> int:
        return 4 * d * d + 4 * d * m if order == "projected" else 4 * d * h * m

    for m, h, d in itertools.product((1, 8, 20, 21, 22, 64, 1000), (1, 2, 4, 16), (16, 64, 1024)):
        order = cheaper_order(m, h, d)
        assert flops(m, h, d, order) == min(flops(m, h, d, o) for o in ORDERS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_do_not_see_each_other(implementation):
    case = ragged_case(fused=True)
    options = {"implementation": implementation, "block_sizes": SMALL, "order": "absorbed"}
    together, _ = run(case, **options)
    for m in range(case.start.shape[1]):
        alone = case._replace(
            problem=case.problem._replace(query=case.problem.query[:, m : m + 1]),
            start=case.start[:, m : m + 1], end=case.end[:, m : m + 1],
            d_output=case.d_output[:, m : m + 1], d_log_sum_exp=case.d_log_sum_exp[:, m : m + 1],
        )  # fmt: skip
        out, _ = run(alone, **options)
        np.testing.assert_allclose(out.output[:, 0], together.output[:, m], atol=1e-5)


def test_scores_and_encoded_tokens_are_never_stored():
    """No array of the compiled step is as large as [M, H, L] scores or the FFN's hidden [L, F]."""
    R, M, L, D = 1, 64, 16_384, 16
    case = make_case(np.zeros((R, M)), np.full((R, M), L), L, D=D, fused=True)
    problem = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.problem)

    def loss(p, ranges):
        return history_layer(
            p.query, p.tokens, p.encoder, p.w_key, p.w_value, ranges,
            options=AttentionOptions(implementation="xla", block_sizes=BlockSizes()),
        ).output.sum()  # fmt: skip

    step = jax.jit(jax.grad(loss)).lower(problem, case.ranges).compile()
    stored = step.memory_analysis().temp_size_in_bytes
    tokens = 4 * L * D
    assert stored < 3 * tokens + 8e6
    assert stored < 4 * M * 2 * L * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "fast"}, r"order is 'fast'; it must be one of"),
        ({"implementation": "cuda"}, r"implementation is 'cuda'; it must be one of"),
    ],
)
def test_unknown_choice_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(ragged_case(), **change)


def test_wrong_shape_is_named():
    p = ragged_case().problem
    with pytest.raises(ValueError, match=r"ranges.end has shape \(2, 3\), expected \(2, 7\)"):
        target_to_history_attention(
            p.query,
            p.tokens,
            p.w_key,
            p.w_value,
            Ranges(np.zeros((2, 7), int), np.zeros((2, 3), int)),
        )


EMPTY = {"no targets": (2, 0, 5), "no tokens": (2, 3, 0), "no rows": (0, 3, 5)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_nothing_to_attend_to(sizes, order, implementation):
    """No raw error of reshaping: rows without tokens are empty histories."""
    R, M, L = sizes
    zeros = np.zeros((R, M), np.int32)
    case = make_case(zeros, zeros, L, fused=True, score=True)
    out, gradients = run(case, implementation=implementation, order=order)
    assert out.output.shape == (R, M, 2, 4)
    assert np.all(out.output == 0)
    assert np.all(out.log_sum_exp == -np.inf)
    for gradient, value in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(case.problem), strict=True
    ):
        assert gradient.shape == value.shape
        assert np.all(gradient == 0)
