"""Deep Interest Network (arXiv 1706.06978): one layer of target attention by a small network.

A network scores every pair of target and event from [q | k | q - k | q * k], and the target gathers
the sum of its events, weighted by the scores as they are: there is no softmax.  A rival of STCA
with the same ranges: history tokens never interact, so requests share rows exactly.

Unlike the paper: swish for Dice, whose batch statistics would make a target depend on its
row-mates; and the sum is divided by the square root of the number of events, so that its scale at
step 0 is the same for 10 events and for 10,000.

Cost: M L for a row of M targets and L tokens, whatever their ranges; 2 d hidden_width FLOPs a pair,
against 4 d of dot products.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from stca_jax.models.layers import Linear
from stca_jax.models.sequence import SequenceConfig, SequenceCost, SequenceInput, SequenceOutput
from stca_jax.ops.sharded import on_mesh
from stca_jax.ranges import Ranges

_BLOCK = 128  # tokens scored at once: M * _BLOCK * hidden_width activations


@dataclasses.dataclass(frozen=True)
class DinConfig(SequenceConfig):
    """Shape of the network.

    Attributes:
      hidden_width: Units that score a pair.
    """

    hidden_width: int = 32

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> Din:
        """The module; what it computes of pairs is computed again in any case."""
        return Din(self, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs; q - k needs no products of its own."""
        d, hidden = self.width, self.hidden_width
        return SequenceCost(
            per_token=0,
            per_target=2 * d * hidden + 4 * d * d,
            per_pair=2 * (d + 1) * hidden + 2 * d,
        )


class Din(nnx.Module):
    """The sequence module."""

    def __init__(self, config: DinConfig, *, rngs: nnx.Rngs):
        d, hidden, axes = config.width, config.hidden_width, ("embed", "mlp")
        # A linear map of [q | k | q - k | q * k] is one of [q | k | q * k].
        self.query = Linear(d, hidden, rngs=rngs, logical_axes=axes, use_bias=True)
        self.key = Linear(d, hidden, rngs=rngs, logical_axes=axes)
        self.product = Linear(d, hidden, rngs=rngs, logical_axes=axes)
        self.score = Linear(hidden, 1, rngs=rngs, logical_axes=("mlp", None))
        self.output = Linear(2 * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Gathers the history of every target of every row."""
        x = inputs.targets
        key, product, score = (
            layer.weight[...].astype(x.dtype) for layer in (self.key, self.product, self.score)
        )
        # What multiplies a token for the sake of one target.
        by_target = key + x[..., None] * product
        pooled = on_mesh(
            _weighted_sum,
            lax.psum,
            score[:, 0],
            (self.query(x), by_target),
            inputs.tokens,
            inputs.ranges,
        )
        num_events = jnp.maximum(inputs.ranges.lengths, 1)
        pooled /= jnp.sqrt(num_events.astype(jnp.float32))[..., None]
        summary = self.output(jnp.concatenate([pooled.astype(x.dtype), x], -1))
        return SequenceOutput(summary, summary[..., :0])


def _weighted_sum(
    score_weight: Float[Array, " F"],
    per_target: tuple[Float[Array, "R M F"], Float[Array, "R M D F"]],
    tokens: Float[Array, "R L D"],
    ranges: Ranges,
) -> Float[Array, "R M D"]:
    """Sum of score * token over each target's range, a block of tokens at a time, in float32."""
    query, by_target = per_target
    R, L, D = tokens.shape
    padded = jnp.pad(tokens, ((0, 0), (0, -L % _BLOCK), (0, 0)))
    blocks = padded.reshape(R, -1, _BLOCK, D).swapaxes(0, 1)

    @jax.checkpoint
    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        first, x = block
        hidden = jax.nn.swish(query[:, :, None] + jnp.einsum("rtd,rmdf->rmtf", x, by_target))
        in_range = ranges.contain(first + jnp.arange(_BLOCK))
        weight = jnp.where(in_range, hidden @ score_weight, 0)
        return total + jnp.einsum(
            "rmt,rtd->rmd", weight, x, preferred_element_type=jnp.float32
        ), None

    zeros = jnp.zeros((*ranges.start.shape, D), jnp.float32)
    return lax.scan(add, zeros, (jnp.arange(len(blocks)) * _BLOCK, blocks))[0]
