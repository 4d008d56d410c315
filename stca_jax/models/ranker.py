"""The ranker: embed, read the history, mix with side features, score (E1-E10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.models.din import DinConfig
from stca_jax.models.embedding import (
    EmbeddingConfig,
    FeatureEmbedding,
    TimeFeatures,
    TokenFusion,
    clear_padding,
    match_side_features,
)
from stca_jax.models.hstu import HstuConfig
from stca_jax.models.layers import Linear, in_chunks, recomputed
from stca_jax.models.longer import LongerConfig
from stca_jax.models.match_channel import MatchChannel
from stca_jax.models.mixformer import MixFormerConfig
from stca_jax.models.rankmixer import RankMixer, RankMixerConfig
from stca_jax.models.sasrec import SasRecConfig
from stca_jax.models.sdim import SdimConfig
from stca_jax.models.sequence import (
    HistoryReader,
    SequenceConfig,
    SequenceInput,
    SequenceOutput,
)
from stca_jax.models.sequence_o1 import SequenceO1Config
from stca_jax.models.stca import StcaConfig
from stca_jax.models.target_attention import TargetAttentionConfig
from stca_jax.models.top_k import TopKConfig
from stca_jax.models.transact import TransActConfig
from stca_jax.models.transformer import TransformerConfig
from stca_jax.models.ultra_hstu import UltraHstuConfig
from stca_jax.ranges import Ranges
from stca_jax.schema import SECONDS_PER_DAY, Schema


@dataclasses.dataclass(frozen=True)
class RankerConfig:
    """The whole model.

    Attributes:
      sequence: The sequence module; `StcaConfig`, a rival of the same interface, or a class of
        one's own that derives from `SequenceConfig`, by import path.
      embedding: Tables and token features.
      backbone: RankMixer.
      match_channel: Give the target and the backbone exact-match statistics of the target's ids
        over its own range: what feature stores call user-item cross counts.
      match_decay_days: Time constant of the decayed match count, of the item alone, as is the age
        of the last match.
      match_time_scales_days: With any, the complete match channel instead: for every id field the
        count, its share of the window, a decayed count of each of these time constants, and the
        age of the last match. It goes to the backbone alone: in the target's token so many numbers
        would drown what the attention compares.
      match_soft_counts: Beside the exact counts, soft ones for every id field but the item, to
        which an event adds the more the more its row is like the target's, by a learned sharpness
        (`stca_jax.ops.soft_match`).
      features: Features of the dataset that the model reads besides the item; None is all of them.
      dtype: Compute dtype. Parameters, softmax, statistics and losses are float32 in any case.
      remat: What the backward pass computes again instead of keeping it: "none", the fusion of
        "history" tokens (the widest activations, for 1/N of the forward pass), or "all": that,
        every layer of the sequence module and every block of the backbone. (The attention op keeps
        neither scores nor encoded tokens in any case, unless by kernels.)
    """

    sequence: (
        StcaConfig
        | DinConfig
        | HstuConfig
        | LongerConfig
        | MixFormerConfig
        | SasRecConfig
        | SdimConfig
        | SequenceO1Config
        | TargetAttentionConfig
        | TopKConfig
        | TransActConfig
        | TransformerConfig
        | UltraHstuConfig
        | SequenceConfig
    ) = StcaConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    backbone: RankMixerConfig = RankMixerConfig()
    match_channel: bool = True
    match_decay_days: float = 28.0
    match_time_scales_days: tuple[float, ...] = ()
    match_soft_counts: bool = False
    features: tuple[str, ...] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "history", "all"] = "none"

    def __post_init__(self) -> None:
        """Raises ValueError for a decay that is not positive."""
        if not self.match_decay_days > 0:
            raise ValueError(f"match_decay_days is {self.match_decay_days}; it must be positive")
        if not all(days > 0 for days in self.match_time_scales_days):
            raise ValueError(
                f"match_time_scales_days are {self.match_time_scales_days}; each must be positive"
            )

    @property
    def needs_exclusive_history(self) -> bool:
        """Whether history tokens depend on the request, so that requests cannot share them."""
        of_time = self.embedding.time_delta or self.embedding.recency_index
        return of_time or self.sequence.needs_exclusive_history

    @property
    def match_decay_seconds(self) -> tuple[float, ...]:
        """Time constants of the decayed match counts."""
        scales = self.match_time_scales_days or (self.match_decay_days,)
        return tuple(days * SECONDS_PER_DAY for days in scales)

    def read_schema(self, schema: Schema) -> Schema:
        """What the model reads of a dataset.

        Raises:
          UserError: `features` has a name that the dataset lacks.
        """
        if self.features is None:
            return schema
        try:
            return schema.select(self.features)
        except ValueError as error:
            raise UserError(f"model.features is {', '.join(self.features)}: {error}") from error


def paper_config(sequence: StcaConfig | None = None) -> RankerConfig:
    """The preset `paper`: E1-E9 with time-delta and recency tokens, without our three additions.

    Args:
      sequence: Shape of the sequence module; its additions are switched off.
    """
    return RankerConfig(
        sequence=dataclasses.replace(
            sequence or StcaConfig(),
            initialization="independent",
            skip_paths=False,
            count_channel=False,
            temperature_length=None,
            attention_sink=False,
            recency_score=False,
        ),
        embedding=EmbeddingConfig(time_delta=True, recency_index=True),
        match_channel=False,
    )


class RankerOutput(NamedTuple):
    """What the model makes of a batch.

    Attributes:
      logits: float32; padding slots hold finite numbers without meaning.
      tokens: History tokens, zero where no range covers them.
      targets: Target tokens x_t.
    """

    logits: Float[Array, "R M tasks"]
    tokens: Float[Array, "R L D"]
    targets: Float[Array, "R M D"]


class Candidates(NamedTuple):
    """What is scored against a history.

    Attributes:
      target: Features of the candidates, by name.
      request: Features of the request, by name.
      statistics: Columns of the match channel; empty without one.
      embedded: Embeddings by level and name of tables that are not looked up here.
    """

    target: Mapping[str, Array]
    request: Mapping[str, Array]
    statistics: list[Float[Array, "R M columns"]]
    embedded: Mapping[str, Mapping[str, Float[Array, "R M width"]]]


def similarity_config(sequence: StcaConfig | None = None) -> RankerConfig:
    """The preset `similarity`: what lets the attention find what is like the target.

    Skip paths, tables that start from co-occurrence, and the complete match channel with soft
    counts; each is measured in docs/similarity.md.

    Args:
      sequence: Shape of the sequence module; its skip paths are switched on.
    """
    return RankerConfig(
        sequence=dataclasses.replace(sequence or StcaConfig(), skip_paths=True),
        embedding=EmbeddingConfig(initialization="cooccurrence"),
        match_time_scales_days=(1.0, 7.0, 28.0, 90.0),
        match_soft_counts=True,
    )


class Ranker(nnx.Module):
    """Scores every target of a batch; one logit per task."""

    def __init__(self, config: RankerConfig, schema: Schema, *, rngs: nnx.Rngs):
        self.config = config
        self.schema = schema = config.read_schema(schema)
        d, ratio = config.sequence.width, config.sequence.ffn_ratio
        self.embedding = FeatureEmbedding(config.embedding, schema, d, rngs=rngs)
        self.time_features = TimeFeatures(config.embedding, rngs=rngs)
        # The item first: it is what TokenFusion adds.
        self.history_names = _item_first(schema, schema.history)
        self.target_names = _item_first(schema, schema.target)
        self.match_channel = _match_channel(config, schema, rngs) if config.match_channel else None
        history_widths = self.embedding.widths_of(self.history_names) | self.time_features.widths
        target_widths = self.embedding.widths_of(self.target_names)
        if self.match_channel is not None and not self.match_channel.is_complete:
            target_widths["match statistics"] = self.match_channel.num_exact
        linear = config.embedding.linear_path
        self.history_fusion = TokenFusion(history_widths, d, ratio, linear_path=linear, rngs=rngs)
        self.target_fusion = TokenFusion(target_widths, d, ratio, linear_path=linear, rngs=rngs)
        match_side_features(self.history_fusion, self.target_fusion, rngs)
        self.sequence = config.sequence.make(remat=config.remat == "all", rngs=rngs)
        # Tokens of E8: z, the user's, the candidate's.
        widths = {"summary": d, "target": d}
        if schema.request:
            widths["request"] = sum(self.embedding.widths_of(schema.request).values())
        self.number_names = tuple(n for n in schema.target if not schema.is_categorical(n))
        num_numbers = len(self.number_names) + self.num_statistics + config.sequence.num_counts
        if num_numbers:
            widths["numbers"] = num_numbers
        self.token_names = tuple(widths)  # the order of RankMixer's tokens; nnx.Dict keeps none
        mixer_width = -(-d // len(widths)) * len(widths)
        self.token_maps = nnx.Dict(
            {n: Linear(w, mixer_width, rngs=rngs, use_bias=True) for n, w in widths.items()}
        )
        self.backbone = RankMixer(
            config.backbone, len(widths), mixer_width, remat=config.remat == "all", rngs=rngs
        )
        self.head = Linear(
            mixer_width, len(schema.tasks), rngs=rngs, logical_axes=("embed", None), use_bias=True
        )
        if isinstance(config.sequence, StcaConfig) and config.sequence.initialization == "scaled":
            self.head.weight[...] = jnp.zeros_like(self.head.weight[...])

    @property
    def num_statistics(self) -> int:
        """Columns of the match channel."""
        return 0 if self.match_channel is None else self.match_channel.num_columns

    def __call__(
        self,
        batch: RequestBatch,
        embedded: Mapping[str, Mapping[str, Float[Array, "R N width"]]] | None = None,
    ) -> Float[Array, "R M tasks"]:
        """The logits of `forward`, with the same arguments."""
        return self.forward(batch, embedded).logits

    def forward(
        self,
        batch: RequestBatch,
        embedded: Mapping[str, Mapping[str, Float[Array, "R N width"]]] | None = None,
    ) -> RankerOutput:
        """Logits and tokens.

        Args:
          batch: What to score.
          embedded: Embeddings by level and name of tables that are not looked up here, as those
            that a trainer divides over its devices.

        Raises:
          ValueError: token features or the sequence module need rows of exclusive history and the
            batch shares it.
        """
        if batch.shared_history and self.config.sequence.needs_exclusive_history:
            raise UserError(
                f"{type(self.config.sequence).__name__} lets history tokens interact, but this "
                "batch shares them between requests of different times: use "
                "--config.input.rows=request"
            )
        batch = _without_garbage(batch)
        embedded = embedded or {}
        tokens = self.encode_history(
            batch.history, embedded.get("history"), self.time_features(batch)
        )
        # Row 0 of a table and a fusion with biases are not zero, though padding's features are.
        covered = batch.ranges.covered(batch.row_length)
        tokens = jnp.where(covered[..., None], tokens, 0)

        def read(targets: Array) -> SequenceOutput:
            times = batch.history_time, batch.request_time
            return self.sequence(SequenceInput(tokens, targets, *times, batch.ranges))

        statistics = self._match_statistics(batch, embedded)
        candidates = Candidates(batch.target, batch.request, statistics, embedded)
        logits, targets = self.score(read, candidates)
        return RankerOutput(logits, tokens, targets)

    def encode_history(
        self,
        history: Mapping[str, Array],
        embedded: Mapping[str, Float[Array, "*T width"]] | None = None,
        time_parts: Sequence[Float[Array, "*T width"]] = (),
    ) -> Float[Array, "*T D"]:
        """Tokens of events; each depends on its own event alone.

        Args:
          history: Features of the events, by name.
          embedded: Embeddings of tables that are not looked up here.
          time_parts: From `time_features`, if the model has any.
        """
        parts = self.embedding(history, self.history_names, embedded)
        fuse = recomputed(self.history_fusion, self.config.remat != "none")
        return fuse(_cast([*parts, *time_parts], jnp.dtype(self.config.dtype)))

    def score(
        self, read: HistoryReader, candidates: Candidates
    ) -> tuple[Float[Array, "R M tasks"], Float[Array, "R M D"]]:
        """Logits of candidates against a history, however it was encoded, and their tokens.

        Args:
          read: The history, as targets read it.
          candidates: What is scored.
        """
        dtype = jnp.dtype(self.config.dtype)
        target, request, statistics, embedded = candidates
        target_parts = self.embedding(target, self.target_names, embedded.get("target"))
        if not self.config.match_time_scales_days:
            target_parts += statistics[:1]  # of exact matches
        targets = in_chunks(self.target_fusion, _cast(target_parts, dtype))
        gathered = read(targets)
        numbers = [target[n][..., None] for n in self.number_names]
        sources: Mapping[str, list[Array]] = {
            "summary": [gathered.summary],
            "target": [targets],
            "request": self.embedding(request, self.schema.request, embedded.get("request")),
            "numbers": [*numbers, *statistics, gathered.counts],
        }
        return in_chunks(self._read_out, sources), targets

    def _read_out(
        self, sources: Mapping[str, list[Float[Array, "*N width"]]]
    ) -> Float[Array, "*N tasks"]:
        """E8 and E9: logits of targets, from what the backbone's tokens are made of."""
        dtype = jnp.dtype(self.config.dtype)
        tokens = [
            self.token_maps[name](jnp.concatenate(_cast(sources[name], dtype), -1))
            for name in self.token_names
        ]
        return self.head(self.backbone(jnp.stack(tokens)).astype(jnp.float32))

    def _match_statistics(
        self, batch: RequestBatch, embedded: Mapping[str, Mapping[str, Array]]
    ) -> list[Float[Array, "R M columns"]]:
        if self.match_channel is None:
            return []

        def embed(level: str, names: tuple[str, ...]) -> Float[Array, "R N F W"]:
            features = batch.target if level == "target" else batch.history
            return jnp.stack(self.embedding(features, names, embedded.get(level)), axis=-2)

        return self.match_channel(batch, embed)


def _match_channel(config: RankerConfig, schema: Schema, rngs: nnx.Rngs) -> MatchChannel:
    return MatchChannel(
        schema,
        config.match_decay_seconds,
        is_complete=bool(config.match_time_scales_days),
        has_soft_counts=config.match_soft_counts,
        rngs=rngs,
    )


def _item_first(schema: Schema, names: tuple[str, ...]) -> tuple[str, ...]:
    return (schema.item, *(n for n in names if n != schema.item))


def _cast(parts: list[Array], dtype: jnp.dtype) -> list[Array]:
    return [p.astype(dtype) for p in parts]


def _without_garbage(batch: RequestBatch) -> RequestBatch:
    """Zeroes whatever stands in padding, before it can meet a product."""
    mask = batch.target_mask
    ranges = Ranges(*(jnp.where(mask, x, 0) for x in batch.ranges))
    covered = ranges.covered(batch.row_length)
    return batch.replace(
        history=clear_padding(batch.history, covered),
        history_time=jnp.where(covered, batch.history_time, 0),
        target=clear_padding(batch.target, mask),
        request=clear_padding(batch.request, mask),
        request_time=jnp.where(mask, batch.request_time, 0),
        history_start=ranges.start,
        history_end=ranges.end,
    )
