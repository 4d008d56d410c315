"""The drawing of batch.py as a test, batches built by hand, and what the validator refuses."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SCHEMA, SHARED_LAYOUT, make_batch, request_batches, spoil_padding

from stca_jax.batch import Request, from_requests, validate_batch

# --- Batches built by hand


def request(**changes):
    """Three events, two targets."""
    values = Request(
        history={"category": [0, 1, 2], "item": [3, 4, 5], "price": [0.5, 1.5, 2.5]},
        history_time=[10, 20, 20],
        time=30,
        targets={"position": [1, 2], "item": [5, 6], "category": [2, 0]},
        labels=[[1, 0], [0, 0]],
        features={"segment": 3, "budget": 9.5},
        user_id=7,
    )
    return dataclasses.replace(values, **changes)


NO_HISTORY = {"history": {"category": [], "item": [], "price": []}, "history_time": []}


def test_from_requests_fills_one_row_per_request():
    batch = from_requests(SCHEMA, [request(), request(**NO_HISTORY)])
    assert (batch.num_rows, batch.row_length, batch.targets_per_row) == (2, 3, 2)
    np.testing.assert_array_equal(batch.history["item"], [[3, 4, 5], [0, 0, 0]])
    np.testing.assert_array_equal(batch.history["price"][0], np.float32([0.5, 1.5, 2.5]))
    np.testing.assert_array_equal(batch.history_time[0], [10, 20, 20])
    np.testing.assert_array_equal(batch.target["item"][1], [5, 6])
    np.testing.assert_array_equal(batch.request["budget"], np.full((2, 2), 9.5))
    np.testing.assert_array_equal(batch.request_time, np.full((2, 2), 30))
    np.testing.assert_array_equal(batch.history_start, np.zeros((2, 2)))
    np.testing.assert_array_equal(batch.history_end, [[3, 3], [0, 0]])
    np.testing.assert_array_equal(batch.label[0], [[1, 0], [0, 0]])
    np.testing.assert_array_equal(batch.request_id, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(batch.user_id, np.full((2, 2), 7))
    np.testing.assert_array_equal(batch.num_request_targets, np.full((2, 2), 2))
    assert batch.target_mask.all()
    assert not batch.shared_history


def test_from_requests_pads_to_the_given_sizes():
    batch = from_requests(SCHEMA, [request()], row_length=5, targets_per_row=4)
    np.testing.assert_array_equal(batch.target_mask, [[True, True, False, False]])
    np.testing.assert_array_equal(batch.history_end, [[3, 3, 0, 0]])
    np.testing.assert_array_equal(batch.history["item"], [[3, 4, 5, 0, 0]])


@pytest.mark.parametrize(("max_history", "items"), [(2, [4, 5]), (0, [0]), (9, [3, 4, 5])])
def test_from_requests_keeps_the_most_recent_events(max_history, items):
    batch = from_requests(SCHEMA, [request()], max_history=max_history)
    np.testing.assert_array_equal(batch.history["item"], [items])
    assert batch.history_end[0, 0] == min(max_history, 3)


def test_from_requests_takes_flat_labels_of_a_single_task():
    schema = dataclasses.replace(SCHEMA, tasks=("click",))
    batch = from_requests(schema, [request(labels=[1, 0])])
    np.testing.assert_array_equal(batch.label, [[[1], [0]]])


def changed(level, **columns):
    return {level: getattr(request(), level) | columns}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "request 1 has no labels; it needs at least one target"),
        ({"labels": [1, 0]}, r"request 1: labels has shape \(2,\), expected \(2, 2\)"),
        (
            {"labels": [[1, 0], [2, 0]]},
            r"labels must be 0 or 1, or NaN where one is missing; found label=\[2\. 0\.\] at row 1",
        ),
        ({"labels": [[1, 0], [np.inf, 0]]}, "labels must be 0 or 1, or NaN"),
        ({"history": {"item": [1, 2, 3], "price": [1, 2, 3]}}, "history lacks 'category'; it has"),
        ({"targets": {"item": [1, 2]}}, r"targets lacks 'position'; it has \['item'\]"),
        ({"features": {"budget": 1}}, "features lacks 'segment'"),
        (changed("history", item=[1, 2]), r"history 'item' has shape \(2,\), expected \(3,\)"),
        (changed("targets", item=[1]), r"targets 'item' has shape \(1,\), expected \(2,\)"),
        (changed("features", segment=[1]), r"features 'segment' has shape \(1,\), expected \(\)"),
        (changed("history", item=[1, 2, 7]), r"history feature 'item': ids must be in \[0, 7\); "
         "found item=7 at row 1, position 2"),
        (changed("targets", item=[-1, 0]), r"target feature 'item': .* found item=-1 at row 1"),
        (changed("features", segment=4), r"request feature 'segment': .* found segment=4"),
        (changed("history", item=[1, 2, 3.5]), "whole numbers that fit int32; found 3.5"),
        (changed("history", item=[1, np.nan, 3]), "whole numbers that fit int32; found nan"),
        (changed("targets", item=["a", "b"]), "targets 'item' has dtype <U1, expected numbers"),
        (changed("history", price=[1, np.inf, 3]), "'price': numbers must be finite; found price="),
        (changed("features", budget=np.nan), "'budget': numbers must be finite; found budget=nan"),
        ({"history_time": [10, 30, 20], "time": 40}, "must not decrease: sort the log"),
        ({"history_time": [-1, 0, 1]}, "seconds since the dataset's origin, >= 0; found .*=-1"),
        ({"time": 20}, "must end strictly before its request; found last_event_time=20, "
         "request_time=20 at row 1"),
        ({"history_time": [10, 20, 1_700_000_000_000]},
         "request 1: history_time must be whole numbers that fit int32; found 1700000000000"),
        ({"time": 1_700_000_000_000}, "request 1: time must be whole numbers that fit int32"),
        ({"user_id": 2**31}, "request 1: user_id must be whole numbers that fit int32"),
    ],
)  # fmt: skip
def test_from_requests_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        from_requests(SCHEMA, [request(), request(**changes)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 2}, "request 0 has 3 events but row_length is 2; pass max_history or"),
        ({"targets_per_row": 1}, "request 0 has 2 targets but targets_per_row is 1"),
    ],
)
def test_from_requests_rejects_rows_that_are_too_small(options, message):
    with pytest.raises(ValueError, match=message):
        from_requests(SCHEMA, [request()], **options)


def test_from_requests_needs_a_request():
    with pytest.raises(ValueError, match="needs at least one request, got none"):
        from_requests(SCHEMA, [])


# --- The validator


@settings(deadline=None, max_examples=50)
@given(st.booleans().flatmap(lambda s: request_batches(shared=s)), st.integers(0, 2**32 - 1))
def test_valid_batches_pass_whatever_stands_in_padding(batch, seed):
    validate_batch(batch, SCHEMA)
    validate_batch(spoil_padding(batch, seed), SCHEMA)


def spoiled(field, place, value):
    """A valid batch with one value changed; its slots and tokens are in use."""
    batch = make_batch(SHARED_LAYOUT, shared=True)
    column = batch
    for part in field.split("."):
        column = column[part] if isinstance(column, dict) else getattr(column, part)
    column[place] = value
    return batch


# In row 0, targets 0 and 1 read tokens [0, 9), target 2 reads [0, 14), targets 3 and 4 [5, 17).
@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("history_start", (0, 2), -1, "0 <= start <= end <= row length 24; found "
         "history_start=-1, history_end=14 at row 0, position 2"),
        ("history_start", (0, 2), 15, "found history_start=15, history_end=14"),
        ("history_end", (2, 0), 25, "found history_start=0, history_end=25 at row 2, position 0"),
        ("label", (1, 0, 1), 0.5, "labels must be 0 or 1, .*; found .* at row 1, position 0"),
        ("label", (1, 0, 1), -np.inf, "labels must be 0 or 1"),
        ("num_request_targets", (1, 0), 0, "a request has at least one target; found .*=0"),
        ("history.item", (0, 16), 7, r"history feature 'item': ids must be in \[0, 7\); found "
         "item=7 at row 0, position 16"),
        ("history.price", (0, 16), np.nan, "history feature 'price': numbers must be finite"),
        ("target.category", (0, 4), -1, r"target feature 'category': ids must be in \[0, 3\)"),
        ("request.segment", (0, 4), 4, r"request feature 'segment': ids must be in \[0, 4\)"),
        ("history_time", (0, 0), -5, "origin, >= 0; found history_time=-5 at row 0, position 0"),
        ("history_time", (0, 1), 2**31 - 1, "must not decrease: sort the log; found "
         "history_start=0, history_end=9"),
        ("request_time", (0, 3), 0, "strictly before its request; found .*request_time=0 at row 0"),
    ],
)  # fmt: skip
def test_validator_names_the_value_and_its_place(field, place, value, message):
    with pytest.raises(ValueError, match=message):
        validate_batch(spoiled(field, place, value), SCHEMA)


def test_times_may_fall_between_ranges():
    """The next user of a row may have started earlier."""
    batch = make_batch(SHARED_LAYOUT, shared=True)
    batch.history_time[0, 18:24] = 0
    validate_batch(batch, SCHEMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_time": np.zeros((3, 7), np.int32)}, r"request_time has shape \(3, 7\), expected "
         r"\(3, 8\)"),
        ({"label": np.zeros((3, 8, 1), np.float32)}, r"label has shape .*, expected \(3, 8, 2\)"),
        ({"history_time": np.zeros((3, 24), np.int64)}, "history_time has dtype int64, expected "
         "int32"),
        ({"target_mask": np.ones((3, 8), np.int32)}, "target_mask has dtype int32, expected bool"),
        ({"request": {}}, r"request has features \[\], expected \['budget', 'segment'\]"),
    ],
)  # fmt: skip
def test_validator_rejects_arrays_of_another_kind(changes, message):
    batch = make_batch(SHARED_LAYOUT, shared=True)
    with pytest.raises(ValueError, match=message):
        validate_batch(batch.replace(**changes), SCHEMA)


@pytest.mark.parametrize(
    ("level", "name", "dtype", "message"),
    [
        ("history", "item", np.float32, r"history\['item'\] has dtype float32, expected int32"),
        ("target", "position", np.int32, r"target\['position'\] has dtype int32, expected float32"),
    ],
)
def test_validator_rejects_features_of_another_kind(level, name, dtype, message):
    batch = make_batch(SHARED_LAYOUT, shared=True)
    features = dict(getattr(batch, level))
    features[name] = features[name].astype(dtype)
    with pytest.raises(ValueError, match=message):
        validate_batch(batch.replace(**{level: features}), SCHEMA)


def test_exclusive_rows_share_no_token():
    """Token features that depend on the request would be silently wrong."""
    batch = make_batch(SHARED_LAYOUT, shared=True)
    with pytest.raises(ValueError, match="shared_history is False, but another request reads"):
        validate_batch(batch.replace(shared_history=False), SCHEMA)


@pytest.mark.parametrize(
    ("ends", "times", "is_wrong"),
    [
        ((6, 6), (9, 9), False),
        ((6, 4), (9, 9), True),  # of one time, but the second does not read the last tokens
        ((6, 6), (9, 8), True),
        ((6, 4), (9, 8), True),
    ],
)
def test_exclusive_ranges_that_overlap_end_alike_at_one_time(ends, times, is_wrong):
    batch = from_requests(SCHEMA, [request()], row_length=6)
    batch.history_time[:] = np.arange(6)
    changed = {"history_end": np.array([ends]), "request_time": np.array([times])}
    batch = batch.replace(**{n: v.astype(np.int32) for n, v in changed.items()})
    if is_wrong:
        with pytest.raises(ValueError, match="another request reads tokens of this range"):
            validate_batch(batch, SCHEMA)
    else:
        validate_batch(batch, SCHEMA)


# --- Covered tokens


@settings(deadline=None, max_examples=30)
@given(request_batches(shared=True))
def test_covered_tokens_is_the_union_of_ranges(batch):
    expected = np.zeros((3, 24), bool)
    for row, slot in np.ndindex(3, 8):
        expected[row, batch.history_start[row, slot] : batch.history_end[row, slot]] = True
    found = batch.ranges.covered(24)
    np.testing.assert_array_equal(found, expected)
