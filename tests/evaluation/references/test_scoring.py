"""Label rates against plain loops, and the references of prepared datasets."""

import dataclasses

import numpy as np
import pytest
import small_dataset

from stca_jax.evaluation import metrics
from stca_jax.evaluation.references import boosted
from stca_jax.evaluation.references.history import read_targets
from stca_jax.evaluation.references.label_rates import USER, read_label_rates
from stca_jax.evaluation.references.scoring import ReferenceOptions, evaluate_references
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import SPLITS


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Random users; item, hour, two labels."""
    builder = small_dataset.Builder(data_dir=tmp_path_factory.mktemp("small"))
    builder.download_and_prepare()
    return RequestDataset(builder.data_path)


def with_labels(dataset, change):
    """The same dataset whose records' labels are `change(record)`."""
    other = RequestDataset(dataset.directory)

    def record(i):
        found = dataset.record(i)
        return dataclasses.replace(found, label=change(found))

    other.record = record
    return other


def all_targets(dataset):
    """User, time, item, hour, labels, whether in training, of every target of the records."""
    for user in range(len(dataset)):
        record = dataset.record(user)
        request = np.repeat(np.arange(len(record.request_id)), np.diff(record.target_offset))
        for target, k in enumerate(request):
            yield (
                record.user_id,
                int(record.request_time[k]),
                int(record.target["item"][target]),
                int(record.request["hour"][k]),
                record.label[target],
                record.request_split[k] == SPLITS.index("train"),
            )


@pytest.mark.parametrize("task", [0, 1])
def test_label_rates_are_those_of_a_loop_over_all_pairs(two_tasks, task):
    rates = read_label_rates(two_tasks, two_tasks.index.of_split("train"), task)
    assert list(rates.fields) == [USER, "item", "hour"]
    found = np.concatenate([rates.features(t) for t in read_targets(two_tasks, two_tasks.index)])
    targets = list(all_targets(two_tasks))
    seen = [t for t in targets if t[5]]
    overall = np.mean([t[4][task] for t in seen])
    expected = []
    for target in targets:
        row = []
        for field in (0, 2, 3):
            earlier = [t for t in seen if t[1] < target[1] and t[field] == target[field]]
            positive = sum(t[4][task] for t in earlier)
            rate = (positive + 20 * overall) / (len(earlier) + 20)
            row += [np.log(rate / (1 - rate)), np.log1p(len(earlier))]
        expected.append(row)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_target_does_not_see_the_labels_of_its_request_or_of_later_ones(two_tasks):
    training = two_tasks.index.of_split("train")
    middle = int(np.median(training.request_time))

    def flip_late(record):
        late = np.repeat(record.request_time >= middle, np.diff(record.target_offset))
        return np.where(late[:, None], 1 - record.label, record.label)

    flipped = with_labels(two_tasks, flip_late)
    rates = [
        dataclasses.replace(read_label_rates(dataset, training, 0), overall=0.5)
        for dataset in (two_tasks, flipped)
    ]
    early, late_differs = 0, False
    for targets in read_targets(two_tasks, training):
        first, second = (r.features(targets) for r in rates)
        time = np.repeat(targets.view.request_time, np.diff(targets.view.target_offset))
        np.testing.assert_array_equal(first[time <= middle], second[time <= middle])
        early += (time <= middle).sum()
        late_differs |= not np.array_equal(first, second)
    assert early
    assert late_differs


def test_no_rates_where_negatives_are_drawn_for_positives(two_tasks):
    training = two_tasks.index.of_split("train")

    def one_in_each_request(record):
        label = np.zeros_like(record.label)
        label[record.target_offset[:-1]] = 1
        return label

    # Requests have 1 to 4 targets, so shares differ; then all have the same.
    assert read_label_rates(with_labels(two_tasks, one_in_each_request), training, 0).fields
    four = training.select(training.num_targets == 4)
    drawn = read_label_rates(with_labels(two_tasks, one_in_each_request), four, 0)
    assert not drawn.fields
    assert drawn.features(next(read_targets(two_tasks, four))).shape[1] == 0


