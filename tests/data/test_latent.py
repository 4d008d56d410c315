"""The generator of interests in a latent space, against its formulas."""

import math

import numpy as np
import pytest
import sklearn.metrics

from stca_jax.data.synthetic_interests import latent
from stca_jax.data.synthetic_interests.users import make_schema
from stca_jax.input.records import validate_record
from stca_jax.schema import SECONDS_PER_DAY

CONFIG = latent.LatentConfig(
    num_users=40, min_events=64, max_events=512, events_per_request=32, num_items=256,
    num_dimensions=16, counts_events=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def catalogue():
    return latent.make_latent_catalogue(CONFIG)


@pytest.fixture(scope="module")
def records():
    return list(latent.generate_latent_users(CONFIG))


def lift(record, request, target, vectors, chance, decay_days, window):
    """The module's formula, event by event."""
    end = record.history_end[request]
    weighted, total = 0.0, 0.0
    for j in range(max(0, end - window), end):
        age = (record.request_time[request] - record.event_time[j]) / SECONDS_PER_DAY
        weight = math.exp(-age / decay_days)
        dot = float(vectors[target] @ vectors[record.history["item"][j]])
        weighted += weight * math.exp(5.0 * dot) / chance
        total += weight
    return math.log(10.0 + weighted) - math.log(10.0 + total)


def test_records_are_valid(records):
    for record in records:
        validate_record(record, make_schema(CONFIG))
    again = list(latent.generate_latent_users(CONFIG))
    np.testing.assert_array_equal(again[3].label, records[3].label)


@pytest.mark.parametrize("window", [20, None])
def test_lifts_are_the_formula(records, catalogue, window):
    vectors = catalogue.vectors.astype(np.float64)
    pairs = np.exp(5.0 * vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
    for record in records[:3]:
        found = latent.latent_lifts(record, catalogue, window)
        for k in (0, len(record.history_end) - 1):
            slot = record.target_offset[k]
            target = record.target["item"][slot]
            expected = [
                lift(record, k, target, vectors, pairs.mean(), days, window or 10**6)
                for days in (math.inf, 28.0, 1.0)
            ]
            np.testing.assert_allclose(found[slot], expected, rtol=1e-4, atol=1e-5)


def test_labels_have_the_true_probability(records, catalogue):
    logit = np.concatenate([latent.latent_logit_of(latent.latent_lifts(r, catalogue))
                            for r in records])  # fmt: skip
    label = np.concatenate([r.label[:, 0] for r in records])
    probability = 1 / (1 + np.exp(-logit))
    error = np.sqrt((probability * (1 - probability)).sum())
    assert abs(label.sum() - probability.sum()) < 4 * error


def test_fewer_dimensions_know_less(records, catalogue):
    label = np.concatenate([r.label[:, 0] for r in records])

    def auc(known):
        lifts = [latent.latent_lifts(r, known) for r in records]
        return sklearn.metrics.roc_auc_score(label, np.concatenate(lifts)[:, 0])

    aucs = [auc(catalogue.projected(4)), auc(catalogue.projected(10)), auc(catalogue)]
    assert aucs[0] + 0.02 < aucs[1]
    assert aucs[1] + 0.02 < aucs[2]


def test_what_is_alike_is_met_within_a_session(records, catalogue):
    def alike(apart):
        found = []
        for record in records:
            vectors = catalogue.vectors[record.history["item"]]
            found.append((vectors[apart:] * vectors[:-apart]).sum(-1))
        return np.concatenate(found).mean()

    assert alike(1) > 2 * alike(60) > 0
