"""Request batches for tests: every layout that the drawing in batch.py allows."""

import copy
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.schema import Schema

# Ids are few, so that targets match events; the item is not the first feature of its level.
SCHEMA = Schema(
    history=("category", "item", "price"),
    target=("position", "item", "category"),
    request=("segment", "budget"),
    vocabularies={"item": 7, "category": 3, "segment": 4},
    tasks=("click", "buy"),
)
DAY = 86_400
_INT_GARBAGE = np.array([-1, -(2**31), 2**31 - 1, 10**9], np.int32)
_FLOAT_GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)


class RequestLayout(NamedTuple):
    """A request's range and its number of targets."""

    start: int
    end: int
    num_targets: int


class UserLayout(NamedTuple):
    """A user's tokens [first, last) of the row and the requests that read them."""

    first: int
    last: int
    requests: list[RequestLayout]


# Rows of users: nested and overlapping ranges with a token outside all; two users, one with a
# window and one without history; a single target that reads the whole row.
SHARED_LAYOUT = [
    [
        UserLayout(
            0, 17, [RequestLayout(0, 9, 2), RequestLayout(0, 14, 1), RequestLayout(5, 17, 2)]
        ),
        UserLayout(18, 24, [RequestLayout(18, 24, 3)]),
    ],
    [UserLayout(1, 11, [RequestLayout(4, 11, 3)]), UserLayout(11, 11, [RequestLayout(11, 11, 2)])],
    [UserLayout(0, 24, [RequestLayout(0, 24, 1)])],
]
EXCLUSIVE_LAYOUT = [
    [user._replace(requests=user.requests[-1:]) for user in r] for r in SHARED_LAYOUT
]


def make_batch(
    layout: list[list[UserLayout]],
    seed: int = 0,
    *,
    shared: bool,
    row_length: int = 24,
    targets_per_row: int = 8,
) -> RequestBatch:
    """A valid batch of `SCHEMA` with random contents, zero in padding; timestamps repeat.

    Args:
      layout: Users of each row.
      seed: Of the contents.
      shared: `shared_history`; whether ranges of requests of one user may overlap.
      row_length: L.
      targets_per_row: M.
    """
    rng = np.random.default_rng(seed)
    batch = empty_batch(SCHEMA, len(layout), row_length, targets_per_row, shared_history=shared)
    request_id = user_id = 0
    for row, users in enumerate(layout):
        slot = 0
        for user in users:
            _fill_events(batch, rng, np.s_[row, user.first : user.last])
            for request in user.requests:
                slots = np.s_[row, slot : slot + request.num_targets]
                slot += request.num_targets
                _fill_targets(batch, rng, slots)
                start, end = request.start, request.end
                last_time = batch.history_time[row, end - 1] if end > start else 0
                batch.request_time[slots] = last_time + rng.integers(1, 40 * DAY)
                batch.history_start[slots], batch.history_end[slots] = start, end
                batch.request_id[slots], batch.user_id[slots] = request_id, user_id
                request_id += 1
            user_id += 1
    return batch


@st.composite
def request_batches(
    draw: st.DrawFn,
    *,
    shared: bool,
    num_rows: int = 3,
    row_length: int = 24,
    targets_per_row: int = 8,
) -> RequestBatch:
    """Batches of any layout.

    Rows hold up to three users, one after the other, with uncovered tokens between them.  A user
    has one request or, if `shared`, up to three whose ranges nest or overlap.  Ranges may be empty,
    fill the row, or leave out the oldest events; a row may have no target.
    """
    layout = []
    for _ in range(num_rows):
        users, last, free = [], 0, targets_per_row
        for _ in range(draw(st.integers(0, 3))):
            first = min(row_length, last + draw(st.integers(0, 2)))
            last = draw(st.integers(first, row_length))
            requests = []
            for _ in range(draw(st.integers(1, 3)) if shared else 1):
                if free:
                    end = draw(st.integers(first, last))
                    start = draw(st.integers(first, end))
                    requests.append(RequestLayout(start, end, draw(st.integers(1, free))))
                    free -= requests[-1].num_targets
            users.append(UserLayout(first, last, requests))
        layout.append(users)
    return make_batch(
        layout,
        draw(st.integers(0, 2**32 - 1)),
        shared=shared,
        row_length=row_length,
        targets_per_row=targets_per_row,
    )


def spoil_padding(batch: RequestBatch, seed: int = 0) -> RequestBatch:
    """A copy with NaN, infinities, impossible ids, times and ranges wherever nothing may look."""
    rng = np.random.default_rng(seed)
    batch = copy.deepcopy(batch)
    unused = ~batch.target_mask
    uncovered = np.ones(batch.history_time.shape, bool)
    for row, slot in np.argwhere(batch.target_mask):
        uncovered[row, batch.history_start[row, slot] : batch.history_end[row, slot]] = False
    tokens = [*batch.history.values(), batch.history_time]
    slots = [*batch.target.values(), *batch.request.values(), batch.label, batch.request_time]
    slots += [batch.history_start, batch.history_end, batch.num_request_targets]
    slots += [batch.request_id, batch.user_id]
    for columns, padding in ((tokens, uncovered), (slots, unused)):
        for column in columns:
            garbage = _FLOAT_GARBAGE if column.dtype.kind == "f" else _INT_GARBAGE
            column[padding] = rng.choice(garbage, column[padding].shape)
    return batch


def _features(rng: np.random.Generator, name: str, n: int) -> np.ndarray:
    if SCHEMA.is_categorical(name):
        return rng.integers(0, SCHEMA.vocabularies[name], n)
    return rng.normal(size=n)


def _fill_events(batch: RequestBatch, rng: np.random.Generator, tokens: tuple) -> None:
    n = batch.history_time[tokens].size
    steps = rng.choice([0, 1, 3_600, DAY, 30 * DAY], n)
    batch.history_time[tokens] = rng.integers(0, 400 * DAY) + np.cumsum(steps)
    for name, column in batch.history.items():
        column[tokens] = _features(rng, name, n)


def _fill_targets(batch: RequestBatch, rng: np.random.Generator, slots: tuple) -> None:
    m = batch.request_time[slots].size
    for name, column in batch.target.items():
        column[slots] = _features(rng, name, m)
    for name, column in batch.request.items():
        column[slots] = _features(rng, name, 1)
    batch.label[slots] = rng.integers(0, 2, (m, len(SCHEMA.tasks)))
    batch.target_mask[slots] = True
    batch.num_request_targets[slots] = m