def scored(dataset, **changes):
    reports = []
    splits = (dataset.index.of_split(split) for split in ("train", "test"))
    rows = evaluate_references(
        dataset, *splits, [16, 256], ReferenceOptions(**changes), reports.append
    )
    return {(row["model"], row.get("task"), row["length"]): row for row in rows}, reports


def test_every_reference_at_every_length(tiny_dataset):
    rows, reports = scored(tiny_dataset)
    models = {"counting", "logistic", "boosted"}
    assert set(rows) == {(model, None, length) for model in models for length in (16, 256)}
    assert "training targets" in reports[0]
    assert len(reports) == 1
    label, counts = [], []
    for t in read_targets(tiny_dataset, tiny_dataset.index.of_split("test")):
        label += t.label[:, 0].tolist()
        for k, end in enumerate(t.view.history_end):
            window = t.view.event_ids["item"][max(end - 256, 0) : end]
            of_request = slice(t.view.target_offset[k], t.view.target_offset[k + 1])
            counts += [(window == item).sum() for item in t.view.target_ids["item"][of_request]]
    expected = metrics.auc(np.array(label), np.array(counts, np.float32))
    assert rows["counting", None, 256]["auc"] == expected
    assert "log_loss" not in rows["counting", None, 256]
    for model in models:
        assert rows[model, None, 256]["auc"] > rows[model, None, 16]["auc"]
        assert rows[model, None, 256]["num_targets"] == len(label)
    assert rows["logistic", None, 256]["auc"] > expected


def test_fits_are_kept_and_a_damaged_one_is_made_again(tiny_dataset, monkeypatch):
    first, _ = scored(tiny_dataset, max_training_targets=3_000)
    for path in (tiny_dataset.directory / "references").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    assert scored(tiny_dataset, max_training_targets=3_000)[0] == first
    monkeypatch.setattr(boosted, "fit_boosted", None)  # must not be called again
    third, reports = scored(tiny_dataset, max_training_targets=3_000)
    assert third == first
    assert len(reports) == 1


def test_several_tasks_each_have_their_rows(two_tasks):
    rows, _ = scored(two_tasks)
    assert {task for _, task, _ in rows} == {"click", "buy"}
    assert {model for model, _, _ in rows} == {"counting", "logistic", "boosted"}


def test_one_class_is_said_in_a_line_and_counting_is_still_there(two_tasks):
    one_class = with_labels(two_tasks, lambda record: record.label * np.float32([0, 1]))
    rows, reports = scored(one_class, max_training_targets=60)
    assert {model for model, task, _ in rows if task == "click"} == {"counting"}
    assert {model for model, task, _ in rows if task == "buy"} >= {"counting", "logistic"}
    assert any("for click: all" in line and "labels are negative" in line for line in reports)


def test_without_lightgbm_one_sentence_says_how_to_get_it(tiny_dataset, monkeypatch):
    monkeypatch.setattr(boosted, "is_installed", lambda: False)
    rows, reports = scored(tiny_dataset)
    assert {model for model, _, _ in rows} == {"counting", "logistic"}
    assert reports[0] == boosted.HOW_TO_INSTALL


def test_trees_find_what_a_line_cannot():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8_000, 3)).astype(np.float32)
    features[:, 2] = rng.integers(0, 5, 8_000)
    logit = 2 * np.sign(features[:, 0] * features[:, 1]) + (features[:, 2] == 3)
    label = (rng.random(8_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    user = rng.integers(0, 100, 8_000)
    is_categorical = np.array([False, False, True])
    train, test = slice(6_000), slice(6_000, None)
    model = boosted.fit_boosted(features[train], label[train], user[train], is_categorical)
    found = metrics.auc(label[test], model.logit(features[test]))
    truth = metrics.auc(label[test], logit[test].astype(np.float32))
    assert truth - 0.03 < found <= truth + 0.01
    with pytest.raises(ValueError, match="both present"):
        boosted.fit_boosted(features, np.zeros(8_000), user, is_categorical)
