"""TransAct's reader (arXiv 2306.00248): an encoder over the last 100 events, fused with the target.

Each of the last n events is joined with the target before the encoder, so that the encoder itself
is per target: e_i = [x_i | t] W_in; N Transformer blocks in which all n events see each other; then

    z = [max over the events | the states of the newest 10, newest first | t] W_out

Events are read as raw tokens, and interact for one target at a time, so requests share rows
exactly.  Unlike the paper, the encoder is as wide as a token, not as the pair of event and target.

Cost: m times an encoder of n events, whatever the history's length: nothing is shared by targets.
`_CHUNK` targets of a row are encoded at once.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from stca_jax.models.layers import Linear
from stca_jax.models.sequence import SequenceCost, SequenceInput, SequenceOutput
from stca_jax.models.transformer import Block, TransformerConfig
from stca_jax.ranges import Ranges

_CHUNK = 32
_NO_SCORE = -1e30


@dataclasses.dataclass(frozen=True)
class TransActConfig(TransformerConfig):
    """Shape of the encoder.

    Attributes:
      recent_length: n.
      num_outputs: States of the newest events that are outputs, beside the maximum.
    """

    recent_length: int = 100
    num_outputs: int = 10

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        if self.num_outputs > self.recent_length:
            raise ValueError(
                f"num_outputs {self.num_outputs} is more than recent_length {self.recent_length}"
            )

    @property
    def needs_exclusive_history(self) -> bool:
        """False: events interact for one target at a time."""
        return False

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> TransAct:
        """The module; the encoder is computed again in any case."""
        return TransAct(self, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a history of at least `recent_length` events."""
        d, n = self.width, self.recent_length
        block = (8 + 6 * self.ffn_ratio) * d * d + 4 * d * n
        inputs = 4 * d * d
        return SequenceCost(
            per_token=0,
            per_target=n * (inputs + self.num_layers * block) + 2 * (self.num_outputs + 2) * d * d,
            per_pair=0,
        )


class TransAct(nnx.Module):
    """The sequence module."""

    def __init__(self, config: TransActConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.input = Linear(2 * d, d, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.output = Linear((config.num_outputs + 2) * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Encodes the last events of every target of every row."""
        R, M, D = inputs.targets.shape
        size = min(_CHUNK, M)
        read = jnp.zeros_like(inputs.targets, shape=(R, M, (self.config.num_outputs + 1) * D))
        if inputs.tokens.shape[1]:

            def cut(x: Array) -> Array:
                x = jnp.pad(x, ((0, 0), (0, -M % size), *[(0, 0)] * (x.ndim - 2)))
                return x.reshape(R, -1, size, *x.shape[2:]).swapaxes(0, 1)

            encode = jax.checkpoint(self._encode)
            chunks = jax.tree.map(cut, (inputs.targets, inputs.ranges))
            read = lax.map(lambda chunk: encode(inputs.tokens, *chunk), chunks)
            read = read.swapaxes(0, 1).reshape(R, -1, read.shape[-1])[:, :M]
        summary = self.output(jnp.concatenate([read, inputs.targets], -1))
        return SequenceOutput(summary, summary[..., :0])

    def _encode(
        self, tokens: Float[Array, "R L D"], targets: Float[Array, "R C D"], ranges: Ranges
    ) -> Float[Array, "R C outputs"]:
        n = self.config.recent_length
        place = ranges.end[..., None] - 1 - jnp.arange(n)  # the newest first
        is_event = place >= ranges.start[..., None]
        events = tokens[jnp.arange(len(tokens))[:, None, None], jnp.maximum(place, 0)]
        pairs = jnp.broadcast_to(targets[:, :, None], events.shape)
        x = self.input(jnp.concatenate([events, pairs], -1))
        for block in self.blocks:
            x = _bidirectional(block, x, is_event)
        x = jnp.where(is_event[..., None], x, 0)
        largest = jnp.where(is_event[..., None], x, _NO_SCORE).max(2)
        largest = jnp.where(is_event.any(-1)[..., None], largest, 0)
        newest = x[:, :, : self.config.num_outputs]
        return jnp.concatenate([largest, newest.reshape(*targets.shape[:2], -1)], -1)


def _bidirectional(
    block: Block, x: Float[Array, "R C n D"], is_event: Bool[Array, "R C n"]
) -> Float[Array, "R C n D"]:
    """A block in which every event sees all events."""
    normed = block.attention_norm(x)
    query, key, value = (
        jnp.einsum("rcnd,dhk->rcnhk", normed, w[...].astype(x.dtype))
        for w in (block.w_query, block.w_key, block.w_value)
    )
    score = jnp.einsum("rcnhk,rcthk->rchnt", query, key, preferred_element_type=jnp.float32)
    score = jnp.where(is_event[:, :, None, None], score / math.sqrt(query.shape[-1]), _NO_SCORE)
    weight = jax.nn.softmax(score, -1).astype(value.dtype)
    attended = jnp.einsum("rchnt,rcthk->rcnhk", weight, value)
    x = x + block.w_output(attended.reshape(x.shape))
    return x + block.ffn(block.ffn_norm(x))
