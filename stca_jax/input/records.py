"""The record every dataset builder writes and the input pipeline reads: one user, whole log once.

    UserRecord of user 7             events   e0 e1 e2 e3 e4 e5 e6 e7      (sorted by time)
                                     request A at t_A: history = events[:4] = e0 … e3
                                     request B at t_B: history = events[:6] = e0 … e5

A request's history is always a prefix of the log, so a request stores one offset, not a copy.
On disk a record is three int32 matrices (float32 columns are reinterpreted bit by bit), one row per
column of the log, so that reading a column of a window is a slice of a view:

    events    [1 + F_h, n]   time, then the history features in the schema's order
    requests  [5 + F_r, q]   request id, time, split, history end, first target; then features
    targets   [F_t + K, t]   features, then one label per task
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from stca_jax.schema import Schema

SPLITS = ("train", "validation", "test")
REQUEST_COLUMNS = 5


@dataclasses.dataclass(frozen=True)
class UserRecord:
    """One user's log and requests.

    Attributes:
      user_id: The user's index in the dataset.
      event_time: int32 seconds since the dataset's origin, non-decreasing.
      history: Event features by name (int32 ids or float32).
      request_id: The requests' indices in the dataset.
      request_time: int32 seconds, non-decreasing; every event of a request's history is earlier.
      request_split: Index into `SPLITS`.
      history_end: Number of events strictly before each request.
      target_offset: Targets of request k are `[target_offset[k], target_offset[k + 1])`.
      request: Request features by name.
      target: Target features by name.
      label: 0 or 1 per target and task; NaN where it is missing.
    """

    user_id: int
    event_time: Int[np.ndarray, " n"]
    history: Mapping[str, np.ndarray]
    request_id: Int[np.ndarray, " q"]
    request_time: Int[np.ndarray, " q"]
    request_split: Int[np.ndarray, " q"]
    history_end: Int[np.ndarray, " q"]
    target_offset: Int[np.ndarray, " q+1"]
    request: Mapping[str, np.ndarray]
    target: Mapping[str, np.ndarray]
    label: Float[np.ndarray, "t tasks"]


def validate_record(record: UserRecord, schema: Schema) -> None:
    """Checks what a builder is about to write.

    Raises:
      ValueError: naming the user, the column, the first offending position and the rule.
    """

    def require(ok: ArrayLike, column: str, rule: str) -> None:
        bad = np.flatnonzero(~np.asarray(ok))
        if bad.size:
            raise ValueError(f"user {record.user_id}: {column} {rule} (first at index {bad[0]})")

    n, q = len(record.event_time), len(record.request_time)
    t = len(record.label)
    for column, size in (
        ("event_time", n),
        ("request_id", q),
        ("request_time", q),
        ("request_split", q),
        ("history_end", q),
        ("target_offset", q + 1),
    ):
        values = np.asarray(getattr(record, column))
        require(values.shape == (size,), column, f"has shape {values.shape}, not {(size,)}")
        require(not size or values.dtype.kind in "iu", column, f"has dtype {values.dtype}")
        require(values <= np.iinfo(np.int32).max, column, "does not fit int32")
    time = np.asarray(record.event_time)
    require(time >= 0, "event_time", "is negative; times are seconds since the dataset's origin")
    require(np.diff(time) >= 0, "event_time", "decreases; sort the log by time")
    require(np.diff(record.request_time) >= 0, "request_time", "decreases; sort requests by time")
    end = np.asarray(record.history_end)
    require((end >= 0) & (end <= n), "history_end", f"is outside [0, {n}]")
    padded = np.append(time, np.iinfo(np.int32).max)
    before = np.where(end > 0, padded[np.maximum(end, 1) - 1], -1)
    require(before < record.request_time, "history_end", "includes an event not before the request")
    require(
        np.isin(record.request_split, range(len(SPLITS))), "request_split", f"is not in {SPLITS}"
    )
    offset = np.asarray(record.target_offset)
    require(offset[0] == 0 and offset[-1] == t, "target_offset", f"must run from 0 to {t}")
    require(np.diff(offset) >= 1, "target_offset", "gives a request no target")
    label = np.asarray(record.label)
    shape = (t, len(schema.tasks))
    require(label.shape == shape, "label", f"has shape {label.shape}, not {shape}")
    known = ~np.isnan(label)
    require((np.isin(label, (0, 1)) | ~known).all(-1), "label", "is not 0, 1 or missing")
    require(known.any(-1), "label", "is missing for every task")
    for level, size in (("history", n), ("request", q), ("target", t)):
        for name in getattr(schema, level):
            values = np.asarray(getattr(record, level)[name])
            column = f"{level} feature {name!r}"
            require(values.shape == (size,), column, f"has shape {values.shape}, not {(size,)}")
            if schema.is_categorical(name):
                rows = schema.vocabularies[name]
                require(not size or values.dtype.kind in "iu", column, f"has dtype {values.dtype}")
                require((values >= 0) & (values < rows), column, f"has an id outside [0, {rows})")
            else:
                require(np.isfinite(values), column, "is not finite")


def encode_record(record: UserRecord, schema: Schema) -> dict[str, np.ndarray | int]:
    """The matrices of the module's drawing, keyed as the builders' TFDS features."""

    def features(names: tuple[str, ...], columns: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [
            _int32(columns[n]) if schema.is_categorical(n) else _float32_bits(columns[n])
            for n in names
        ]

    request_columns = (
        record.request_id,
        record.request_time,
        record.request_split,
        record.history_end,
        record.target_offset[:-1],
    )
    requests = [_int32(c) for c in request_columns] + features(schema.request, record.request)
    labels = [_float32_bits(task) for task in np.asarray(record.label).T]
    return {
        "user_id": int(record.user_id),
        "events": np.stack([_int32(record.event_time), *features(schema.history, record.history)]),
        "requests": np.stack(requests),
        "targets": np.stack([*features(schema.target, record.target), *labels]),
    }


def decode_record(example: Mapping[str, np.ndarray], schema: Schema) -> UserRecord:
    """The inverse of `encode_record`; columns are views of the matrices."""
    events, requests, targets = example["events"], example["requests"], example["targets"]

    def features(names: tuple[str, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        return {
            n: row if schema.is_categorical(n) else row.view(np.float32)
            for n, row in zip(names, rows, strict=False)
        }

    target_offset = np.empty(requests.shape[1] + 1, np.int32)
    target_offset[:-1], target_offset[-1] = requests[4], targets.shape[1]
    return UserRecord(
        user_id=int(example["user_id"]),
        event_time=events[0],
        history=features(schema.history, events[1:]),
        request_id=requests[0],
        request_time=requests[1],
        request_split=requests[2],
        history_end=requests[3],
        target_offset=target_offset,
        request=features(schema.request, requests[REQUEST_COLUMNS:]),
        target=features(schema.target, targets),
        label=targets[len(schema.target) :].view(np.float32).T,
    )


def _int32(column: np.ndarray) -> np.ndarray:
    return np.asarray(column).astype(np.int32)


def _float32_bits(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(column, np.float32).view(np.int32)


def unlabelled_events(record: UserRecord, item: str, end_time: int) -> Bool[np.ndarray, " n"]:
    """Which events statistics may count: of training time, and no target of a training request.

    Args:
      record: A user.
      item: The item feature.
      end_time: Time of the first request of another split.
    """
    is_training = record.request_split == SPLITS.index("train")
    of_request = np.repeat(np.arange(len(record.request_time)), np.diff(record.target_offset))
    used = is_training[of_request]
    targets = _moments(record.request_time[of_request][used], record.target[item][used])
    is_target = np.isin(_moments(record.event_time, record.history[item]), targets)
    return (record.event_time < end_time) & ~is_target


def _moments(time: Int[np.ndarray, " n"], item: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return time.astype(np.int64) << 32 | item.astype(np.int64)
