"""What the references read: one user's log, the requests made against it, and their targets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer, Shaped

from stca_jax.input.arrays import ragged_ranges
from stca_jax.input.dataset import RequestDataset, RequestIndex


@dataclasses.dataclass(frozen=True)
class HistoryView:
    """One user's log with all requests made against it.

    Request k saw the first `history_end[k]` events and ranks the targets
    `[target_offset[k], target_offset[k + 1])`.

        event_time      10 20 20 30 40 50      6 events, oldest first
        history_end      3  5                  request 0 saw 3 of them, request 1 saw 5
        request_time    25 50                  its own second is not history
        target_offset    0  2  5               request 0 ranks 2 targets, request 1 ranks 3

    Attributes:
      event_ids: int32 [n] for each id field, such as "item" and "category".
      event_time: int64 [n], seconds, never decreasing.
      history_end: integers [q] in [0, n].
      request_time: int64 [q], seconds, later than every event of the request's history.
      target_offset: integers [q + 1] from 0 to t, never decreasing.
      target_ids: int32 [t] for each of the fields of `event_ids`.
      target_log_popularity: float32 [t], such as log1p of the item's count in training, or None.
      item_field: the field that identifies an item.

    Raises:
      ValueError: if a shape, an order or a type is another, or a history reaches its request.
    """

    event_ids: Mapping[str, Int32[np.ndarray, " n"]]
    event_time: Int64[np.ndarray, " n"]
    history_end: Integer[np.ndarray, " q"]
    request_time: Int64[np.ndarray, " q"]
    target_offset: Integer[np.ndarray, " q+1"]
    target_ids: Mapping[str, Int32[np.ndarray, " t"]]
    target_log_popularity: Float32[np.ndarray, " t"] | None = None
    item_field: str = "item"

    def __post_init__(self):
        self._check_shapes()
        self._check_order()

    @property
    def num_targets(self) -> int:
        """Number of targets of all requests."""
        return self.target_ids[self.item_field].size

    def _check_shapes(self):
        events, targets = list(self.event_ids), list(self.target_ids)
        if set(events) != set(targets) or self.item_field not in events:
            raise ValueError(
                f"event_ids has fields {events}, target_ids {targets} and item_field is "
                f"{self.item_field!r}; expected the same fields in both, the item's among them: "
                "drop the fields that only one has, and set item_field."
            )
        n, q, t = self.event_time.size, self.history_end.size, self.num_targets
        ids = [(f"event_ids[{field!r}]", self.event_ids[field], n) for field in events]
        ids += [(f"target_ids[{field!r}]", self.target_ids[field], t) for field in events]
        for name, array, _ in ids:
            if array.dtype != np.int32:
                raise ValueError(f"{name} is {array.dtype}, expected int32: cast the ids.")
        sized = [
            *ids,
            ("event_time", self.event_time, n),
            ("history_end", self.history_end, q),
            ("request_time", self.request_time, q),
            ("target_offset", self.target_offset, q + 1),
        ]
        if self.target_log_popularity is not None:
            sized += [("target_log_popularity", self.target_log_popularity, t)]
        for name, array, size in sized:
            if array.shape != (size,):
                raise ValueError(
                    f"{name} has shape {list(array.shape)}, expected [{size}] ({n} events, {q} "
                    f"requests, {t} targets): pass one value for each."
                )

    def _check_order(self):
        n, end, offset = self.event_time.size, self.history_end, self.target_offset
        if (self.event_time[1:] < self.event_time[:-1]).any():
            raise ValueError("event_time decreases, expected oldest first: sort the events by it.")
        if offset[0] != 0 or offset[-1] != self.num_targets or (offset[1:] < offset[:-1]).any():
            raise ValueError(
                f"target_offset is {offset}, expected to rise from 0 to {self.num_targets}: pass "
                "where each request's targets begin, then their number."
            )
        if ((end < 0) | (end > n)).any():
            raise ValueError(
                f"history_end spans [{end.min()}, {end.max()}], expected within [0, {n}]: count "
                "the events of this user before each request."
            )
        some = np.flatnonzero(end)
        late = some[self.event_time[end[some] - 1] >= self.request_time[some]]
        if late.size:
            raise ValueError(
                f"The history of request {late[0]} ends at time "
                f"{self.event_time[end[late[0]] - 1]}, expected before the request's time "
                f"{self.request_time[late[0]]}, or the answer leaks: lower history_end, as "
                "np.searchsorted(event_time, request_time) gives it."
            )


@dataclasses.dataclass(frozen=True)
class UserTargets:
    """The targets of some requests of one user.

    Attributes:
      view: What a reference that counts may see of them.
      columns: [t] features of the targets and of their requests by name: int32 ids or float32.
      label: [t, tasks] of 0 or 1, or -1 where it is missing.
      user_id: The user's index in the dataset.
      request_id: int64 [t], the requests' indices in the dataset.
    """

    view: HistoryView
    columns: Mapping[str, Shaped[np.ndarray, " t"]]
    label: Shaped[np.ndarray, "t tasks"]
    user_id: int
    request_id: Int64[np.ndarray, " t"]


def read_targets(dataset: RequestDataset, requests: RequestIndex) -> Iterator[UserTargets]:
    """The targets of the requests given, user by user.

    Args:
      dataset: A prepared dataset; its match fields are what is counted.
      requests: Some of its requests, grouped by record.
    """
    schema = dataset.schema
    starts = np.flatnonzero(np.diff(requests.record, prepend=-1))
    for start, end in itertools.pairwise([*starts, len(requests)]):
        record = dataset.record(int(requests.record[start]))
        chosen = requests.position[start:end]
        first, last = record.target_offset[chosen], record.target_offset[chosen + 1]
        size = (last - first).astype(np.int64)
        offset = np.append(0, np.cumsum(size))
        targets = ragged_ranges(first, size)
        columns = {name: values[targets] for name, values in record.target.items()}
        for name, values in record.request.items():
            columns.setdefault(name, np.repeat(values[chosen], size))
        yield UserTargets(
            view=HistoryView(
                event_ids={n: record.history[n] for n in schema.match_fields},
                event_time=record.event_time.astype(np.int64),
                history_end=record.history_end[chosen],
                request_time=record.request_time[chosen].astype(np.int64),
                target_offset=offset,
                target_ids={n: columns[n] for n in schema.match_fields},
                target_log_popularity=columns.get("log_popularity"),
                item_field=schema.item,
            ),
            columns=columns,
            label=np.nan_to_num(record.label[targets], nan=-1).astype(np.int8),
            user_id=record.user_id,
            request_id=np.repeat(record.request_id[chosen].astype(np.int64), size),
        )
