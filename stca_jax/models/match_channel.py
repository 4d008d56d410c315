"""The match channel: how much of a target's range carries its ids, or ids like them."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.models.layers import parameter
from stca_jax.models.stca import COUNT_SCALE, log_count
from stca_jax.ops.match import MatchStatistics, match_statistics
from stca_jax.ops.soft_match import INITIAL_SHARPNESS, soft_counts
from stca_jax.schema import SECONDS_PER_DAY, Schema

_AGE_OF_NO_MATCH = 3_650.0  # days

# Rows of fields at a level, "history" or "target", side by side.
EmbedFields = Callable[[str, tuple[str, ...]], Float[Array, "R N F W"]]


class MatchChannel(nnx.Module):
    """Columns of match statistics, as the model reads them.

    Attributes:
      fields: Id fields that are counted; the item first.
      soft_fields: Those with soft counts: all but the item, whose likeness is what the attention
        finds.
      decay_seconds: Time constants of the decayed counts.
      num_exact: Columns of exact matches.
      num_columns: All columns; those of soft counts come last.
    """

    def __init__(
        self,
        schema: Schema,
        decay_seconds: tuple[float, ...],
        *,
        is_complete: bool,
        has_soft_counts: bool,
        rngs: nnx.Rngs,
    ):
        """Args: see `RankerConfig`; incomplete are decayed count and age of the item alone."""
        self.fields = fields = schema.match_fields
        self.decay_seconds = decay_seconds
        self.is_complete = is_complete
        self.soft_fields = tuple(f for f in fields if has_soft_counts and f != schema.item)
        per_field = 3 + len(decay_seconds)
        self.num_exact = len(fields) * per_field if is_complete else len(fields) + 2
        self.num_columns = self.num_exact + len(self.soft_fields)

        def init(_: Array, shape: tuple[int, ...]) -> Array:
            return jnp.full(shape, INITIAL_SHARPNESS)

        num_soft = len(self.soft_fields)
        self.sharpness = parameter(rngs, (num_soft,), (None,), init) if num_soft else None

    def __call__(
        self, batch: RequestBatch, embed: EmbedFields
    ) -> list[Float[Array, "R M columns"]]:
        """Columns of a batch's targets.

        Args:
          batch: With padding cleared.
          embed: Looks up the rows of soft counts.
        """
        match = match_statistics(
            {n: batch.target[n] for n in self.fields},
            {n: batch.history[n] for n in self.fields},
            batch.history_time,
            batch.request_time,
            batch.ranges,
            decay_seconds=self.decay_seconds,
        )
        soft = None
        if self.sharpness is not None:
            targets, events = (embed(x, self.soft_fields) for x in ("target", "history"))
            soft = soft_counts(targets, events, self.sharpness[...], batch.ranges)
        return self.columns(match, batch.ranges.lengths, soft)

    def columns(
        self,
        match: MatchStatistics,
        num_events: Int[Array, "R M"],
        soft: Float[Array, "R M S"] | None,
    ) -> list[Float[Array, "R M columns"]]:
        """What the model reads of statistics: shares of the window, and the rest in logs.

        Args:
          match: Of the fields.
          num_events: In each target's range.
          soft: Soft counts of the soft fields, if there are any.
        """
        columns = self._exact_columns(match, num_events)
        return columns if soft is None else [*columns, COUNT_SCALE * soft]

    def _exact_columns(
        self, match: MatchStatistics, num_events: Int[Array, "R M"]
    ) -> list[Float[Array, "R M columns"]]:
        age_days = jnp.minimum(match.last_age / SECONDS_PER_DAY, _AGE_OF_NO_MATCH)
        if not self.is_complete:
            of_item = match.decayed_matches[..., 0, :1], age_days[..., :1]
            return [log_count(jnp.concatenate([match.matches, *of_item], -1))]
        decayed = match.decayed_matches.reshape(*match.matches.shape[:2], -1)
        share = match.matches / jnp.maximum(num_events, 1)[..., None]
        return [log_count(jnp.concatenate([match.matches, decayed, age_days], -1)), share]
