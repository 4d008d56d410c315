"""A dataset without files, for the tests of the input pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stca_jax.input.dataset import RequestIndex
from stca_jax.input.records import UserRecord, validate_record
from stca_jax.schema import Schema

SCHEMA = Schema(
    history=("item", "price"),
    target=("item", "rank"),
    request=("device",),
    vocabularies={"item": 50, "device": 4},
    tasks=("click", "buy"),
)


class InMemoryDataset:
    """What `RequestDataset` is to the pipeline, over a list of records."""

    def __init__(self, records: list[UserRecord], digest: str = "0" * 64):
        self.schema = SCHEMA
        self.fingerprint = {"users-0": digest}
        self._records = records

        def column(of_record) -> np.ndarray:
            return np.concatenate([of_record(i, r) for i, r in enumerate(records)]).astype(np.int32)

        self.index = RequestIndex(
            record=column(lambda i, r: np.full(len(r.request_id), i)),
            position=column(lambda i, r: np.arange(len(r.request_id))),
            request_id=column(lambda i, r: r.request_id),
            user_id=column(lambda i, r: np.full(len(r.request_id), r.user_id)),
            request_time=column(lambda i, r: r.request_time),
            split=column(lambda i, r: r.request_split),
            history_end=column(lambda i, r: r.history_end),
            num_targets=column(lambda i, r: np.diff(r.target_offset)),
        )

    def __len__(self) -> int:
        return len(self._records)

    def check_fingerprint(self, expected: Mapping[str, str]) -> None:
        if expected != self.fingerprint:
            raise ValueError(f"record file users-0 is {self.fingerprint}, not {expected}")

    def record(self, i: int) -> UserRecord:
        return self._records[i]


def make_dataset(
    users: list[tuple[int, list[int], list[int]]], *, seed: int = 0, digest: str = "0" * 64
) -> InMemoryDataset:
    """A dataset of random features.

    Args:
      users: For each, its number of events, and for each of its requests the number of earlier
        events and the number of targets.
      seed: Of the features.
      digest: Stands for the contents of the record file.
    """
    rng = np.random.default_rng(seed)
    records = []
    num_requests = 0
    for user, (n, ends, targets) in enumerate(users):
        order = np.argsort(ends, kind="stable")
        ends, targets = np.array(ends, int)[order], np.array(targets, int)[order]
        q, t = len(ends), sum(targets)
        # Event k happens at 10 k + 10, a request after `end` events at 10 end + 5: all distinct.
        record = UserRecord(
            user_id=user + 1000,
            event_time=(10 * np.arange(n) + 10).astype(np.int32),
            history={
                "item": rng.integers(0, 50, n).astype(np.int32),
                "price": rng.random(n).astype(np.float32),
            },
            request_id=np.arange(num_requests, num_requests + q, dtype=np.int32),
            request_time=(10 * ends + 5).astype(np.int32),
            request_split=rng.integers(0, 3, q).astype(np.int32),
            history_end=ends.astype(np.int32),
            target_offset=np.append(0, np.cumsum(targets)).astype(np.int32),
            request={"device": rng.integers(0, 4, q).astype(np.int32)},
            target={
                "item": rng.integers(0, 50, t).astype(np.int32),
                "rank": rng.random(t).astype(np.float32),
            },
            label=rng.integers(0, 2, (t, 2)).astype(np.float32),
        )
        validate_record(record, SCHEMA)
        records.append(record)
        num_requests += q
    return InMemoryDataset(records, digest)


def random_dataset(
    num_users: int, max_events: int, max_requests: int, max_targets: int, *, seed: int = 0
) -> InMemoryDataset:
    """Users with up to so many events and requests; most requests have few targets."""
    rng = np.random.default_rng(seed)
    users = []
    for _ in range(num_users):
        n, q = rng.integers(0, max_events + 1), rng.integers(1, max_requests + 1)
        users.append(
            (
                int(n),
                rng.integers(0, n + 1, q).tolist(),
                np.minimum(rng.geometric(min(1, 4 / max_targets), q), max_targets).tolist(),
            )
        )
    return make_dataset(users, seed=seed)
