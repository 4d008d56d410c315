from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stca_jax.data import request_building as rb
from stca_jax.data.negatives import ByCount
from stca_jax.input.arrays import offsets, run_starts

EVENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(0, 9)), max_size=60)


@given(EVENTS, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 13)), max_size=20))
def test_history_end_counts_strictly_earlier_events(events, requests):
    events = sorted(events)
    user, time = (np.array([e[k] for e in events], np.int64) for k in (0, 1))
    of_request = [np.array([r[k] for r in requests], np.int64) for k in (0, 1)]
    found = rb.history_end(user, time, *of_request)
    expected = [sum(u == v and s < t for v, s, _ in events) for u, t in requests]
    assert found.tolist() == expected


def test_events_of_the_same_timestamp_are_not_history():
    user, time = np.zeros(5, np.int64), np.array([1, 4, 4, 4, 8])
    assert rb.history_end(user, time, np.zeros(3, int), np.array([4, 5, 8])).tolist() == [1, 4, 4]


def test_time_split():
    assert rb.time_split(np.array([0, 9, 10, 19, 20, 99]), 10, 20).tolist() == [0, 0, 1, 1, 2, 2]


def test_log_popularity():
    np.testing.assert_allclose(
        rb.log_popularity(np.array([0, 9, 99_999])), [-1, np.log(10) / 4 - 1, np.log(1e5) / 4 - 1],
        rtol=1e-6,
    )  # fmt: skip
    assert rb.log_popularity(np.arange(3)).dtype == np.float32


def make_targets(requests, train_count, item_key=None, **changes):
    """Targets of `requests` = [(key, items)]."""
    owner = np.repeat(np.arange(len(requests)), [len(items) for _, items in requests])
    items = np.concatenate([np.array(items, np.int64) for _, items in requests])
    arguments = {
        "request_key": np.array([key for key, _ in requests], np.uint64),
        "item_key": np.arange(len(train_count)) if item_key is None else item_key,
        "sampler": ByCount(np.asarray(train_count)),
        "max_positives": 4,
        "negatives_per_positive": 2,
        "seed": 0,
    }
    return rb.next_item_targets(owner, items, **arguments | changes)


REQUESTS = st.lists(
    st.lists(st.integers(0, 14), min_size=1, max_size=8), min_size=1, max_size=12
).map(lambda baskets: [(1_000 + i, items) for i, items in enumerate(baskets)])
COUNTS = st.lists(st.integers(0, 30), min_size=15, max_size=15).filter(any)


@given(REQUESTS, COUNTS, st.integers(1, 6), st.integers(0, 3), st.integers(0, 5))
def test_targets_keep_their_rules(requests, counts, max_positives, per_positive, seed):
    targets = make_targets(
        requests, counts,
        max_positives=max_positives, negatives_per_positive=per_positive, seed=seed,
    )  # fmt: skip
    assert (np.diff(targets.request) >= 0).all()
    for k, (_, items) in enumerate(requests):
        chosen, label = (v[targets.request == k] for v in (targets.item, targets.label))
        positive, negative = chosen[label == 1].tolist(), chosen[label == 0].tolist()
        assert len(set(chosen.tolist())) == len(chosen)
        assert set(positive) <= set(items)
        assert len(positive) == min(max_positives, len(set(items)))
        assert not set(negative) & set(items)
        assert all(counts[i] > 0 for i in negative)
        assert len(negative) <= per_positive * len(positive)


@given(REQUESTS, COUNTS)
def test_targets_of_a_request_do_not_depend_on_the_others(requests, counts):
    together = make_targets(requests, counts)
    for k, request in enumerate(requests):
        alone = make_targets([request], counts)
        assert together.item[together.request == k].tolist() == alone.item.tolist()
        assert together.label[together.request == k].tolist() == alone.label.tolist()


