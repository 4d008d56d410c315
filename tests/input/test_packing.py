"""Packing against brute force, and how full it makes rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stca_jax.input.packing import (
    balanced_order,
    chunk_starts,
    group_starts,
    pack_rows,
    split_requests,
)


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 40))
def test_split_keeps_every_target_once(num_targets, targets_per_row):
    pieces = split_requests(np.array(num_targets, int), targets_per_row)
    found = [
        (r, t)
        for r, first, n in zip(pieces.request, pieces.first_target, pieces.num_targets, strict=True)
        for t in range(first, first + n)
    ]
    assert found == [(r, t) for r, n in enumerate(num_targets) for t in range(n)]
    assert (pieces.num_targets <= targets_per_row).all()
    assert (pieces.num_targets >= 1).all()
    assert len(pieces.request) == sum(-(-n // targets_per_row) for n in num_targets)


requests_of_a_user = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12
)


def greedy_groups(user, targets, max_targets):
    """Starts of groups, one piece after the other."""
    starts, total = [], 0
    for i in range(len(user)):
        total += targets[i]
        if not starts or user[i] != user[i - 1] or total > max_targets:
            starts.append(i)
            total = targets[i]
    return starts


def greedy_chunks(groups, end, length, max_tokens):
    """Starts of chunks, one piece after the other, with the chunk's tokens as a set."""
    starts, tokens = [], set()
    for i in range(len(end)):
        window = set(range(max(0, end[i] - length[i]), end[i]))
        fits = (
            i not in groups
            and len(tokens | window) <= max_tokens
            # Windows meet: the union has no gap and the new tokens are not all the chunk adds.
            and (end[i] == end[i - 1] or tokens & window)
        )
        if not fits:
            starts.append(i)
            tokens = set()
        tokens |= window
    return starts


@given(st.lists(requests_of_a_user, max_size=5), st.integers(30, 60), st.integers(5, 30))
def test_groups_and_chunks_are_the_greedy_ones(users, max_tokens, max_targets):
    rows = [(u, *request) for u, requests in enumerate(users) for request in sorted(requests)]
    user, end, length, targets = np.array(rows, int).reshape(-1, 4).T
    groups = group_starts(user, targets, max_targets)
    assert groups.tolist() == greedy_groups(user, targets, max_targets)
    length = np.repeat(length[groups], np.diff(groups, append=len(user)))
    found = chunk_starts(groups, end, length, max_tokens)
    assert found.tolist() == greedy_chunks(set(groups.tolist()), end, length, max_tokens)


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=60),
    st.integers(100, 250),
    st.integers(20, 60),
)
def test_rows_hold_every_unit_once_within_bounds(units, row_length, targets_per_row):
    tokens, targets = np.array(units, int).reshape(-1, 2).T
    rows = pack_rows(tokens, targets, row_length=row_length, targets_per_row=targets_per_row)
    assert sorted(unit for row in rows for unit in row) == list(range(len(units)))
    for row in rows:
        assert row
        assert tokens[row].sum() <= row_length
        assert targets[row].sum() <= targets_per_row


def zipf_lengths(rng, n):
    """Log-uniform lengths up to 10,000: the share of length l falls as 1 / l."""
    return np.exp(rng.uniform(0, np.log(10_000), n)).astype(int)


@pytest.mark.parametrize("row_length", [10_240, 16_384, 32_768])
@pytest.mark.parametrize("spread", [False, True])
def test_zipf_lengths_fill_rows(row_length, spread):
    rng = np.random.default_rng(0)
    tokens = zipf_lengths(rng, 4096)
    targets = rng.geometric(1 / 16, 4096).clip(1, 120) if spread else np.full(4096, 16)
    slots = int(np.ceil(1.08 * row_length * targets.sum() / tokens.sum()))
    rows = pack_rows(tokens, targets, row_length=row_length, targets_per_row=slots)
    assert tokens.sum() / (len(rows) * row_length) >= 0.95
    assert targets.sum() / (len(rows) * slots) >= 0.85


@pytest.mark.parametrize("slots", [8, 10_000])
def test_one_scarce_budget_is_used_up(slots):
    rng = np.random.default_rng(1)
    tokens, targets = zipf_lengths(rng, 4096), np.full(4096, 4)
    rows = pack_rows(tokens, targets, row_length=20_480, targets_per_row=slots)
    fewest = max(tokens.sum() / 20_480, targets.sum() / slots)
    assert len(rows) <= 1.03 * fewest


def test_rows_of_few_units_are_filled_by_pairs():
    tokens = np.random.default_rng(0).integers(1, 10_000, 4096)
    rows = pack_rows(tokens, np.full(4096, 16), row_length=16_384, targets_per_row=56)
    # Two budgets bind at once, with room for three units a row.
    assert tokens.sum() / (len(rows) * 16_384) >= 0.87


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_balanced_order_is_a_permutation(tokens):
    assert sorted(balanced_order(tokens)) == list(range(len(tokens)))


@pytest.mark.parametrize("shares", [2, 4, 8])
def test_shares_of_a_balanced_order_have_near_equal_tokens(shares):
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(0, 1000, 64)
        sums = tokens[balanced_order(tokens.tolist())].reshape(shares, -1).sum(1)
        # An arbitrary order's shares differ by 12, 30 and 55 % of their mean, on average.
        assert np.ptp(sums) <= 0.012 * shares / 2 * sums.mean()
