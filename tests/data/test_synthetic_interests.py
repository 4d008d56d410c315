import dataclasses
import itertools
import math
import pathlib

import numpy as np
import pytest
import sklearn.metrics

from stca_jax.data.synthetic_interests import generator
from stca_jax.data.synthetic_interests.generator import CONFIGS, GeneratorConfig
from stca_jax.data.synthetic_interests.synthetic_interests_dataset_builder import (
    Builder,
    SyntheticInterestsConfig,
)
from stca_jax.data.synthetic_interests.truth import reference_rows
from stca_jax.data.synthetic_interests.users import make_schema
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import SPLITS, validate_record

TINY = CONFIGS["tiny"]


def build(folder: pathlib.Path, config=None) -> pathlib.Path:
    builder = Builder(data_dir=folder, config=config)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


@pytest.fixture(scope="module")
def records():
    return list(generator.generate_users(TINY))


@pytest.fixture(scope="module")
def many_records():
    """Enough targets for statistics: standard errors below 0.01."""
    return list(generator.generate_users(dataclasses.replace(TINY, num_users=300)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return RequestDataset(build(tmp_path_factory.mktemp("data"), "tiny"))


@pytest.fixture(scope="module")
def catalogue():
    return generator.make_catalogue(TINY)


def test_records_are_valid(records):
    schema = make_schema(TINY)
    for record in records:
        validate_record(record, schema)
    assert [r.user_id for r in records] == list(range(TINY.num_users))
    ids = np.concatenate([r.request_id for r in records])
    np.testing.assert_array_equal(ids, np.arange(len(ids)))


def test_a_request_sees_exactly_the_events_before_it(records):
    for record in records:
        earlier = record.event_time[None] < record.request_time[:, None]
        np.testing.assert_array_equal(record.history_end, earlier.sum(1))


def test_a_request_knows_how_many_events_came_before(records):
    """Where the config says so; nothing else of the records changes."""
    config = dataclasses.replace(TINY, counts_events=True)
    assert make_schema(TINY).request == ()
    assert make_schema(config).request == ("user_events_720d",)
    for record, counting in zip(records[:20], generator.generate_users(config), strict=False):
        earlier = [(record.event_time < t).sum() for t in record.request_time]
        np.testing.assert_allclose(
            counting.request["user_events_720d"], np.log1p(earlier) / 2, rtol=1e-6
        )
        np.testing.assert_array_equal(counting.label, record.label)
        np.testing.assert_array_equal(counting.history["item"], record.history["item"])
    assert "user_events_720d" not in records[0].request


def test_candidates_of_a_request_are_distinct(records):
    for record in records:
        for start, end in itertools.pairwise(record.target_offset):
            assert len(set(record.target["item"][start:end])) == end - start
            assert end - start <= TINY.targets_per_request


def test_log_lengths_follow_the_config():
    config = dataclasses.replace(TINY, num_users=300, events_per_request=512)
    lengths = [len(r.event_time) for r in generator.generate_users(config)]
    assert min(lengths) >= TINY.min_events
    assert max(lengths) <= TINY.max_events
    # Zipf's law is uniform in the logarithm: a third of the lengths in each of three octaves.
    share = np.histogram(np.log2(lengths), bins=[6, 7, 8, 9])[0] / len(lengths)
    np.testing.assert_allclose(share, 1 / 3, atol=0.08)


def test_splits_are_by_time(records):
    time = np.concatenate([r.request_time for r in records])
    split = np.concatenate([r.request_split for r in records])
    assert np.all((time < TINY.validation_start) == (split == SPLITS.index("train")))
    assert np.all((time >= TINY.test_start) == (split == SPLITS.index("test")))
    assert set(split) == {0, 1, 2}


def test_catalogue_is_a_tree_of_the_schema_s_size(catalogue):
    schema = make_schema(TINY)
    assert schema.vocabularies == {
        "item": len(catalogue.category_of_item),
        "category": len(catalogue.topic_of_category),
    }
    np.testing.assert_array_equal(np.bincount(catalogue.category_of_item), TINY.items_per_category)
    np.testing.assert_array_equal(
        np.bincount(catalogue.topic_of_category), TINY.categories_per_topic
    )
    for topic, categories in enumerate(catalogue.categories):
        assert set(catalogue.topic_of_category[categories]) == {topic}
    for category, items in enumerate(catalogue.items):
        assert set(catalogue.category_of_item[items]) == {category}


def test_default_and_long_share_a_catalogue():
    ours, theirs = (generator.make_catalogue(CONFIGS[n]) for n in ("default", "long"))
    np.testing.assert_array_equal(ours.category_of_item, theirs.category_of_item)
    np.testing.assert_array_equal(ours.topic_of_category, theirs.topic_of_category)


def test_a_user_does_not_depend_on_how_many_there_are(records):
    fewer = list(generator.generate_users(dataclasses.replace(TINY, num_users=3)))
    np.testing.assert_array_equal(fewer[2].history["item"], records[2].history["item"])
    np.testing.assert_array_equal(fewer[2].label, records[2].label)


def test_seeds_differ():
    first, second = (
        next(generator.generate_users(dataclasses.replace(TINY, seed=seed))) for seed in (0, 1)
    )
    assert not np.array_equal(first.request_time, second.request_time)


def brute_force_logit(record, catalogue, target, max_history):
    """The module's formula, event by event, for one target."""
    request = np.searchsorted(record.target_offset, target, side="right") - 1
    end = int(record.history_end[request])
    window = range(0 if max_history is None else max(0, end - max_history), end)

    def values(features, i):
        category = int(features["category"][i])
        topic = int(catalogue.topic_of_category[category])
        return {"item": int(features["item"][i]), "category": category, "topic": topic}

    sizes = {"item": 8 * 4 * 10, "category": 8 * 4, "topic": 8}
    wanted = values(record.target, target)
    logit = generator.BIAS
    for term in generator.TERMS:
        matches = total = 0.0
        for j in window:
            days = (int(record.request_time[request]) - int(record.event_time[j])) / 86_400
            weight = math.exp(-days / term.decay_days)
            total += weight
            matches += weight * (values(record.history, j)[term.field] == wanted[term.field])
        logit += term.weight * (math.log1p(matches) - math.log1p(total / sizes[term.field]))
    return logit


@pytest.mark.parametrize("max_history", [None, 0, 1, 50, 10_000])
def test_true_logit_is_the_formula(records, catalogue, max_history):
    record = records[1]
    found = generator.true_logit(record, catalogue, max_history)
    targets = np.random.default_rng(0).choice(len(found), 10, replace=False)
    expected = [brute_force_logit(record, catalogue, t, max_history) for t in targets]
    np.testing.assert_allclose(found[targets], expected, rtol=1e-12)


def test_true_logit_reads_only_the_window(records, catalogue):
    record, length = records[1], 20
    before = int(record.history_end[-1]) - length
    item = record.history["item"].copy()
    item[:before] = (item[:before] + 1) % len(catalogue.category_of_item)
    other = dataclasses.replace(
        record, history={"item": item, "category": catalogue.category_of_item[item]}
    )
    last = slice(record.target_offset[-2], None)
    found, expected = (generator.true_logit(r, catalogue, length)[last] for r in (other, record))
    np.testing.assert_array_equal(found, expected)
    whole, changed = (generator.true_logit(r, catalogue)[last] for r in (record, other))
    assert not np.allclose(whole, changed)


def test_labels_have_the_true_probability(many_records, catalogue):
    logit = np.concatenate([generator.true_logit(r, catalogue) for r in many_records])
    label = np.concatenate([r.label[:, 0] for r in many_records])
    probability = 1 / (1 + np.exp(-logit))
    for which in np.array_split(np.argsort(logit), 10):
        p = probability[which]
        error = np.sqrt((p * (1 - p)).sum()) / len(which)
        assert abs(label[which].mean() - p.mean()) < 4 * error


def test_longer_windows_rank_better(tmp_path):
    config = dataclasses.replace(TINY, num_users=400)
    folder = build(tmp_path, SyntheticInterestsConfig(name="more_users", generator=config))
    rows = reference_rows(RequestDataset(folder), [8, 32, 128, 512])
    truth = np.array([row["truth"] for row in rows])
    assert np.all(np.diff(truth) > 0.005)
    assert truth[0] < 0.65
    assert truth[-1] > 0.78
    for row in rows:
        # Counting sees one of the terms, the logistic regression all but topics.
        assert row["counting"] < row["logistic"] < row["truth"]
        assert row["refitted"] == pytest.approx(row["truth"], abs=0.01)


def test_reference_rows_score_the_test_requests(dataset, catalogue):
    (row,) = reference_rows(dataset, [64])
    label, logit = [], []
    for record in map(dataset.record, range(len(dataset))):
        for k in np.flatnonzero(record.request_split == SPLITS.index("test")):
            targets = slice(record.target_offset[k], record.target_offset[k + 1])
            label.extend(record.label[targets, 0])
            logit.extend(generator.true_logit(record, catalogue, 64)[targets])
    assert row["truth"] == pytest.approx(sklearn.metrics.roc_auc_score(label, logit), abs=1e-6)


def test_a_user_with_almost_no_events():
    config = dataclasses.replace(TINY, num_users=20, min_events=1, max_events=2)
    schema, catalogue = make_schema(config), generator.make_catalogue(config)
    for record in generator.generate_users(config):
        validate_record(record, schema)
        assert np.isfinite(generator.true_logit(record, catalogue)).all()


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="num_users is 0; it must be at least 1"):
        dataclasses.replace(TINY, num_users=0)
    with pytest.raises(ValueError, match="min_events 600 is above max_events 512"):
        dataclasses.replace(TINY, min_events=600)


def test_another_catalogue_is_refused(records, catalogue):
    for other in (
        dataclasses.replace(TINY, seed=1),
        dataclasses.replace(TINY, items_per_category=1),
    ):
        with pytest.raises(ValueError, match="not those of this catalogue"):
            generator.true_logit(records[0], generator.make_catalogue(other))
    with pytest.raises(ValueError, match="max_history is -1"):
        generator.true_logit(records[0], catalogue, -1)


def test_builds_are_equal_byte_for_byte(tmp_path, dataset):
    folder = build(tmp_path, "tiny")
    names = sorted(p.name for p in folder.glob("*.array_record*"))
    assert names
    for name in names:
        assert (folder / name).read_bytes() == (dataset.directory / name).read_bytes()


def test_builder_writes_the_generated_users(dataset, records):
    assert len(dataset) == len(records)
    assert dataset.schema == make_schema(TINY)
    for i in (0, 50, 95):
        found, expected = dataset.record(i), records[i]
        np.testing.assert_array_equal(found.event_time, expected.event_time)
        np.testing.assert_array_equal(found.history["item"], expected.history["item"])
        np.testing.assert_array_equal(found.target["category"], expected.target["category"])
        np.testing.assert_array_equal(found.request_split, expected.request_split)
        np.testing.assert_array_equal(found.label, expected.label)


def test_metadata_are_enough_to_rebuild_the_truth(tmp_path):
    config = SyntheticInterestsConfig(
        name="mine", generator=dataclasses.replace(TINY, num_users=4, seed=7)
    )
    dataset = RequestDataset(build(tmp_path, config))
    generator_config = GeneratorConfig(**dataset.metadata["notes"]["generator"])
    catalogue = generator.make_catalogue(generator_config)
    expected = next(generator.generate_users(config.generator))
    np.testing.assert_array_equal(
        generator.true_logit(dataset.record(0), catalogue),
        generator.true_logit(expected, catalogue),
    )


def test_default_config_is_the_first():
    assert next(iter(Builder.builder_configs)) == "default"