@given(REQUESTS, COUNTS)
def test_items_that_training_lacks_change_no_target(requests, counts):
    keys = 1 + np.arange(len(counts))
    without = make_targets(requests, counts, item_key=keys)
    # Unseen items of smaller and of larger keys: every index moves by one.
    moved = [(k, [i + 1 for i in items]) for k, items in requests]
    with_unseen = make_targets(moved, np.r_[0, counts, 0], item_key=np.r_[0, keys, 1_000])
    assert (with_unseen.item - 1).tolist() == without.item.tolist()
    assert with_unseen.label.tolist() == without.label.tolist()


def test_negatives_follow_training_popularity():
    counts = np.array([0, 1, 3, 6, 10])
    requests = [(k, [0]) for k in range(20_000)]
    targets = make_targets(requests, counts, negatives_per_positive=1)
    found = np.bincount(targets.item[targets.label == 0], minlength=5)
    expected = 20_000 * counts / counts.sum()
    assert found[0] == 0
    assert ((found - expected)[1:] ** 2 / expected[1:]).sum() < 3 + 5 * np.sqrt(6)


def test_positives_kept_are_a_uniform_subset_in_no_order():
    requests = [(k, list(range(8))) for k in range(8_000)]
    targets = make_targets(requests, np.r_[np.zeros(8, int), np.full(40, 5)])
    kept = np.bincount(targets.item[targets.label == 1], minlength=8)
    assert np.abs(kept - 4_000).max() < 5 * np.sqrt(2_000)
    assert (np.bincount(targets.request) == 12).all()
    share = targets.label.reshape(-1, 12).mean(axis=0)  # of positives, by place in the request
    assert np.abs(share - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 8_000)


def test_large_baskets_get_all_the_negatives_that_are_wanted():
    popularity = (1e6 / np.arange(1, 1_001)).astype(int)
    requests = [(k, list(range(k % 30, k % 30 + 16))) for k in range(500)]
    targets = make_targets(
        requests, popularity, max_positives=16, negatives_per_positive=1
    )  # fmt: skip
    assert (np.bincount(targets.request) == 32).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_positives": 0}, "max_positives=0 must be at least 1"),
        ({"negatives_per_positive": -1}, "negatives_per_positive=-1 at least 0"),
    ],
)
def test_targets_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        make_targets([(1, [0, 1])], np.ones(3, int), **changes)


def test_targets_need_training_events():
    with pytest.raises(ValueError, match="no item occurs in training events"):
        make_targets([(1, [0, 1])], np.zeros(3, int))


@settings(max_examples=30)
@given(EVENTS.filter(bool))
def test_user_logs_cut_the_flat_arrays_by_user(events):
    events = sorted(events)
    user, time, item = (np.array(c, np.int64) for c in zip(*events, strict=True))
    start = run_starts(user, time)
    request_user, request_time = user[start], time[start]
    count = np.diff(np.r_[start, len(user)])
    num_users = 7
    logs = rb.UserLogs(
        user_id=np.arange(num_users) + 100,
        event_offset=offsets(user, num_users),
        event_time=time,
        history={"item": item},
        request_offset=offsets(request_user, num_users),
        request_id=np.arange(len(start)),
        request_time=request_time,
        request_split=np.zeros(len(start), np.int32),
        history_end=rb.history_end(user, time, request_user, request_time),
        request={"hour": request_time % 3},
        target_offset=np.r_[0, np.cumsum(count)],
        target={"item": item},
        label=np.ones((len(item), 1), np.float32),
    )
    records = list(logs)
    assert [r.user_id for r in records] == list(range(100, 107))
    for u, record in enumerate(records):
        mine = [e for e in events if e[0] == u]
        assert record.history["item"].tolist() == [i for _, _, i in mine]
        assert record.event_time.tolist() == [t for _, t, _ in mine]
        assert record.target["item"].tolist() == [i for _, _, i in mine]
        for k, t in enumerate(record.request_time):
            assert record.request["hour"][k] == t % 3
            assert record.history_end[k] == sum(s < t for _, s, _ in mine)
            inside = slice(*record.target_offset[k : k + 2])
            assert record.target["item"][inside].tolist() == [i for _, s, i in mine if s == t]
