"""A dataset of random users in several record files, and its builder."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.input.records import UserRecord

FEATURES = {
    "history": ("item", "price"),
    "target": ("item", "score"),
    "request": ("hour",),
    "tasks": ("click", "buy"),
}
SIZES = {"item": 90, "hour": 24}
USERS_PER_FILE = (7, 5, 8)


def make_user(u: int) -> UserRecord:
    """Random user u: some have no events, some no requests."""
    rng = np.random.default_rng(u)
    n, q = int(rng.integers(0, 400)) * (u % 5 > 0), int(rng.integers(1, 6)) * (u % 4 > 0)
    event_time = np.sort(rng.integers(0, 1_000, n))
    request_time = np.sort(rng.integers(0, 1_100, q))
    offset = np.r_[0, np.cumsum(rng.integers(1, 5, q))]
    t = offset[-1]
    return UserRecord(
        user_id=u,
        event_time=event_time,
        history={"item": rng.integers(0, 90, n), "price": rng.normal(size=n).astype(np.float32)},
        request_id=np.arange(q) + 10 * u,
        request_time=request_time,
        request_split=np.sort(rng.integers(0, 3, q)),
        history_end=np.searchsorted(event_time, request_time),
        target_offset=offset,
        request={"hour": rng.integers(0, 24, q)},
        target={"item": rng.integers(0, 90, t), "score": rng.normal(size=t).astype(np.float32)},
        label=rng.integers(0, 2, (t, 2)).astype(np.float32),
    )


USERS = [make_user(u) for u in range(sum(USERS_PER_FILE))]


class Builder(UserDatasetBuilder, skip_registration=True):
    """Writes `USERS`.

    Attributes:
      seconds_per_user: Slows the builder down, so that it can be interrupted.
    """

    name = "small"
    pkg_dir_path = pathlib.Path(__file__).parent  # where TFDS looks for a README
    VERSION = tfds.core.Version("1.0.0")
    seconds_per_user = 0.0

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        return FEATURES

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        ends = np.cumsum(USERS_PER_FILE).tolist()
        return UserData(
            schema=self.schema(SIZES),
            time_origin=1_000_000,
            validation_start=800,
            test_start=900,
            num_users=len(USERS),
            shards=[
                functools.partial(self.users, start, end)
                for start, end in zip([0, *ends], ends, strict=False)
            ],
            notes={"why": "testing"},
        )

    def users(self, start: int, end: int) -> Iterator[UserRecord]:
        """Users [start, end)."""
        for user in USERS[start:end]:
            time.sleep(self.seconds_per_user)
            yield user
