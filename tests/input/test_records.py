"""User records: the way to disk and back, and what a builder may not write."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SCHEMA

from stca_jax.input.records import UserRecord, decode_record, encode_record, validate_record


def make_record(num_events=6, num_targets=(2, 1, 3), seed=0):
    """Requests at the end of, within and before the log."""
    rng = np.random.default_rng(seed)
    q, t = len(num_targets), sum(num_targets)
    event_time = np.sort(rng.integers(0, 50, num_events)).astype(np.int32)
    request_time = np.sort(rng.integers(0, 60, q)).astype(np.int32)

    def features(names, size):
        return {
            name: rng.integers(0, SCHEMA.vocabularies[name], size).astype(np.int32)
            if SCHEMA.is_categorical(name)
            else rng.normal(size=size).astype(np.float32)
            for name in names
        }

    return UserRecord(
        user_id=seed,
        event_time=event_time,
        history=features(SCHEMA.history, num_events),
        request_id=np.arange(100, 100 + q, dtype=np.int32),
        request_time=request_time,
        request_split=np.arange(q, dtype=np.int32) % 3,
        history_end=np.searchsorted(event_time, request_time).astype(np.int32),
        target_offset=np.cumsum([0, *num_targets]).astype(np.int32),
        request=features(SCHEMA.request, q),
        target=features(SCHEMA.target, t),
        label=rng.integers(0, 2, (t, 2)).astype(np.float32),
    )


def assert_same_record(found, expected):
    for field in dataclasses.fields(UserRecord):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        for name in a if isinstance(a, dict) else [None]:
            column, other = (a, b) if name is None else (a[name], b[name])
            np.testing.assert_array_equal(column, other)
            assert np.asarray(column).dtype == np.asarray(other).dtype, (field.name, name)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.lists(st.integers(1, 4), max_size=5), st.integers(0, 2**31 - 1))
def test_round_trip(num_events, num_targets, seed):
    record = make_record(num_events, num_targets, seed)
    validate_record(record, SCHEMA)
    encoded = encode_record(record, SCHEMA)
    assert {encoded[name].dtype for name in ("events", "requests", "targets")} == {np.dtype("i4")}
    assert_same_record(decode_record(encoded, SCHEMA), record)


def test_encoding_follows_the_schema_not_the_dtypes():
    """A builder's int labels, int prices and int64 ids come back as float32 and int32."""
    record = make_record()
    whole = dataclasses.replace(
        record, history=record.history | {"price": np.arange(6, dtype=np.float32)}
    )
    careless = dataclasses.replace(
        whole,
        event_time=whole.event_time.astype(np.int64),
        history=whole.history
        | {"price": np.arange(6), "item": whole.history["item"].astype(np.int64)},
        label=whole.label.astype(np.int32),
    )
    validate_record(careless, SCHEMA)
    assert_same_record(decode_record(encode_record(careless, SCHEMA), SCHEMA), whole)


def test_decoded_columns_are_views():
    encoded = encode_record(make_record(), SCHEMA)
    record = decode_record(encoded, SCHEMA)
    assert np.shares_memory(record.history["price"], encoded["events"])
    assert np.shares_memory(record.label, encoded["targets"])


def with_value(column, index, value):
    """A change of one entry of a column, or of `level.column`."""

    def change(record):
        level, _, name = column.rpartition(".")
        features = getattr(record, level) if level else {name: getattr(record, name)}
        wider = np.int64 if features[name].dtype.kind == "i" else np.float64
        values = features[name].astype(wider)
        values[index] = value
        return {level: features | {name: values}} if level else {name: values}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("event_time", 0, -1), r"user 0: event_time is negative; .* at index 0"),
        (with_value("event_time", 2, 99), r"event_time decreases; sort the log .* at index 2"),
        (with_value("event_time", 5, 2**31), "event_time does not fit int32 .* at index 5"),
        (with_value("request_time", 0, 99), "request_time decreases; sort requests by time"),
        (with_value("history_end", 1, 7), r"history_end is outside \[0, 6\] \(first at index 1\)"),
        (with_value("history_end", 0, 6), "history_end includes an event not before the request"),
        (with_value("request_split", 2, 3), "request_split is not in .*'train'.* at index 2"),
        (with_value("target_offset", 0, 1), "target_offset must run from 0 to 6"),
        (with_value("target_offset", 3, 5), "target_offset must run from 0 to 6"),
        (with_value("target_offset", 1, 3), "target_offset gives a request no target .* index 1"),
        (with_value("label", (4, 1), 0.5), r"label is not 0, 1 or missing \(first at index 4\)"),
        (with_value("label", (4, 1), np.inf), r"label is not 0, 1 or missing \(first at index 4\)"),
        (with_value("history.item", 3, 7), r"history feature 'item' has an id outside \[0, 7\)"),
        (with_value("target.category", 3, -1), r"target feature 'category' has an id outside"),
        (with_value("request.budget", 1, np.inf), "request feature 'budget' is not finite"),
        (lambda r: {"label": r.label[:, 0]}, r"label has shape \(6,\), not \(6, 2\)"),
        (lambda r: {"history_end": r.history_end[:2]}, r"history_end has shape \(2,\), not \(3,\)"),
        (lambda r: {"target_offset": r.target_offset[1:]}, r"target_offset has shape \(3,\)"),
        (lambda r: {"event_time": r.event_time.astype(float)}, "event_time has dtype float64"),
        (lambda r: {"history": r.history | {"item": np.zeros(5, int)}}, r"'item' has shape \(5,\)"),
        (lambda r: {"history": r.history | {"item": np.ones(6)}}, "'item' has dtype float64"),
    ],
)
def test_validator_rejects(change, message):
    record = make_record()
    validate_record(record, SCHEMA)
    with pytest.raises(ValueError, match=message):
        validate_record(dataclasses.replace(record, **change(record)), SCHEMA)
