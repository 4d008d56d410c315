"""From ids to tokens: embedding tables, and the fusion of features into one token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.models.layers import Linear, SwiGLU, parameter, zeros
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
      initialization: What rows start from: "random", or "cooccurrence", a factorisation of which
        ids occur together in the training-time histories (`stca_jax.input.cooccurrence`): the whole
        row of a side feature, and a share of an item's, the rest staying random so that every item
        is told from any other. A trainer does it; a model made by hand starts at random.
      cooccurrence_share: That share, of the item's columns and of its square norm.
      linear_path: Add to a token a linear map of each side feature, x = e_item + sum_f e_f W_f +
        SwiGLU(...): of small entries the SwiGLU alone is a quadratic form, in which a side feature
        moves a token by a hundredth of what its item does. A feature of both history and target
        starts with the same isometry on both sides, so that equal ids are alike from the start and
        similar rows are similar; the other maps start at zero.
      recency_index: Embed the number of events between the event and the request (log-spaced
        buckets). Needs rows of exclusive history.
    """

    item_width: int | None = None
    feature_width: int = 16
    replicated_rows: int = 4_096
    time_delta: bool = False
    recency_index: bool = False
    linear_path: bool = False
    initialization: Literal["random", "cooccurrence"] = "random"
    cooccurrence_share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for widths below 1."""
        for name in ("item_width", "feature_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.cooccurrence_share <= 1:
            raise ValueError(
                f"cooccurrence_share is {self.cooccurrence_share}; it must be in (0, 1]"
            )
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

    def widths_of(self, names: Sequence[str]) -> dict[str, int]:
        """Widths of what `__call__` returns for `names`."""
        return {name: self.widths.get(name, 1) for name in names}


class TokenFusion(nnx.Module):
    """x = e_item + SwiGLU([e_item | e_feature | ...]): item and side features become one token.

    The paper does not say how they are fused; this is SequenceO1's form.  An item table of another
    width than the model's is projected first.  With `linear_path`, + sum_f e_f W_f.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        width: int,
        ffn_ratio: int,
        *,
        linear_path: bool = False,
        rngs: nnx.Rngs,
    ):
        """Args: widths of the parts by name, the item's first; of the token; of the FFN over it."""
        item_width, *_ = widths.values()
        _, *self.side_names = widths
        self.project = None if item_width == width else Linear(item_width, width, rngs=rngs)
        self.ffn = SwiGLU(sum(widths.values()), ffn_ratio * width, width, rngs=rngs)
        self.side = nnx.Dict(
            {
                name: parameter(rngs, (widths[name], width), (None, "embed"), zeros)
                for name in self.side_names
                if linear_path
            }
        )

    def __call__(self, parts: Sequence[Float[Array, "... part"]]) -> Float[Array, "... width"]:
        """Fuses features, in the order of the widths."""
        x = parts[0] if self.project is None else self.project(parts[0])
        x += self.ffn(jnp.concatenate(parts, axis=-1))
        for name, part in zip(self.side_names, parts[1:], strict=True):
            if name in self.side:
                x += part @ self.side[name][...].astype(part.dtype)
        return x


def match_side_features(history: TokenFusion, target: TokenFusion, rngs: nnx.Rngs) -> None:
    """Starts the linear paths of features that both have as the same isometry."""
    for name in target.side:
        if name in history.side:
            shape = target.side[name][...].shape
            isometry = nnx.initializers.orthogonal()(rngs.params(), shape)
            history.side[name][...] = target.side[name][...] = isometry


NUM_BUCKETS = 1 + 2 * 31  # zero, and two for each octave of int32
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
            return EmbeddingTable(NUM_BUCKETS, config.feature_width, rngs=rngs) if used else None

        self.time_delta = table(config.time_delta)
        self.recency_index = table(config.recency_index)
        used = {"time_delta": config.time_delta, "recency_index": config.recency_index}
        # Not the name of a dataset's feature.
        self.widths = {f"token {n}": config.feature_width for n, is_used in used.items() if is_used}

    def __call__(self, batch: RequestBatch) -> list[Float[Array, "R L width"]]:
        """Embeds the features that are configured.

        Raises:
          UserError: the batch shares tokens between requests of different times.
        """
        if not self.widths:
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
