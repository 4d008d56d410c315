"""From ids to tokens: embedding tables, and the fusion of features into one token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.models.layers import Linear, SwiGLU, parameter
from stca_jax.schema import Schema


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Widths of the tables, and which features of time a history token has.

    Attributes:
      item_width: Width of the item table; None is the model's width, which needs no projection.
      feature_width: Width of every other table.
      replicated_rows: A trainer keeps tables of at most so many rows on every device, and divides
        larger ones over all devices.
      time_delta: Embed request time - event time (log-spaced buckets). Needs rows of exclusive
        history, since the feature depends on the request.
      recency_index: Embed the number of events between the event and the request (log-spaced
        buckets). Needs rows of exclusive history.
    """

    item_width: int | None = None
    feature_width: int = 16
    replicated_rows: int = 4_096
    time_delta: bool = False
    recency_index: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for widths below 1."""
        for name in ("item_width", "feature_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.replicated_rows < 0:
            raise ValueError(f"replicated_rows is {self.replicated_rows}; it must not be negative")

    def table_widths(self, schema: Schema, width: int) -> dict[str, int]:
        """Width of the table of each vocabulary, for tokens of that width."""
        return {
            name: (self.item_width or width) if name == schema.item else self.feature_width
            for name in schema.vocabularies
        }


class EmbeddingTable(nnx.Module):
    """Rows of one vocabulary; a large one names its row axis, along which it can be divided."""

    def __init__(self, num_rows: int, width: int, *, large: bool = False, rngs: nnx.Rngs):
        # Rows of unit expected norm: at step 0 an item is as similar to itself as queries need.
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / jnp.sqrt(width)

        row_axis = "table_row" if large else None
        self.rows = parameter(rngs, (num_rows, width), (row_axis, "table_width"), init)

    def __call__(self, ids: Int[Array, ...]) -> Float[Array, "... width"]:
        """Looks rows up, in the table's own dtype."""
        return self.rows[...][ids]


class FeatureEmbedding(nnx.Module):
    """One table per vocabulary, shared by all levels that have a feature of that name."""

    def __init__(self, config: EmbeddingConfig, schema: Schema, width: int, *, rngs: nnx.Rngs):
        self.schema = schema
        self.widths = config.table_widths(schema, width)
        self.tables = nnx.Dict(
            {
                name: EmbeddingTable(
                    rows, self.widths[name], large=rows > config.replicated_rows, rngs=rngs
                )
                for name, rows in schema.vocabularies.items()
            }
        )

    def __call__(
        self,
        features: Mapping[str, Array],
        names: Sequence[str],
        embedded: Mapping[str, Float[Array, "... width"]] | None = None,
    ) -> list[Array]:
        """Embeddings of the categorical features and [..., 1] columns of the numeric ones.

        Args:
          features: Ids and numbers, by name.
          names: Which of them, in which order.
          embedded: Embeddings looked up elsewhere, of tables that this module need not hold.
        """
        embedded = embedded or {}

        def embed(name: str) -> Array:
            if name in embedded:
                return embedded[name]
            values = features[name]
            return (
                self.tables[name](values) if self.schema.is_categorical(name) else values[..., None]
            )

        return [embed(name) for name in names]

    def width_of(self, names: Sequence[str]) -> int:
        """Total width of what `__call__` returns for `names`."""
        return sum(self.widths.get(n, 1) for n in names)


class TokenFusion(nnx.Module):
    """x = e_item + SwiGLU([e_item | e_feature | ...]): item and side features become one token.

    The paper does not say how they are fused; this is SequenceO1's form.  An item table of another
    width than the model's is projected first.
    """

    def __init__(
        self, item_width: int, in_width: int, width: int, ffn_ratio: int, *, rngs: nnx.Rngs
    ):
        self.project = None if item_width == width else Linear(item_width, width, rngs=rngs)
        self.ffn = SwiGLU(in_width, ffn_ratio * width, width, rngs=rngs)

    def __call__(self, parts: Sequence[Float[Array, "... part"]]) -> Float[Array, "... width"]:
        """Fuses features; `parts[0]` is the item's embedding."""
        item = parts[0] if self.project is None else self.project(parts[0])
        return item + self.ffn(jnp.concatenate(parts, axis=-1))


