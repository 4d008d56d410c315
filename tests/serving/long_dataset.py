"""Users with more events than a page, and than a model reads; two tasks, numbers, hours."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.input.records import UserRecord

FEATURES = {
    "history": ("item", "category", "price"),
    "target": ("item", "category", "score"),
    "request": ("hour", "age"),
    "tasks": ("click", "buy"),
}
SIZES = {"item": 90, "category": 9, "hour": 24}
ORIGIN = 1_600_000_000
NUM_USERS = 24
_DAYS = 86_400


def make_user(u: int) -> UserRecord:
    """Random user u: every fifth has no events; many events share a second."""
    rng = np.random.default_rng(u)
    n, q = int(rng.integers(0, 1_300)) * (u % 5 > 0), int(rng.integers(2, 7))
    event_time = np.sort(rng.integers(0, 100 * _DAYS, n) // 3_600 * 3_600)
    request_time = np.sort(rng.integers(60 * _DAYS, 101 * _DAYS, q) // 3_600 * 3_600)
    offset = np.r_[0, np.cumsum(rng.choice([1, 3, 30], q))]
    t = offset[-1]

    def items(size: int) -> dict[str, np.ndarray]:
        item = np.minimum(rng.geometric(0.05, size), 89)
        return {"item": item, "category": item % 9}

    return UserRecord(
        user_id=u,
        event_time=event_time,
        history={**items(n), "price": rng.normal(size=n).astype(np.float32)},
        request_id=np.arange(q) + 10 * u,
        request_time=request_time,
        request_split=np.full(q, 2),
        history_end=np.searchsorted(event_time, request_time),
        target_offset=offset,
        request={"hour": rng.integers(0, 24, q), "age": rng.normal(size=q).astype(np.float32)},
        target={**items(t), "score": rng.normal(size=t).astype(np.float32)},
        label=rng.integers(0, 2, (t, 2)).astype(np.float32),
    )


class Builder(UserDatasetBuilder, skip_registration=True):
    """Writes the users."""

    name = "long"
    pkg_dir_path = pathlib.Path(__file__).parent
    VERSION = tfds.core.Version("1.0.0")

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        return FEATURES

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        return UserData(
            schema=self.schema(SIZES),
            time_origin=ORIGIN,
            validation_start=1,
            test_start=2,
            num_users=NUM_USERS,
            shards=[functools.partial(self.users)],
        )

    def users(self) -> Iterator[UserRecord]:
        return map(make_user, range(NUM_USERS))
