"""Replays a dataset's requests in the order of time, as the world would send them to a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import numpy as np

from stca_jax.input.dataset import RequestDataset
from stca_jax.serving import Events, ScoreRequest


@dataclasses.dataclass
class Replayed:
    """A request and what must stand in the store before it.

    Attributes:
      request_id: The request's index in the dataset.
      request: For a scorer of encoded values.
      new: Events of the user since the user's last request.
    """

    request_id: int
    request: ScoreRequest
    new: Events


def replay(dataset: RequestDataset, request_ids: Collection[int]) -> Iterator[Replayed]:
    """Those requests in time order, each with the events that happened since the user's last.

    Args:
      dataset: A prepared dataset.
      request_ids: Which requests.
    """
    wanted = set(request_ids)
    index = dataset.index
    origin = dataset.metadata["time_origin"]
    schema = dataset.schema
    places = np.flatnonzero(np.isin(index.request_id, list(wanted)))
    seen: dict[int, int] = {}
    for k in places[np.argsort(index.request_time[places], kind="stable")].tolist():
        now = int(index.request_time[k])
        record = dataset.record(int(index.record[k]))
        position = int(index.position[k])
        first, end = seen.get(record.user_id, 0), int(index.history_end[k])
        seen[record.user_id] = end
        targets = slice(*record.target_offset[position : position + 2])
        yield Replayed(
            int(index.request_id[k]),
            ScoreRequest(
                f"user {record.user_id}",
                {n: record.target[n][targets] for n in schema.target},
                {n: record.request[n][position] for n in schema.request},
                now + origin,
            ),
            Events(
                record.event_time[first:end].astype(np.int64) + origin,
                {n: record.history[n][first:end] for n in schema.history},
                [f"e{i}" for i in range(first, end)],
            ),
        )
