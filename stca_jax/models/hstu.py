"""HSTU as a ranker (arXiv 2402.17152): gated self-attention without softmax; targets are appended.

Per layer, with x' = LN(x):

    [U | V | Q | K] = SiLU(x' W + b)
    A = SiLU(Q K^T / sqrt(d_h) + bias) / max_length      over what the reader may see
    y = x + (LN(A V) * U) W_o

An event sees itself and those before it, a target its range and itself, and nobody sees a target.
`max_length` is a constant: divided by the length of its row, a score would depend on row-mates.
The relative bias has a value for each head and logarithmic bucket of the time and of the number of
events between reader and token; the paper's has one for each distance, without heads.

Events interact, so each request needs tokens of its own (input.rows="request").  Cost: 2 d L^2
FLOPs per layer and request of L events, beside 10 d^2 L; memory is linear in L.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stca_jax.models.embedding import NUM_BUCKETS, log_bucket
from stca_jax.models.layers import LayerNorm, Linear, parameter, recomputed, zeros
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.models.transformer import window_of_tokens
from stca_jax.ops.range_sum import range_sum
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class HstuConfig(SequenceConfig):
    """Shape of HSTU; it has no FFN, so that `ffn_ratio` is that of the token fusion alone.

    Attributes:
      num_layers: Layers. Events pass through all but the last, of which they are only read.
      num_heads: Must divide `width`.
      relative_bias: Add a learned bias of time and distance to the scores.
      max_length: What the weights are divided by, whatever the length of a history.
    """

    num_layers: int = 2
    num_heads: int = 4
    relative_bias: bool = True
    max_length: int = 4_096

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    @property
    def needs_exclusive_history(self) -> bool:
        """True: events interact."""
        return True

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> Hstu:
        """The module."""
        return Hstu(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs; every weight multiplies targets, and events but for the last layer's output."""
        N, d = self.num_layers, self.width
        return SequenceCost(
            per_token=N * 8 * d * d + (N - 1) * 2 * d * d,
            per_target=N * 10 * d * d,
            per_pair=N * 4 * d,
            per_token_pair=(N - 1) * 4 * d,
            num_layers=N,
        )


class Readers(NamedTuple):
    """Who reads the history, for the relative bias.

    Attributes:
      time: Of an event, its own; of a target, its request's.
      position: Of an event, its own in the row; of a target, one past its range.
    """

    time: Int[Array, "R N"]
    position: Int[Array, "R N"]

    @classmethod
    def of(cls, inputs: SequenceInput) -> Readers:
        """The events, and behind them the targets."""
        position = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape[:2])
        return cls(
            jnp.concatenate([inputs.history_time, inputs.request_time], 1),
            jnp.concatenate([position, inputs.ranges.end], 1),
        )


class _Bias(NamedTuple):
    """Learned scores by logarithmic bucket."""

    time: Float[Array, "buckets H"]
    position: Float[Array, "buckets H"]


class HstuLayer(nnx.Module):
    """One layer for the events and the targets behind them."""

    def __init__(self, config: HstuConfig, *, rngs: nnx.Rngs):
        d, H = config.width, config.num_heads
        self.num_heads = H
        self.max_length = config.max_length
        self.norm = LayerNorm(d, rngs=rngs)
        self.projection = Linear(d, 4 * d, rngs=rngs, logical_axes=("embed", "mlp"), use_bias=True)
        self.attended_norm = LayerNorm(d, rngs=rngs)
        self.output = Linear(d, d, rngs=rngs)

        def bias() -> nnx.Param | None:
            shape, axes = (NUM_BUCKETS, H), (None, "head")
            return parameter(rngs, shape, axes, zeros) if config.relative_bias else None

        self.time_bias, self.position_bias = bias(), bias()

    def __call__(
        self,
        x: Float[Array, "R L+M D"],
        readers: Readers,
        ranges: tuple[Ranges, ...],
        num_tokens: int,
    ) -> Float[Array, "R L+M D"]:
        """The next state of events and targets.

        Args:
          x: Events, and behind them targets.
          readers: The same.
          ranges: What each of them reads: disjoint parts, one or more.
          num_tokens: L.
        """
        gate, value, query, key = jnp.split(jax.nn.silu(self.projection(self.norm(x))), 4, -1)

        def heads(x: Array) -> Float[Array, "R N H K"]:
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        query, key, value = map(heads, (query, key, value))
        bias = None
        if self.time_bias is not None and self.position_bias is not None:
            bias = _Bias(self.time_bias[...], self.position_bias[...])
        tokens = (key, value, readers.time, readers.position)
        targets = (query, readers.time, readers.position)
        attended = sum(
            range_sum(_attend, bias, targets, tuple(t[:, :num_tokens] for t in tokens), part)
            for part in ranges
        )
        # What a target adds to its range: itself.
        M = x.shape[1] - num_tokens
        query, key, value = (t[:, num_tokens:] for t in (query, key, value))
        score = (query * key).astype(jnp.float32).sum(-1) / math.sqrt(query.shape[-1])
        if bias is not None:
            score += bias.time[0] + bias.position[0]
        itself = jax.nn.silu(score)[..., None] * value.astype(jnp.float32)
        attended += jnp.pad(itself, ((0, 0), (num_tokens, 0), (0, 0), (0, 0)))
        attended = (
            (attended / self.max_length).astype(x.dtype).reshape(-1, num_tokens + M, x.shape[2])
        )
        return x + self.output(self.attended_norm(attended) * gate)


