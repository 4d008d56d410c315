"""LONGER (arXiv 2505.04421): merged tokens, of which the newest are read again by one another.

K adjacent events, counted from the newest, become one token by a linear map of their concatenation;
the oldest token has what is left.  Two global tokens, the target and a learned one, and the newest
k merged tokens are the readers of

    layer 1       all merged tokens of the window
    layers 2..N   the newest k merged tokens

each followed by an FFN, in pre-norm blocks.  A merged token sees itself and those before it and no
global token, so that nothing that is computed of the history depends on targets.  A global token
sees its window and the two global tokens of its target.  z is the target's last state.  In the
paper merged tokens are K times as wide.

Merged tokens interact, so each request needs tokens of its own (input.rows="request").  Cost: L / K
times an FFN and k, shared by a request's targets; FFNs are computed for all merged tokens, as rows
of many requests have no shorter shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.models.layers import LayerNorm, Linear, parameter, recomputed
from stca_jax.models.sequence import SequenceCost, SequenceInput, SequenceOutput
from stca_jax.models.transformer import (
    Block,
    TransformerConfig,
    attention_options,
    window_of_tokens,
)
from stca_jax.ops.attention import target_to_history_attention
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class LongerConfig(TransformerConfig):
    """Shape of the module.

    Attributes:
      merged_events: K, events of a merged token.
      num_recent: k, merged tokens that are readers.
    """

    merged_events: int = 4
    num_recent: int = 100

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> Longer:
        """The module."""
        return Longer(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a history of at least k merged tokens, of which k see all.

        Attention among the k tokens, which does not grow with the history, is left out.
        """
        N, d, K, k = self.num_layers, self.width, self.merged_events, self.num_recent
        weights = (4 + 6 * self.ffn_ratio) * d * d
        readers = bool(N > 1) * 4 * d * k
        per_merged = 2 * K * d * d + N * 4 * d * d + (N - 1) * weights + readers
        of_layer = weights + 4 * d * d + 2 * 4 * d  # keys and values of the global tokens, and them
        return SequenceCost(
            per_token=per_merged // K,
            per_target=2 * (N * of_layer + (N - 1) * 4 * d * k),
            per_pair=2 * 4 * d // K,
            num_layers=N,
        )


