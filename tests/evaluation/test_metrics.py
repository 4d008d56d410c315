"""Metrics against scikit-learn, one group at a time where it has no grouped version."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from stca_jax.evaluation import metrics

# Few distinct scores, so that ties are the rule; both zeros and both infinities among them.
SCORES = [-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, np.inf]
GROUPS = [-(2**63), -5, 0, 1, 2, 2**63 - 1]
TARGETS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(SCORES), st.sampled_from(GROUPS)),
    min_size=1,
    max_size=60,
)


def columns(targets):
    label, score, group = zip(*targets, strict=True)
    return np.array(label), np.array(score, np.float32), np.array(group, np.int64)


def sklearn_auc(label, score):
    if len(set(label.tolist())) == 1:
        return float("nan")
    # Dense ranks keep order and ties; scikit-learn refuses infinities.
    return sk.roc_auc_score(label, np.unique(score, return_inverse=True)[1])


def sklearn_grouped_auc(label, score, group):
    areas = {g: sklearn_auc(label[group == g], score[group == g]) for g in np.unique(group)}
    areas = {g: area for g, area in areas.items() if not np.isnan(area)}
    weights = [(group == g).sum() for g in areas]
    return np.average(list(areas.values()), weights=weights) if areas else float("nan")


def random_predictions(n, num_groups=50, seed=0):
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=n).astype(np.float32)
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return label, logit, rng.integers(0, num_groups, n)


@settings(max_examples=200, deadline=None)
@given(TARGETS)
def test_auc_is_that_of_sklearn(targets):
    label, score, _ = columns(targets)
    np.testing.assert_allclose(metrics.auc(label, score), sklearn_auc(label, score), rtol=1e-14)


@settings(max_examples=200, deadline=None)
@given(TARGETS)
def test_grouped_auc_is_a_weighted_loop_over_groups(targets):
    label, score, group = columns(targets)
    result = metrics.grouped_auc(label, score, group)
    expected = sklearn_grouped_auc(label, score, group)
    np.testing.assert_allclose(result.value, expected, rtol=1e-14)

    sizes = {g: label[group == g] for g in np.unique(group)}
    assert result.num_groups == len(sizes)
    assert result.num_one_class_groups == sum(len(set(y.tolist())) == 1 for y in sizes.values())
    assert result.num_targets == sum(y.size for y in sizes.values() if len(set(y.tolist())) == 2)


@settings(max_examples=50, deadline=None)
@given(TARGETS, st.randoms(use_true_random=False))
def test_order_of_targets_does_not_matter(targets, random):
    def row(targets):
        label, score, group = columns(targets)
        return list(metrics.ranking_metrics(label, score, group, group).values())

    shuffled = random.sample(targets, len(targets))
    np.testing.assert_allclose(row(shuffled), row(targets), rtol=1e-12)


def delong_error(label, score):
    """DeLong's formula, pair by pair."""
    wins = np.sign(score[label == 1][:, None] - score[label == 0]) / 2 + 0.5
    variances = wins.mean(1).var(ddof=1) / wins.shape[0], wins.mean(0).var(ddof=1) / wins.shape[1]
    return np.sqrt(sum(variances))


def test_standard_error_without_groups_is_delong_s():
    label, logit, _ = random_predictions(400)
    for score in (logit, np.round(logit)):  # without and with ties
        error = metrics.auc_standard_error(label, score, np.arange(400))
        assert error == pytest.approx(delong_error(label, score), rel=0.003)  # n / (n - 1)


