"""Golden requests: requests with the evaluation's logits, which a server must reproduce."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file

from stca_jax.errors import UserError
from stca_jax.serving.cache import CachedUser, Query, UserCache
from stca_jax.serving.folder import GOLDEN
from stca_jax.serving.model import ServingModel


@dataclasses.dataclass(frozen=True)
class Golden:
    """A request with the evaluation's logits.

    Attributes:
      history: Encoded features of the events, oldest first.
      time: Of the events, since the dataset's origin.
      query: Candidates and request.
      logit: The evaluation's.
    """

    history: Mapping[str, np.ndarray]
    time: Int[np.ndarray, " n"]
    query: Query
    logit: Float[np.ndarray, "m tasks"]


def read_golden(model: ServingModel) -> list[Golden]:
    """The golden requests of an export."""
    arrays = load_file(model.directory / GOLDEN)

    def level(name: str, part: slice) -> dict[str, np.ndarray]:
        columns = {n.partition("/")[2]: x for n, x in arrays.items() if n.startswith(f"{name}/")}
        return {n: x[part] for n, x in columns.items()}

    events, targets = arrays["event_offset"].tolist(), arrays["target_offset"].tolist()
    found = []
    for k, now in enumerate(arrays["now"].tolist()):
        e, t = slice(*events[k : k + 2]), slice(*targets[k : k + 2])
        query = Query(level("target", t), level("request", slice(k, k + 1)), now)
        found.append(Golden(level("history", e), arrays["time"][e], query, arrays["logit"][t]))
    return found


def check_golden(cache: UserCache) -> float:
    """The largest difference between the golden requests' logits and the evaluation's.

    Raises:
      UserError: it is larger than the model allows.
    """
    largest = 0.0
    requests = read_golden(cache.model)
    size = max(golden.query.num_targets for golden in requests)  # one program for all
    for golden in requests:
        name = object()
        try:
            user = _put(cache, name, golden)
            (logits,) = cache.score([user], [golden.query], size)
        finally:
            cache.drop(name)
        difference = float(np.abs(logits - golden.logit).max())
        largest = max(largest, difference if difference == difference else np.inf)
    if largest > cache.model.tolerance:
        raise UserError(
            f"{cache.model.directory} does not give the evaluation's logits here: they differ by "
            f"{largest:.2g}, and {cache.model.tolerance:.2g} is allowed: it is not served. Export "
            f"it again, with the versions that this machine runs (jax {jax.__version__} on "
            f"{jax.default_backend()})"
        )
    return largest


def warm_up(cache: UserCache, num_targets: Sequence[int]) -> None:
    """Compiles the programs for so many candidates, instead of when they are first asked for."""
    golden = max(read_golden(cache.model), key=lambda g: len(g.time))
    target, request, now = golden.query
    name, count = object(), len(golden.time)
    try:
        user = _put(cache, name, golden)
        for events in {min(n, count) for n in (1, 2)} - {0}:  # one event, and several
            last = {n: column[-events:] for n, column in golden.history.items()}
            cache.append(user, last, golden.time[-events:], count + np.arange(events), name)
        for size in num_targets:
            resized = {n: np.resize(column, size) for n, column in target.items()}
            cache.score([user], [Query(resized, request, now)])
    finally:
        cache.drop(name)


def _put(cache: UserCache, name: Hashable, golden: Golden) -> CachedUser:
    return cache.put(name, golden.history, golden.time, np.arange(len(golden.time)))
