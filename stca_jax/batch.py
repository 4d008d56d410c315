"""RequestBatch: the one container of data, from the input pipeline to the loss.

Each target reads one contiguous range of a flat row of history tokens:

    row of L = 16 tokens   |── user 7, 6 tokens ──|─── user 3, 8 tokens ───|pad|
    position                0  1  2  3  4  5        6  7  8 …          13    14 15

    target slot m           0     1     2     3     4     5     6     7
    request                 A     A     B     B     C     C     pad   pad
    history_start           0     0     2     2     6     6     0     0
    history_end             4     4     6     6     14    14    0     0
    target_mask             1     1     1     1     1     1     0     0

Requests A and B come from the same user: their ranges [0, 4) and [2, 6) overlap, and the tokens
stand there once.  The two targets of a request hold the same range: that is request-level batching.
A shorter window is a larger `history_start`.  An empty range (start == end) is a user without
history.  Tokens that no range covers are padding, and their contents never matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from stca_jax.ranges import Ranges
from stca_jax.schema import Schema

# Array types of the host (NumPy) and of the device (JAX) are used alike.
Array = Any


@dataclasses.dataclass(frozen=True)
class RequestBatch:
    """R rows of L history tokens and M target slots.

    Categorical features are int32 ids, numeric ones float32; times are int32 seconds since the
    dataset's own origin.  Per-request values are repeated for each target of the request: a few
    integers, against the thousands of tokens that are not repeated.

    Attributes:
      history: Features of the events, by name.
      history_time: When each event happened.
      target: Features of the candidates, by name.
      request: Features of the user or request, by name.
      request_time: When the request was made; later than every event in its range.
      history_start: First token of the target's range.
      history_end: One past the last token of the target's range.
      label: 0 or 1 for each task.
      target_mask: False in padding slots.
      request_id: The request's index in the dataset.
      user_id: The user's index in the dataset.
      num_request_targets: How many targets the whole request has, in any row; at least 1.
      history_unlabelled: Events that no training request asks for and that precede all others: what
        a loss without labels may learn from. None where no loss reads it.
      shared_history: Static. True if a token may be read by requests of different times, in which
        case token features may not depend on the request's time.
    """

    history: Mapping[str, Int[Array, "R L"] | Float[Array, "R L"]]
    history_time: Int[Array, "R L"]
    target: Mapping[str, Int[Array, "R M"] | Float[Array, "R M"]]
    request: Mapping[str, Int[Array, "R M"] | Float[Array, "R M"]]
    request_time: Int[Array, "R M"]
    history_start: Int[Array, "R M"]
    history_end: Int[Array, "R M"]
    label: Float[Array, "R M tasks"]
    target_mask: Bool[Array, "R M"]
    request_id: Int[Array, "R M"]
    user_id: Int[Array, "R M"]
    num_request_targets: Int[Array, "R M"]
    history_unlabelled: Bool[Array, "R L"] | None = None
    shared_history: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """R."""
        return self.history_time.shape[0]

    @property
    def row_length(self) -> int:
        """L, the number of history tokens a row can hold."""
        return self.history_time.shape[1]

    @property
    def targets_per_row(self) -> int:
        """M, the number of target slots of a row."""
        return self.target_mask.shape[1]

    @property
    def ranges(self) -> Ranges:
        """Which tokens each target slot reads; anything in padding slots."""
        return Ranges(self.history_start, self.history_end)

    def replace(self, **changes: Any) -> RequestBatch:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(RequestBatch)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as a notebook user writes it down: the input of `from_requests`.

    Attributes:
      history: Event features by name, oldest first, each of the same length n.
      history_time: Seconds, non-decreasing, each earlier than `time`; length n.
      time: When the request was made.
      targets: Candidate features by name, each of the same length m >= 1.
      labels: m values in {0, 1}, or m sequences of one value per task.
      features: User or request features by name.
      user_id: Any non-negative index.
    """

    history: Mapping[str, Sequence[float]]
    history_time: Sequence[int]
    time: int
    targets: Mapping[str, Sequence[float]]
    labels: Sequence[Any]
    features: Mapping[str, float] = dataclasses.field(default_factory=dict)
    user_id: int = 0


