"""What a model's cache is given: raw values encoded, or ids and numbers checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from stca_jax.errors import UserError
from stca_jax.serving.cache import Query
from stca_jax.serving.encoding import encode_events, encode_request, encode_targets
from stca_jax.serving.events import Events, as_array
from stca_jax.serving.model import MAX_TARGETS, ServingModel, check_encoded
from stca_jax.serving.score_request import ScoreRequest

_INT32 = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class RequestEncoder:
    """Encodes events and requests for one model.

    Attributes:
      model: Whose features.
      is_encoded: Values are ids and numbers as trained, not raw.
    """

    model: ServingModel
    is_encoded: bool

    def query(self, request: ScoreRequest, now: int, count_since: Callable[[int], int]) -> Query:
        """What the cache is asked.

        Args:
          request: As it came.
          now: Its Unix second.
          count_since: See `encode_request`.

        Raises:
          UserError: it does not fit the model; names feature and value.
        """
        model = self.model
        if self.is_encoded:
            targets = check_encoded(model, "target", request.targets)
            of_request = {name: as_array(name, [v]) for name, v in request.request.items()}
            features = check_encoded(model, "request", of_request, 1)
        else:
            targets = encode_targets(model, request.targets, now)
            features = encode_request(model, request.request, request.user, now, count_since)
        count = len(next(iter(targets.values())))
        if not 1 <= count <= MAX_TARGETS:
            raise UserError(f"there are {count:,} targets; give 1 to {MAX_TARGETS:,}")
        return Query(targets, features, int(self.since_origin(np.array([now]))[0]))

    def events(self, events: Events) -> dict[str, np.ndarray]:
        """Encoded columns.

        Raises:
          UserError: an event cannot be encoded; names feature and value.
        """
        self.since_origin(events.time)
        if self.is_encoded:
            return check_encoded(self.model, "history", events.columns, len(events))
        return encode_events(self.model, events)

    def history(self, events: Events) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Encoded columns, times since the dataset's origin and sequence of stored events."""
        sequence = np.arange(len(events)) if events.sequence is None else events.sequence
        if not len(events):
            empty = {n: np.empty(0, np.int32) for n in self.model.info.levels["history"].names}
            return empty, np.empty(0, np.int64), sequence
        return self.events(events), self.since_origin(events.time), sequence

    def since_origin(self, time: np.ndarray) -> np.ndarray:
        """Times since the dataset's origin.

        Raises:
          UserError: one is before it, or too far after it.
        """
        origin = self.model.info.time_origin
        since = time - origin
        if len(since) and not (since.min() >= 0 and since.max() <= _INT32):
            bad = time[(since < 0) | (since > _INT32)][0]
            raise UserError(
                f"time {bad} is not within {origin} to {origin + _INT32}: give Unix seconds, as in "
                "the log that the model was trained on"
            )
        return since