def _attend(
    bias: _Bias | None,
    readers: tuple[Array, Array, Array],
    tokens: tuple[Array, Array, Array, Array],
    in_range: Bool[Array, "C T"],
) -> Float[Array, "C H K"]:
    """Of a pair of tiles: SiLU(scores) times values."""
    query, time, position = readers
    key, value, token_time, token_position = tokens
    score = jnp.einsum("chk,thk->hct", query, key, preferred_element_type=jnp.float32)
    score /= math.sqrt(query.shape[-1])
    if bias is not None:
        of_time = bias.time[log_bucket(time[:, None] - token_time)]
        of_position = bias.position[log_bucket(position[:, None] - token_position)]
        score += jnp.moveaxis(of_time + of_position, -1, 0)
    weight = jnp.where(in_range, jax.nn.silu(score), 0).astype(value.dtype)
    return jnp.einsum("hct,thk->chk", weight, value, preferred_element_type=jnp.float32)


class Hstu(nnx.Module):
    """The sequence module."""

    def __init__(self, config: HstuConfig, *, remat: bool = False, rngs: nnx.Rngs):
        self.remat = remat
        self.layers = nnx.List([HstuLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.output_norm = LayerNorm(config.width, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Encodes the history of every row and reads it for every target."""
        L = inputs.tokens.shape[1]
        window = window_of_tokens(inputs.ranges, L)
        x = jnp.concatenate([inputs.tokens, inputs.targets], 1)
        readers = Readers.of(inputs)
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            ranges = self.parts(i, window, inputs.ranges, is_last)

            def of_layer(
                x: Array, readers: Readers, ranges: tuple, layer: HstuLayer = layer
            ) -> Array:
                return layer(x, readers, ranges, L)

            x = recomputed(of_layer, self.remat)(x, readers, ranges)
        summary = self.output_norm(x[:, L:])
        return SequenceOutput(summary, summary[..., :0])

    def parts(
        self, layer: int, window: Ranges, targets: Ranges, is_last: bool
    ) -> tuple[Ranges, ...]:
        """What events and targets read in a layer, in disjoint parts.

        Args:
          layer: Its index.
          window: For each event, the range of its request.
          targets: Ranges of the targets.
          is_last: Events read nothing in the last layer, as none reads them.
        """
        del layer
        return (join(nothing(window) if is_last else past_of_window(window), targets),)


def past_of_window(window: Ranges) -> Ranges:
    """For each event, its window up to itself; empty if it lies outside."""
    position = jnp.arange(window.start.shape[1])
    is_inside = (position >= window.start) & (position < window.end)
    return Ranges(jnp.where(is_inside, window.start, 0), jnp.where(is_inside, position + 1, 0))


def join(tokens: Ranges, targets: Ranges) -> Ranges:
    """The ranges of events, and behind them those of targets."""
    return Ranges(*(jnp.concatenate(x, 1) for x in zip(tokens, targets, strict=True)))


def nothing(ranges: Ranges) -> Ranges:
    """As many empty ranges."""
    return Ranges(jnp.zeros_like(ranges.start), jnp.zeros_like(ranges.end))