_NUM_BUCKETS = 1 + 2 * 31  # zero, and two for each octave of int32
# The first integer in the upper half of each octave.
_UPPER_HALF = np.ceil(2.0 ** (np.arange(31) + 0.5)).astype(np.int32)


def log_bucket(value: Int[Array, ...]) -> Int[Array, ...]:
    """1 + floor(2 log2 value) for positive int32, else 0: log-spaced buckets, two per octave.

    Integer arithmetic gives the same buckets on every device; a floating-point logarithm would not.
    """
    octave = 31 - jax.lax.clz(jnp.maximum(value, 1))
    upper = value >= jnp.asarray(_UPPER_HALF)[octave]
    return jnp.where(value < 1, 0, 1 + 2 * octave + upper)


class TimeFeatures(nnx.Module):
    """Embeddings of how old a history token is, in seconds and in events."""

    def __init__(self, config: EmbeddingConfig, *, rngs: nnx.Rngs):
        def table(used: bool) -> EmbeddingTable | None:
            return EmbeddingTable(_NUM_BUCKETS, config.feature_width, rngs=rngs) if used else None

        self.time_delta = table(config.time_delta)
        self.recency_index = table(config.recency_index)
        self.width = config.feature_width * (config.time_delta + config.recency_index)

    def __call__(self, batch: RequestBatch) -> list[Float[Array, "R L width"]]:
        """Embeds the features that are configured.

        Raises:
          UserError: the batch shares tokens between requests of different times.
        """
        if not self.width:
            return []
        if batch.shared_history:
            raise UserError(
                "time_delta and recency_index depend on the request, but this batch shares history "
                "tokens between requests: set input.rows=request, or both of them false and "
                "model.sequence.recency_score=true"
            )
        request_time, history_end = _owner_values(batch)
        position = jnp.arange(batch.row_length)
        parts = []
        if self.time_delta is not None:
            parts.append(self.time_delta(log_bucket(request_time - batch.history_time)))
        if self.recency_index is not None:
            parts.append(self.recency_index(log_bucket(history_end - 1 - position)))
        return parts


def _owner_values(batch: RequestBatch) -> tuple[Int[Array, "R L"], Int[Array, "R L"]]:
    """Request time and history end of the one request that reads each token.

    Ranges of different requests are disjoint here, so the owner is the latest range begun.
    """
    rows = jnp.arange(batch.num_rows)[:, None]
    used = batch.target_mask & (batch.history_end > batch.history_start)
    start = jnp.where(used, batch.history_start, batch.row_length)  # dropped by the scatter
    slot = jnp.broadcast_to(jnp.arange(batch.targets_per_row), start.shape)
    begun = jnp.full((batch.num_rows, batch.row_length), -1, jnp.int32)
    begun = begun.at[rows, start].max(slot.astype(jnp.int32), mode="drop")
    begun_at = jnp.where(begun >= 0, jnp.arange(batch.row_length), -1)
    latest = jnp.maximum(jax.lax.cummax(begun_at, axis=1), 0)
    owner = jnp.maximum(jnp.take_along_axis(begun, latest, axis=1), 0)
    return (
        jnp.take_along_axis(batch.request_time, owner, axis=1),
        jnp.take_along_axis(batch.history_end, owner, axis=1),
    )


def clear_padding(features: Mapping[str, Array], used: Bool[Array, "R N"]) -> dict[str, Array]:
    """Features with padding set to zero, so that garbage there reaches no value or gradient."""
    return {name: jnp.where(used, values, 0) for name, values in features.items()}
