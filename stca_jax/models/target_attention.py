"""Target attention: one softmax layer in which each target reads its range; the plainest rival.

    o_j = softmax((t W_Q^j) (X W_K^j)^T / sqrt(d_h)) X W_V^j       per head j
    z = [o_1 | ... | o_h | t] W

Tokens are read as they are: there is no FFN over the history, and no second layer.  History tokens
never interact, so requests share rows exactly.  Cost: L, shared by a request's targets.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.models.layers import Linear, parameter
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.ops.attention import AttentionOptions, target_to_history_attention
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class TargetAttentionConfig(SequenceConfig):
    """Shape of the layer; it has no FFN, so that `ffn_ratio` is that of the token fusion alone.

    Attributes:
      num_heads: Must divide `width`.
    """

    num_heads: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> TargetAttention:
        """The module; there is nothing that is worth computing again."""
        return TargetAttention(self, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs."""
        d = self.width
        return SequenceCost(per_token=4 * d * d, per_target=6 * d * d, per_pair=4 * d)


class Reader(nnx.Module):
    """A layer of multi-head attention from targets to tokens, without an output map."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        shape = (width, num_heads, head_width(width, num_heads))
        axes = ("embed", "head", "head_width")
        self.w_query = parameter(rngs, shape, axes)
        self.w_key = parameter(rngs, shape, axes)
        self.w_value = parameter(rngs, shape, axes)

    def __call__(
        self, targets: Float[Array, "R M D"], tokens: Float[Array, "R L D"], ranges: Ranges
    ) -> Float[Array, "R M D"]:
        """What each target gathers; zero for an empty range."""
        attended = target_to_history_attention(
            jnp.einsum("rmd,dhk->rmhk", targets, self.w_query[...].astype(targets.dtype)),
            tokens,
            self.w_key[...],
            self.w_value[...],
            ranges,
            options=AttentionOptions("projected"),
        )
        return attended.output.reshape(targets.shape)


class TargetAttention(nnx.Module):
    """The sequence module."""

    def __init__(self, config: TargetAttentionConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.reader = Reader(d, config.num_heads, rngs=rngs)
        self.output = Linear(2 * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Reads the history for every target of every row."""
        gathered = self.reader(inputs.targets, inputs.tokens, inputs.ranges)
        summary = self.output(jnp.concatenate([gathered, inputs.targets], -1))
        return SequenceOutput(summary, summary[..., :0])