class Longer(nnx.Module):
    """The sequence module."""

    def __init__(self, config: LongerConfig, *, remat: bool = False, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.remat = remat
        self.merge = Linear(config.merged_events * d, d, rngs=rngs)
        self.global_token = parameter(rngs, (1, d), (None, "embed"))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.output_norm = LayerNorm(d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Encodes the history of every row and reads it for every target."""
        targets, k = inputs.targets, self.config.num_recent
        merged = merge(inputs.tokens, inputs.ranges, self.config.merged_events)
        x = self.merge(merged.tokens)
        learned = self.global_token[0].astype(targets.dtype)
        # A target and its learned token.
        top = jnp.stack([targets, jnp.broadcast_to(learned, targets.shape)], 2)
        position = jnp.arange(x.shape[1])
        window, ranges = merged.window, merged.ranges
        is_reader = (position >= window.end - k) & (position < window.end)
        past = Ranges(window.start, position + 1)
        for i, block in enumerate(self.blocks):
            if i == 1:
                past = past._replace(start=jnp.maximum(window.start, window.end - k))
                ranges = ranges._replace(start=jnp.maximum(ranges.start, ranges.end - k))
            read = Ranges(*(jnp.where(is_reader, bound, 0) for bound in past))
            is_last = i == len(self.blocks) - 1
            layer = recomputed(functools.partial(_layer, block), self.remat)
            x, top = layer(x, top, None if is_last else read, ranges)
        summary = self.output_norm(top[:, :, 0])
        return SequenceOutput(summary, summary[..., :0])


class Merged(NamedTuple):
    """Events of a row, K at a time.

    Attributes:
      tokens: Concatenated events, oldest first, zero where a token has fewer than K.
      window: For each merged token, the merged tokens of its request; empty for unused ones.
      ranges: Merged tokens of each target.
    """

    tokens: Float[Array, "R G K*D"]
    window: Ranges
    ranges: Ranges


def merge(tokens: Float[Array, "R L D"], ranges: Ranges, num_events: int) -> Merged:
    """Puts every `num_events` events of a request into one token, counted from its newest event.

    Args:
      tokens: Events; requests must not share any.
      ranges: Of each target.
      num_events: K.
    """
    R, L, D = tokens.shape
    K, most = num_events, min(ranges.start.shape[1], L)
    size = (L + (K - 1) * most) // K  # each request may begin with a token that is not full
    rows, position = jnp.arange(R)[:, None], jnp.arange(L)
    window = window_of_tokens(ranges, L)
    is_newest = (window.lengths > 0) & ((window.end - 1 - position) % K == 0)
    before = jnp.pad(jnp.cumsum(is_newest, 1), ((0, 0), (1, 0)))
    slot = jnp.where(is_newest, before[:, :-1], size)
    newest = jnp.zeros((R, size + 1), jnp.int32).at[rows, slot].set(position)[:, :size]
    is_used = jnp.arange(size) < before[:, -1:]

    def of_slots(bound: Array) -> Array:
        in_row = jnp.take_along_axis(bound, newest, 1)
        return jnp.where(is_used, jnp.take_along_axis(before, in_row, 1), 0)

    oldest = jnp.take_along_axis(window.start, newest, 1)
    event = newest[..., None] + jnp.arange(1 - K, 1)
    has_event = (event >= oldest[..., None]) & is_used[..., None]
    gathered = tokens[rows[..., None], jnp.maximum(event, 0)]
    return Merged(
        jnp.where(has_event[..., None], gathered, 0).reshape(R, size, K * D),
        Ranges(of_slots(window.start), of_slots(window.end)),
        Ranges(*(jnp.take_along_axis(before, bound, 1) for bound in ranges)),
    )


def _layer(
    block: Block,
    x: Float[Array, "R G D"],
    top: Float[Array, "R M 2 D"],
    past: Ranges | None,
    ranges: Ranges,
) -> tuple[Float[Array, "R G D"], Float[Array, "R M 2 D"]]:
    """The block for merged tokens and global tokens; keys and values of the former serve both.

    Args:
      block: Its weights.
      x: Merged tokens.
      top: Global tokens, which read their window and each other.
      past: What merged tokens read; None in the last layer, which leaves them as they are.
      ranges: Of each target.
    """
    R, M = top.shape[:2]
    normed, normed_top = block.attention_norm(x), block.attention_norm(top)
    query, key, value = (
        jnp.einsum("rmgd,dhk->rmghk", normed_top, w[...].astype(top.dtype))
        for w in (block.w_query, block.w_key, block.w_value)
    )
    readers = query.reshape(R, 2 * M, *query.shape[3:])
    read = Ranges(*(jnp.repeat(bound, 2, axis=1) for bound in ranges))
    if past is not None:
        of_tokens = jnp.einsum("rgd,dhk->rghk", normed, block.w_query[...].astype(x.dtype))
        readers = jnp.concatenate([of_tokens, readers], 1)
        read = Ranges(*(jnp.concatenate(bounds, 1) for bounds in zip(past, read, strict=True)))
    of_history = target_to_history_attention(
        readers, normed, block.w_key[...], block.w_value[...], read, options=attention_options()
    )
    first = readers.shape[1] - 2 * M
    score = jnp.einsum("rmghk,rmohk->rmgoh", query, key, preferred_element_type=jnp.float32)
    score /= math.sqrt(query.shape[-1])
    history_score = of_history.log_sum_exp[:, first:].reshape(R, M, 2, 1, -1)
    weight = jax.nn.softmax(jnp.concatenate([history_score, score], 3), axis=3).astype(top.dtype)
    attended = weight[:, :, :, 0, :, None] * of_history.output[:, first:].reshape(query.shape)
    attended += jnp.einsum("rmgoh,rmohk->rmghk", weight[:, :, :, 1:], value)
    if past is not None:
        x = _finish(block, x, of_history.output[:, :first].reshape(x.shape))
    return x, _finish(block, top, attended.reshape(top.shape))


def _finish(
    block: Block, x: Float[Array, "... D"], attended: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    x = x + block.w_output(attended)
    return x + block.ffn(block.ffn_norm(x))