def empty_batch(
    schema: Schema,
    num_rows: int,
    row_length: int,
    targets_per_row: int,
    *,
    shared_history: bool,
    with_unlabelled: bool = False,
) -> RequestBatch:
    """An all-padding batch of NumPy arrays, to be filled in place.

    Args:
      schema: Names and kinds of the features.
      num_rows: R.
      row_length: L.
      targets_per_row: M.
      shared_history: See `RequestBatch`.
      with_unlabelled: Have `history_unlabelled`.
    """

    def features(names: Sequence[str], width: int) -> dict[str, np.ndarray]:
        dtype = {n: np.int32 if schema.is_categorical(n) else np.float32 for n in names}
        return {n: np.zeros((num_rows, width), dtype[n]) for n in names}

    def slots(dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((num_rows, targets_per_row), dtype)

    return RequestBatch(
        history=features(schema.history, row_length),
        history_time=np.zeros((num_rows, row_length), np.int32),
        target=features(schema.target, targets_per_row),
        request=features(schema.request, targets_per_row),
        request_time=slots(),
        history_start=slots(),
        history_end=slots(),
        label=np.zeros((num_rows, targets_per_row, len(schema.tasks)), np.float32),
        target_mask=slots(bool),
        request_id=slots(),
        user_id=slots(),
        num_request_targets=slots() + np.int32(1),
        history_unlabelled=np.zeros((num_rows, row_length), bool) if with_unlabelled else None,
        shared_history=shared_history,
    )


def from_requests(
    schema: Schema,
    requests: Sequence[Request],
    *,
    row_length: int | None = None,
    targets_per_row: int | None = None,
    max_history: int | None = None,
) -> RequestBatch:
    """Builds a batch by hand, one request per row, and validates it.

    Args:
      schema: Names and kinds of the features.
      requests: At least one request; the i-th fills row i and has `request_id` i.
      row_length: L; by default the longest history.
      targets_per_row: M; by default the largest number of targets.
      max_history: Keep only the most recent events of each history.

    Returns:
      A validated `RequestBatch` of NumPy arrays.

    Raises:
      ValueError: a request does not fit the schema, the row or the rules of `validate_batch`.
    """
    if not requests:
        raise ValueError("from_requests needs at least one request, got none")
    kept = [len(r.history_time) for r in requests]
    if max_history is not None:
        kept = [min(n, max_history) for n in kept]
    sizes = [len(r.labels) for r in requests]
    row_length = max(1, *kept) if row_length is None else row_length
    targets_per_row = max(1, *sizes) if targets_per_row is None else targets_per_row
    batch = empty_batch(schema, len(requests), row_length, targets_per_row, shared_history=False)
    for i, request in enumerate(requests):
        _fill_row(batch, schema, i, request, kept[i])
    validate_batch(batch, schema)
    return batch


def _fill_row(batch: RequestBatch, schema: Schema, i: int, request: Request, kept: int) -> None:
    n, m = len(request.history_time), len(request.labels)
    if m < 1:
        raise ValueError(f"request {i} has no labels; it needs at least one target")
    if kept > batch.row_length:
        raise ValueError(
            f"request {i} has {kept} events but row_length is {batch.row_length}; "
            "pass max_history or a longer row"
        )
    if m > batch.targets_per_row:
        raise ValueError(
            f"request {i} has {m} targets but targets_per_row is {batch.targets_per_row}"
        )

    def feature(
        given: Mapping[str, Any], name: str, shape: tuple[int, ...], level: str
    ) -> np.ndarray:
        if name not in given:
            raise ValueError(f"request {i}: {level} lacks {name!r}; it has {sorted(given)}")
        dtype = np.int32 if schema.is_categorical(name) else np.float32
        return _as_array(given[name], shape, dtype, f"request {i}: {level} {name!r}")

    def integers(field: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        return _as_array(getattr(request, field), shape, np.int32, f"request {i}: {field}")

    tokens, slots = np.s_[i, :kept], np.s_[i, :m]
    batch.history_time[tokens] = integers("history_time", (n,))[n - kept :]
    for name in schema.history:
        batch.history[name][tokens] = feature(request.history, name, (n,), "history")[n - kept :]
    for name in schema.target:
        batch.target[name][slots] = feature(request.targets, name, (m,), "targets")
    for name in schema.request:
        batch.request[name][slots] = feature(request.features, name, (), "features")
    num_tasks = len(schema.tasks)
    shape = (m,) if num_tasks == 1 and np.ndim(request.labels) == 1 else (m, num_tasks)
    labels = _as_array(request.labels, shape, np.float32, f"request {i}: labels")
    batch.label[slots] = labels.reshape(m, num_tasks)
    batch.history_end[slots] = kept
    for name, value in {
        "request_time": integers("time"),
        "target_mask": True,
        "request_id": i,
        "user_id": integers("user_id"),
        "num_request_targets": m,
    }.items():
        getattr(batch, name)[slots] = value


def _as_array(values: Any, shape: tuple[int, ...], dtype: Any, what: str) -> np.ndarray:
    """Converts numbers that users wrote down, unless that would change a whole number.

    Raises:
      ValueError: another shape, not numbers, or not int32 where int32 is needed.
    """
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}, expected {shape}")
    if array.size and array.dtype.kind not in "biuf":
        raise ValueError(f"{what} has dtype {array.dtype}, expected numbers")
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(dtype)
    if np.issubdtype(dtype, np.integer) and (converted != array).any():
        wrong = array[converted != array].flat[0]
        raise ValueError(f"{what} must be whole numbers that fit int32; found {wrong}")
    return converted


def validate_batch(batch: RequestBatch, schema: Schema) -> None:
    """Checks a host batch against its schema and the rules in the module's drawing.

    Args:
      batch: NumPy arrays (device arrays are fetched).
      schema: What the batch should contain.

    Raises:
      ValueError: naming the field, the row and slot, the value found, and what was expected.
    """
    _check_arrays(batch, schema)
    batch = jax.tree.map(np.asarray, batch)
    mask = batch.target_mask
    # Padding slots may hold anything; here they hold empty ranges.
    start, end = (np.where(mask, x, 0) for x in (batch.history_start, batch.history_end))
    batch = batch.replace(history_start=start, history_end=end)
    _check(
        ~((start >= 0) & (start <= end) & (end <= batch.row_length)),
        f"a target's range must satisfy 0 <= start <= end <= row length {batch.row_length}",
        history_start=start,
        history_end=end,
    )
    label = batch.label
    _check(
        (mask[..., None] & ~(np.isin(label, (0, 1)) | np.isnan(label))).any(-1),
        "labels must be 0 or 1, or NaN where one is missing",
        label=label,
    )
    _check(mask & (batch.num_request_targets < 1), "a request has at least one target",
           num_request_targets=batch.num_request_targets)  # fmt: skip
    covered = np.asarray(Ranges(start, end).covered(batch.row_length))
    for level, features, used in (
        ("history", batch.history, covered),
        ("target", batch.target, mask),
        ("request", batch.request, mask),
    ):
        for name, values in features.items():
            if schema.is_categorical(name):
                size = schema.vocabularies[name]
                bad, rule = (values < 0) | (values >= size), f"ids must be in [0, {size})"
            else:
                bad, rule = ~np.isfinite(values), "numbers must be finite"
            _check(used & bad, f"{level} feature {name!r}: {rule}", **{name: values})
    _check_times(batch, covered)
    if not batch.shared_history:
        _check_exclusive(batch)


def _check_arrays(batch: RequestBatch, schema: Schema) -> None:
    """Names, shapes and dtypes."""
    R, L, M = batch.num_rows, batch.row_length, batch.targets_per_row
    expected: dict[str, tuple[int, ...]] = {"history_time": (R, L)}
    for name in ("request_time", "history_start", "history_end", "target_mask", "request_id",
                 "user_id", "num_request_targets"):  # fmt: skip
        expected[name] = (R, M)
    expected["label"] = (R, M, len(schema.tasks))
    dtypes: dict[str, Any] = {"label": np.float32, "target_mask": np.bool_}
    if batch.history_unlabelled is not None:
        expected["history_unlabelled"], dtypes["history_unlabelled"] = (R, L), np.bool_
    found = {name: getattr(batch, name) for name in expected}
    for level, width in (("history", L), ("target", M), ("request", M)):
        names, features = set(getattr(schema, level)), getattr(batch, level)
        if set(features) != names:
            raise ValueError(f"{level} has features {sorted(features)}, expected {sorted(names)}")
        expected |= {f"{level}[{n!r}]": (R, width) for n in names}
        found |= {f"{level}[{n!r}]": features[n] for n in names}
        dtypes |= {f"{level}[{n!r}]": np.float32 for n in names if not schema.is_categorical(n)}
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} has shape {found[name].shape}, expected {shape}")
        dtype = dtypes.get(name, np.int32)
        if found[name].dtype != dtype:
            raise ValueError(f"{name} has dtype {found[name].dtype}, expected {np.dtype(dtype)}")


