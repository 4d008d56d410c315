"""A causal Transformer over each request's history, which its targets read: a self-attention rival.

Blocks of x += attention(LN(x)), x += SwiGLU(LN(x)).  An event attends to itself and to those before
it; a target attends to its range, with the same weights, but is seen by no one.  Order is known by
causality, and by `embedding.recency_index` and `embedding.time_delta` if configured.

A token's state depends on where its window begins.  So a row may hold many requests, but each has
tokens of its own (input.rows="request"): a user's requests cannot share them, nor can several
windows of one request.

Cost: 2 d L^2 FLOPs per block and request of L events, against 20 d^2 L of its weights: at d = 64
they are equal at 640 events, and at 10,000 attention is 94 % of the work.  Memory is linear in L.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from stca_jax.models.layers import LayerNorm, Linear, SwiGLU, parameter, recomputed
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.ops.attention import (
    AttentionOptions,
    best_implementation,
    target_to_history_attention,
)
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges


def attention_options() -> AttentionOptions:
    """Large tiles for XLA: neighbouring events have nearly equal ranges. Kernels know theirs."""
    is_xla = best_implementation() == "xla"
    return AttentionOptions(
        "projected", block_sizes=BlockSizes(512, history=256, targets=128) if is_xla else None
    )


@dataclasses.dataclass(frozen=True)
class TransformerConfig(SequenceConfig):
    """Shape of the Transformer.

    Attributes:
      num_layers: Blocks. Events pass through all but the last, of which they are only read.
      num_heads: Must divide `width`.
    """

    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    @property
    def needs_exclusive_history(self) -> bool:
        """True: events interact."""
        return True

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> nnx.Module:
        """The module."""
        return Transformer(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs; every weight multiplies targets, and events but for the last block's."""
        N, d = self.num_layers, self.width
        keys_and_values = 4 * d * d
        rest = (4 + 6 * self.ffn_ratio) * d * d
        return SequenceCost(
            per_token=N * keys_and_values + (N - 1) * rest,
            per_target=N * rest,
            per_pair=N * 4 * d,
            per_token_pair=(N - 1) * 4 * d,
            num_layers=N,
        )


class Block(nnx.Module):
    """Attention of N readers to ranges of L tokens, and an FFN."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        d, axes = config.width, ("embed", "head", "head_width")
        shape = (d, config.num_heads, head_width(d, config.num_heads))
        self.attention_norm = LayerNorm(d, rngs=rngs)
        self.w_query = parameter(rngs, shape, axes)
        self.w_key = parameter(rngs, shape, axes)
        self.w_value = parameter(rngs, shape, axes)
        self.w_output = Linear(d, d, rngs=rngs)
        self.ffn_norm = LayerNorm(d, rngs=rngs)
        self.ffn = SwiGLU(d, config.ffn_ratio * d, d, rngs=rngs)

    def __call__(
        self,
        readers: Float[Array, "R N D"],
        tokens: Float[Array, "R L D"],
        ranges: Ranges,
    ) -> Float[Array, "R N D"]:
        """The readers' next state."""
        query = self.attention_norm(readers)
        attended = target_to_history_attention(
            jnp.einsum("rnd,dhk->rnhk", query, self.w_query[...].astype(query.dtype)),
            self.attention_norm(tokens),
            self.w_key[...],
            self.w_value[...],
            ranges,
            options=attention_options(),
        )
        x = readers + self.w_output(attended.output.reshape(readers.shape))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nnx.Module):
    """The sequence module."""

    def __init__(self, config: TransformerConfig, *, remat: bool = False, rngs: nnx.Rngs):
        self.remat = remat
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.output_norm = LayerNorm(config.width, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Encodes the history of every row and reads it for every target."""
        L = inputs.tokens.shape[1]
        past = past_of_tokens(inputs.ranges, L)
        ranges = Ranges(*(jnp.concatenate(x, 1) for x in zip(past, inputs.ranges, strict=True)))
        x = jnp.concatenate([inputs.tokens, inputs.targets], 1)
        for block in self.blocks[:-1]:
            x = recomputed(block, self.remat)(x, x[:, :L], ranges)
        targets = recomputed(self.blocks[-1], self.remat)(x[:, L:], x[:, :L], inputs.ranges)
        summary = self.output_norm(targets)
        return SequenceOutput(summary, summary[..., :0])


def past_of_tokens(ranges: Ranges, row_length: int) -> Ranges:
    """Ranges of the tokens: from the start of the request's range to the token itself.

    As in `window_of_tokens`, whose rules hold.
    """
    window = window_of_tokens(ranges, row_length)
    past_end = jnp.arange(1, row_length + 1)
    return Ranges(window.start, jnp.where(window.lengths > 0, past_end, 0))


def window_of_tokens(ranges: Ranges, row_length: int) -> Ranges:
    """Ranges of the tokens: the whole range of the request that each is of.

    Ranges of different requests must be disjoint, and those of one request equal.  Tokens that no
    range covers have an empty range.
    """
    num_rows = len(ranges.start)
    rows = jnp.arange(num_rows)[:, None]
    place = jnp.where(ranges.lengths > 0, ranges.start, row_length)
    covered = ranges.covered(row_length)

    def spread(bound: Array) -> Array:
        begun = jnp.zeros((num_rows, row_length + 1), jnp.int32)
        spread = lax.cummax(begun.at[rows, place].max(bound), axis=1)[:, :-1]
        return jnp.where(covered, spread, 0)

    return Ranges(spread(ranges.start), spread(ranges.end))
