"""A loss without labels: what a user does within a short time is alike.

    row of tokens   … a . b . . | . c . d . …      a, b: events of one user, at most `reach` apart
                                                   d: the later event of another user's pair

    loss = -log exp(s_ab) / (exp(s_ab) + sum_d exp(s_ad)),    s = cosine of table rows / temperature

(InfoNCE, arXiv 1807.03748), for each categorical feature of the history by itself and averaged.
Other pairs' later events occur as often as their ids do, so that the best s_ab is the pointwise
mutual information of a and b up to a constant, without a correction for popularity.

**No label enters**: a pair holds no event that a training request asks for, and none from the first
other request on (`RequestBatch.history_unlabelled`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from stca_jax.batch import RequestBatch
from stca_jax.ranges import Ranges
from stca_jax.training.loss import Loss, LossInputs

_TINY = 1e-6


class _Pairs(NamedTuple):
    """Places of the two events of each pair in its row, whose user they are, and if they count."""

    first: Int[Array, "R P"]
    second: Int[Array, "R P"]
    user: Int[Array, "R P"]
    used: Bool[Array, "R P"]


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss(Loss):
    """Rows of ids that occur near each other become alike; see the module.

    Tables that learn from it want a higher `optimizer.table_learning_rate` than from labels alone.

    Attributes:
      temperature: Of the cosine.
      pairs_per_row: Pairs drawn in each row at each step; their scores are a square of that size.
      reach: How many events apart the two of a pair may be.
    """

    temperature: float = 0.3
    pairs_per_row: int = 1_024
    reach: int = 5

    reads_unlabelled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")
        for name in ("pairs_per_row", "reach"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def name(self) -> str:
        """By which it is reported."""
        return "contrastive"

    def total_weight(self, batch: RequestBatch) -> Float[Array, ""]:
        """Pairs that are drawn; those that do not count add nothing."""
        return jnp.asarray(batch.num_rows * self.pairs_per_row, jnp.float32)

    def __call__(self, inputs: LossInputs, total_weight: Float[Array, ""]) -> Float[Array, ""]:
        """The mean over pairs and features, less what equal scores would give."""
        batch, ranker = inputs.batch, inputs.ranker
        pairs = self._draw(batch, inputs.key)
        names = [n for n in ranker.history_names if ranker.schema.is_categorical(n)]
        rows = ranker.embedding(batch.history, names, inputs.embedded.get("history"))
        losses = (
            self._of_feature(r, batch.history[n], pairs) for n, r in zip(names, rows, strict=True)
        )
        return sum(losses, jnp.zeros(())) / len(names) / total_weight

    def _draw(self, batch: RequestBatch, key: Key[Array, ""]) -> _Pairs:
        shape = (batch.num_rows, self.pairs_per_row)
        place, distance = jax.random.split(key)
        first = jax.random.randint(place, shape, 0, batch.row_length)
        second = first + jax.random.randint(distance, shape, 1, self.reach + 1)
        is_inside = second < batch.row_length
        second = jnp.minimum(second, batch.row_length - 1)
        user = users_of_tokens(batch)
        assert batch.history_unlabelled is not None  # asked for by `reads_unlabelled`
        known = jnp.where(batch.history_unlabelled, user, 0)  # 0 counts for nothing
        a, b = (jnp.take_along_axis(known, places, 1) for places in (first, second))
        return _Pairs(first, second, a, is_inside & (a == b) & (a > 0))

    def _of_feature(
        self, rows: Float[Array, "R L width"], ids: Int[Array, "R L"], pairs: _Pairs
    ) -> Float[Array, ""]:
        def unit(places: Int[Array, "R P"]) -> Float[Array, "R P width"]:
            x = jnp.take_along_axis(rows, places[..., None], 1).astype(jnp.float32)
            return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _TINY)

        first, second = (jnp.take_along_axis(ids, p, 1) for p in (pairs.first, pairs.second))
        used = pairs.used & (first != second)  # an id is like itself already
        scores = jnp.einsum("raw,rbw->rab", unit(pairs.first), unit(pairs.second))
        is_other = (
            (pairs.user[:, :, None] != pairs.user[:, None])
            & used[:, None]
            & (second[:, None] != first[:, :, None])
            & (second[:, None] != second[:, :, None])
        )
        is_own = jnp.eye(self.pairs_per_row, dtype=bool)
        scores = jnp.where(is_own | is_other, scores / self.temperature, -jnp.inf)
        own = jnp.diagonal(scores, axis1=1, axis2=2)
        by_chance = jnp.log(is_other.sum(-1) + 1.0)
        losses = jax.nn.logsumexp(scores, -1) - own - by_chance
        return jnp.where(used, losses, 0).sum()


def users_of_tokens(batch: RequestBatch) -> Int[Array, "R L"]:
    """Numbers the users of a row from 1 on, by the ranges that reach their tokens; 0 is padding.

    Ranges that overlap are of one user; windows of a user that do not overlap have two numbers.
    """
    mask = batch.target_mask & (batch.history_end > batch.history_start)
    ranges = Ranges(*(jnp.where(mask, x, 0) for x in batch.ranges))
    is_covered = ranges.covered(batch.row_length)
    # Where a range holds the token before as well, its user goes on.
    goes_on = ranges._replace(start=ranges.start + mask).covered(batch.row_length)
    return jnp.where(is_covered, jnp.cumsum(is_covered & ~goes_on, 1), 0)
