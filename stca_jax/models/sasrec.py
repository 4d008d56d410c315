"""SASRec (arXiv 1808.09781): a causal Transformer of which only the last state meets a target.

    h = the state of the last event, after N blocks;     z = LN(h) * t

What is read of the history does not depend on the target: the sum over z is SASRec's score h . t.
Blocks, masks, order and costs are those of `stca_jax.models.transformer`; of the last block only
the last event's state is computed.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.models.layers import LayerNorm, recomputed
from stca_jax.models.sequence import SequenceCost, SequenceInput, SequenceOutput
from stca_jax.models.transformer import Block, TransformerConfig, past_of_tokens
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class SasRecConfig(TransformerConfig):
    """Shape of the Transformer."""

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs; a target has a state of its own in the last block only."""
        cost, N = super().cost(targets_per_token), self.num_layers
        return cost._replace(per_target=cost.per_target // N, per_pair=cost.per_pair // N)

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> SasRec:
        """The module."""
        return SasRec(self, remat=remat, rngs=rngs)


class SasRec(nnx.Module):
    """The sequence module."""

    def __init__(self, config: SasRecConfig, *, remat: bool = False, rngs: nnx.Rngs):
        self.remat = remat
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.output_norm = LayerNorm(config.width, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Encodes the history of every row and compares its last state with every target."""
        x, ranges = inputs.tokens, inputs.ranges
        past = past_of_tokens(ranges, x.shape[1])
        for block in self.blocks[:-1]:
            x = recomputed(block, self.remat)(x, x, past)
        last = last_token(x, ranges)
        state = self.output_norm(recomputed(self.blocks[-1], self.remat)(last, x, ranges))
        summary = jnp.where(ranges.lengths[..., None] > 0, state, 0) * inputs.targets
        return SequenceOutput(summary, summary[..., :0])


def last_token(x: Float[Array, "R L D"], ranges: Ranges) -> Float[Array, "R M D"]:
    """The last token of each range; some token for an empty one."""
    last = jnp.maximum(ranges.end - 1, 0)
    return jnp.take_along_axis(x, last[..., None], axis=1)