def _check_times(batch: RequestBatch, covered: np.ndarray) -> None:
    """Times inside each range never decrease and end strictly before the request."""
    time, mask = batch.history_time, batch.target_mask
    _check(covered & (time < 0), "event times are seconds since the dataset's origin, >= 0",
           history_time=time)  # fmt: skip
    falls = np.zeros_like(covered)
    falls[:, 1:] = time[:, 1:] < time[:, :-1]
    inside = np.cumsum(falls, axis=1)
    nonempty = mask & (batch.history_end > batch.history_start)
    last = np.maximum(batch.history_end - 1, 0)
    num_falls = np.take_along_axis(inside, last, 1) - np.take_along_axis(
        inside, np.minimum(batch.history_start, last), 1
    )
    _check(nonempty & (num_falls > 0), "event times inside a range must not decrease: sort the log",
           history_start=batch.history_start, history_end=batch.history_end)  # fmt: skip
    last_time = np.take_along_axis(time, last, 1)
    _check(nonempty & (last_time >= batch.request_time),
           "a history must end strictly before its request",
           last_event_time=last_time, request_time=batch.request_time)  # fmt: skip


def _check_exclusive(batch: RequestBatch) -> None:
    """Ranges that share a token belong to one request time and one end."""

    def pairs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[:, :, None], x[:, None]

    start, end, time = batch.history_start, batch.history_end, batch.request_time
    overlap = np.maximum(*pairs(start)) < np.minimum(*pairs(end))
    same = np.equal(*pairs(time)) & np.equal(*pairs(end))
    _check((overlap & ~same).any(-1),
           "shared_history is False, but another request reads tokens of this range",
           history_start=start, history_end=end)  # fmt: skip


def _check(bad: np.ndarray, rule: str, **values: np.ndarray) -> None:
    """Raises ValueError for the first True of `bad` (2-D), showing `values` there."""
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        shown = ", ".join(f"{name}={value[row, column]}" for name, value in values.items())
        raise ValueError(f"{rule}; found {shown} at row {row}, position {column}")
