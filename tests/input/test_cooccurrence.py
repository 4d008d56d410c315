"""Co-occurrence: rows tell what occurs together, and no label enters."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

from stca_jax.input import cooccurrence
from stca_jax.input.cooccurrence import cooccurrence_rows, factorise
from stca_jax.input.records import UserRecord, unlabelled_events


def test_rows_of_one_cluster_are_alike():
    """Three clusters of ids that occur together: an oracle needs no decomposition."""
    rng = np.random.default_rng(0)
    cluster = np.arange(30) % 3
    counts = rng.poisson(np.where(cluster[:, None] == cluster, 20, 2)).astype(np.float32)
    counts = np.triu(counts, 1)
    counts += counts.T
    counts[7] = counts[:, 7] = 0
    rows = factorise(sp.csr_matrix(counts), 3, seed=0)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.arange(30) != 7, atol=1e-5)
    alike = rows @ rows.T
    known = np.arange(30) != 7
    same = (cluster[:, None] == cluster)[known][:, known]
    assert alike[known][:, known][same].min() > alike[known][:, known][~same].max() + 0.3
    np.testing.assert_array_equal(rows, factorise(sp.csr_matrix(counts), 3, seed=0))


def clustered_counts(size):
    """Counts of ids of three clusters, and their pointwise mutual information."""
    rng = np.random.default_rng(1)
    cluster = np.arange(size) % 3
    rate = np.where(cluster[:, None] == cluster, 8.0, 2.0)
    counts = np.triu(rng.poisson(rate), 1).astype(np.float64)
    counts += counts.T
    n = counts.sum(1)
    context = n**0.75 * n.sum() / (n**0.75).sum()
    with np.errstate(divide="ignore"):
        information = np.log(counts * n.sum() / np.outer(n, context))
    return counts, np.maximum(information, 0)


def test_matrix_against_a_dense_decomposition():
    counts, information = clustered_counts(12)
    left, strength, _ = np.linalg.svd(information)
    noise = 4 * np.sum(strength[4:] ** 2) / 12
    expected = left[:, :4] * np.maximum(strength[:4] ** 2 - noise, 0) ** 0.25
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = factorise(sp.csr_matrix(counts), 4, seed=0)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_dimensions_of_noise_have_less_weight():
    """Three clusters need three dimensions, however many there are; the others are noise."""
    counts, information = clustered_counts(300)
    left, strength, _ = np.linalg.svd(information)
    as_they_are = left[:, :16] * np.sqrt(strength[:16])
    as_they_are /= np.linalg.norm(as_they_are, axis=1, keepdims=True)
    rows = factorise(sp.csr_matrix(counts), 16, seed=0)
    of_noise, before = (np.square(x[:, 3:]).sum() / 300 for x in (rows, as_they_are))
    assert before > 0.3
    assert of_noise < before / 2


@pytest.mark.parametrize("size", [1, 2, 5])
def test_too_few_ids_have_no_rows(size):
    assert not factorise(sp.csr_matrix((size, size)), 4, seed=0).any()


def shopper(targets, splits=(0, 0, 1)):
    """Baskets at times 1 to 4, and a request at each but the first for those items of it."""
    offset = np.cumsum([0, *map(len, targets)])
    return UserRecord(
        user_id=0,
        event_time=np.repeat([1, 2, 3, 4], 3),
        history={"item": np.arange(12)},
        request_id=np.arange(3),
        request_time=np.array([2, 3, 4]),
        request_split=np.array(splits),
        history_end=np.array([3, 6, 9]),
        target_offset=offset,
        request={},
        target={"item": np.concatenate(targets)},
        label=np.ones((offset[-1], 1), np.float32),
    )


def test_targets_of_training_requests_are_not_counted():
    record = shopper([[3, 50], [7, 8], [9]])
    kept = unlabelled_events(record, "item", end_time=4)
    assert record.history["item"][kept].tolist() == [0, 1, 2, 4, 5, 6]


def test_what_a_request_asks_for_changes_no_row(monkeypatch, tiny_dataset, tmp_path):
    """Each request's own positive targets are events; whatever they are, the rows are the same."""
    rng = np.random.default_rng(0)

    def dataset(noise):
        class Labelled:
            schema, directory, index = tiny_dataset.schema, tmp_path / "absent", tiny_dataset.index
            fingerprint = {"records": "0"}  # noqa: RUF012

            def __len__(self):
                return 12

            def record(self, i):
                record = tiny_dataset.record(i)
                item = record.history["item"].copy()
                first = record.target_offset[:-1]
                place = np.minimum(record.history_end, len(item) - 1)  # bought at its time
                train = (record.request_split == 0) & (
                    record.event_time[place] == record.request_time
                )
                target = record.target["item"].copy()
                wanted = rng.integers(0, 320, len(first)) if noise else target[first]
                target[first[train]] = item[place[train]] = wanted[train]
                return dataclasses.replace(
                    record, history={**record.history, "item": item}, target={"item": target}
                )

        return Labelled()

    expected = cooccurrence_rows(dataset(False), {"item": 8}, seed=0)
    found = cooccurrence_rows(dataset(True), {"item": 8}, seed=0)
    np.testing.assert_array_equal(found["item"], expected["item"])
    # The test can fail: counting those events changes the rows.
    monkeypatch.setattr(
        cooccurrence, "unlabelled_events", lambda record, item, end: record.event_time < end
    )
    leaking = [cooccurrence_rows(dataset(x), {"item": 8}, seed=0)["item"] for x in (False, True)]
    assert np.abs(leaking[0] - leaking[1]).max() > 1e-3


def test_rows_find_hidden_topics_and_are_kept(tiny_dataset):
    rows = cooccurrence_rows(tiny_dataset, {"category": 8}, seed=0)["category"]
    again = cooccurrence_rows(tiny_dataset, {"category": 8}, seed=0)["category"]
    np.testing.assert_array_equal(rows, again)
    assert list(tiny_dataset.directory.glob("cooccurrence_*.npz"))


def test_large_vocabularies_keep_their_frequent_ids(monkeypatch, tiny_dataset):
    monkeypatch.setattr(cooccurrence, "_MOST_ROWS", 50)
    monkeypatch.setattr(cooccurrence, "_PAIRS_AT_ONCE", 1000)
    rows = cooccurrence_rows(tiny_dataset, {"item": 6}, seed=1)["item"]
    count = np.zeros(len(rows), int)
    for i in range(len(tiny_dataset)):
        np.add.at(count, tiny_dataset.record(i).history["item"], 1)
    known = (rows != 0).any(1)
    assert 40 <= known.sum() <= 50
    assert count[known].mean() > 2 * count[~known].mean()