def test_standard_error_is_the_spread_of_samples_of_users():
    """Users whose targets agree: the bootstrap of users has it, that of targets half of it."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 10)
    rate, taste = rng.normal(size=(2, 200)).repeat(10, 1)
    label = (rng.random(2000) < 1 / (1 + np.exp(-2 * rate - taste))).astype(int)
    score = (rate + rng.normal(size=2000)).astype(np.float32)
    samples = []
    for _ in range(400):
        chosen = (rng.integers(0, 200, 200)[:, None] * 10 + np.arange(10)).ravel()
        samples.append(sk.roc_auc_score(label[chosen], score[chosen]))
    error = metrics.auc_standard_error(label, score, user)
    assert error == pytest.approx(np.std(samples), rel=0.15)  # 400 samples: within 3.5 %, one sd
    assert error > 1.5 * metrics.auc_standard_error(label, score, np.arange(2000))


def test_standard_error_needs_two_users_of_each_class():
    label, score = np.array([1, 0, 0, 1]), np.array([4, 3, 2, 1], np.float32)
    assert np.isnan(metrics.auc_standard_error(label, score, np.array([0, 0, 1, 0])))
    assert metrics.auc_standard_error(label, score, np.array([0, 0, 1, 1])) > 0


@pytest.mark.parametrize("name", ["calibration", "auc_se", "num_targets", "acu"])
@pytest.mark.parametrize("larger", [True, False])
def test_what_ranks_no_models_chooses_no_checkpoint(name, larger):
    with pytest.raises(ValueError, match=rf"metric is '{name}'.* must be one of auc, gauc_user"):
        metrics.check_choice(name, larger_is_better=larger)


@settings(max_examples=50, deadline=None)
@given(TARGETS)
def test_auc_of_the_opposite_is_the_complement(targets):
    label, score, _ = columns(targets)
    if 0 < label.sum() < label.size:
        assert metrics.auc(label, -score) == pytest.approx(1 - metrics.auc(label, score))
        assert metrics.auc(1 - label, score) == pytest.approx(1 - metrics.auc(label, score))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint64])
def test_group_ids_of_any_type(dtype):
    label, logit, group = random_predictions(500)
    expected = metrics.grouped_auc(label, logit, group)
    info = np.iinfo(dtype)
    ids = np.linspace(info.min, info.max, 50, dtype=np.float64)  # as far apart as they can be
    ids = np.array([min(max(int(i), info.min), info.max) for i in ids], dtype)
    result = metrics.grouped_auc(label, logit, ids[group])
    assert result.value == pytest.approx(expected.value, rel=1e-14)
    assert result.num_one_class_groups == expected.num_one_class_groups


@pytest.mark.parametrize("apart", [2**31 - 1, 2**31, 2**32, 2**33])
def test_group_ids_that_share_low_bits_stay_apart(apart):
    label, logit, group = random_predictions(500, num_groups=2)
    expected = metrics.grouped_auc(label, logit, group)
    assert expected.num_groups == 2
    found = metrics.grouped_auc(label, logit, group * apart - 7)
    value = pytest.approx(expected.value, rel=1e-12)  # groups are added up in another order
    assert found == dataclasses.replace(expected, value=value)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32, np.float64])
def test_labels_of_any_type(dtype):
    label, logit, _ = random_predictions(500)
    for metric in (metrics.auc, metrics.log_loss, metrics.calibration, metrics.normalized_entropy):
        assert metric(label.astype(dtype), logit) == metric(label, logit)


def test_by_hand():
    # Pairs of user 7: 2 > 1 is won, 1 = 1 is half won. User 8: lost. User 9: one class.
    label = np.array([1, 1, 0, 0, 1, 1])
    score = np.array([2.0, 1.0, 1.0, 5.0, 4.0, 0.0], np.float32)
    user = np.array([7, 7, 7, 8, 8, 9])
    assert metrics.grouped_auc(label, score, user) == metrics.GroupedAuc(
        value=(3 * 0.75 + 2 * 0.0) / 5, num_groups=3, num_one_class_groups=1, num_targets=5
    )


def test_log_loss_is_that_of_sklearn():
    label, logit, _ = random_predictions(2_000)
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    assert metrics.log_loss(label, logit) == pytest.approx(sk.log_loss(label, probability), 1e-12)
    assert metrics.calibration(label, logit) == pytest.approx(probability.sum() / label.sum())
    base = sk.log_loss(label, np.full(label.size, label.mean(dtype=np.float64)))
    expected = sk.log_loss(label, probability) / base
    assert metrics.normalized_entropy(label, logit) == pytest.approx(expected, rel=1e-12)


def test_base_rate_has_normalized_entropy_one():
    label = np.array([1, 0, 0, 0])
    logit = np.full(4, np.log(1 / 3))
    assert metrics.normalized_entropy(label, logit) == pytest.approx(1.0)
    assert metrics.calibration(label, logit) == pytest.approx(1.0)


@pytest.mark.filterwarnings("error")
def test_large_logits_neither_overflow_nor_tie():
    label = np.array([1, 0, 1, 0])
    logit = np.array([201, 200, -1000, -1001], np.float32)
    assert metrics.log_loss(label, logit) == pytest.approx((200 + 1000) / 4)
    assert metrics.calibration(label, logit) == pytest.approx(1.0)
    row = metrics.ranking_metrics(label, logit, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert row["gauc_user"] == row["gauc_request"] == 1.0


def test_infinite_logits():
    label = np.array([1, 0])
    assert metrics.log_loss(label, np.array([np.inf, -np.inf])) == 0.0
    assert metrics.log_loss(label, np.array([-np.inf, 0.0])) == np.inf


def test_one_class_has_no_ranking():
    label, logit = np.ones(3), np.array([0.1, 0.2, 0.3], np.float32)
    assert np.isnan(metrics.auc(label, logit))
    assert np.isnan(metrics.normalized_entropy(label, logit))
    assert np.isnan(metrics.calibration(1 - label, logit))
    result = metrics.grouped_auc(label, logit, np.array([4, 4, 5]))
    assert np.isnan(result.value)
    assert (result.num_groups, result.num_one_class_groups, result.num_targets) == (2, 2, 0)


def test_ranking_metrics_row():
    label, logit, user = random_predictions(300)
    request = user * 3 + np.arange(300) % 3
    row = metrics.ranking_metrics(label, logit, user, request)
    by_request = metrics.grouped_auc(label, logit, request)
    assert row == {
        "auc": metrics.auc(label, logit),
        "auc_se": metrics.auc_standard_error(label, logit, user),
        "gauc_user": metrics.grouped_auc(label, logit, user).value,
        "gauc_request": by_request.value,
        "log_loss": metrics.log_loss(label, logit),
        "calibration": metrics.calibration(label, logit),
        "normalized_entropy": metrics.normalized_entropy(label, logit),
        "num_targets": 300,
        "num_positives": label.sum(),
        "num_users": 50,
        "num_requests": np.unique(request).size,
        "one_class_users": metrics.grouped_auc(label, logit, user).num_one_class_groups,
        "one_class_requests": by_request.num_one_class_groups,
    }


def test_failing_metric_does_not_stop_the_others(monkeypatch):
    label, logit, user = random_predictions(300)
    expected = metrics.ranking_metrics(label, logit, user, user)

    def fail(*_):
        raise MemoryError("too many groups")

    monkeypatch.setattr(metrics, "calibration", fail)
    failures = []
    row = metrics.ranking_metrics(
        label, logit, user, user, on_failure=lambda *failure: failures.append(failure)
    )
    del expected["calibration"]
    assert row == expected
    ((name, error),) = failures
    assert name == "calibration"
    assert str(error) == "too many groups"
    with pytest.raises(MemoryError):
        metrics.ranking_metrics(label, logit, user, user)


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([0, 1], [0.0, np.nan], "1 of 2 scores are NaN"),
        ([0, 2], [0.0, 1.0], "A label is 2, expected 0 or 1"),
        ([0, np.nan], [0.0, 1.0], "A label is nan"),
        ([0, 1, 1], [0.0, 1.0], r"label has shape \[3\] and score \[2\]"),
        ([[0, 1]], [[0.0, 1.0]], r"expected both \[n\]"),
        ([], [], "No targets"),
    ],
)
def test_refuses(label, score, message):
    label, score = np.array(label), np.array(score, np.float32)
    for metric in (metrics.auc, metrics.log_loss, metrics.calibration, metrics.normalized_entropy):
        with pytest.raises(ValueError, match=message):
            metric(label, score)


@pytest.mark.parametrize("group", [np.array([0]), np.array([0.0, 1.0])])
def test_refuses_groups(group):
    with pytest.raises(ValueError, match="expected integers of shape"):
        metrics.grouped_auc(np.array([0, 1]), np.array([0.0, 1.0], np.float32), group)


def test_cost_does_not_grow_with_the_number_of_groups():
    def seconds(num_groups):
        label, logit, group = random_predictions(200_000, num_groups)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            metrics.grouped_auc(label, logit, group)
            times.append(time.perf_counter() - start)
        return min(times)

    # A loop over groups would take hundreds of times longer; the margin is for a busy machine.
    assert seconds(100_000) < 20 * seconds(10)
