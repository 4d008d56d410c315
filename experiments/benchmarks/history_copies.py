"""The common alternative to one record per user: a history for each request or impression."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import InputConfig, select_requests
from stca_jax.input.records import UserRecord


class HistoryCopies(UserDatasetBuilder):
    """One record for each request or impression, with a copy of its history."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: RequestDataset, config: InputConfig, *, per_impression: bool,
                 data_dir: pathlib.Path):  # fmt: skip
        self._source = source
        self._requests = select_requests(source.index, config)
        self._length = config.length.longest
        self._per_impression = per_impression
        super().__init__(data_dir=data_dir)

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Those of the source."""
        schema = self._source.schema
        return {n: getattr(schema, n) for n in ("history", "target", "request", "tasks")}

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """One shard."""
        size = (
            int(self._requests.num_targets.sum()) if self._per_impression else len(self._requests)
        )
        return UserData(self._source.schema, 0, 0, 0, size, shards=[self._copies])

    def _copies(self) -> Iterator[UserRecord]:
        count = itertools.count()
        for record_index, k in zip(self._requests.record, self._requests.position, strict=True):
            record = self._source.record(int(record_index))
            first, last = record.target_offset[k : k + 2]
            bounds = [(t, t + 1) for t in range(first, last)]
            for a, b in bounds if self._per_impression else [(first, last)]:
                yield _cut(record, k, a, b, self._length, next(count))


def _cut(record: UserRecord, k: int, a: int, b: int, length: int, number: int) -> UserRecord:
    """Request k with its targets [a, b) and its history, as a record of its own."""
    end = record.history_end[k]
    events, request, targets = slice(max(0, end - length), end), slice(k, k + 1), slice(a, b)
    return UserRecord(
        user_id=number,
        event_time=record.event_time[events],
        history={n: v[events] for n, v in record.history.items()},
        request_id=np.array([number]),
        request_time=record.request_time[request],
        request_split=record.request_split[request],
        history_end=np.array([len(record.event_time[events])]),
        target_offset=np.array([0, b - a]),
        request={n: v[request] for n, v in record.request.items()},
        target={n: v[targets] for n, v in record.target.items()},
        label=record.label[targets],
    )
