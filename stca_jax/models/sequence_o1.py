"""SequenceO1's two branches (arXiv 2609.08443): 100,000 events as prototypes, and the last 10,000.

Sketch attention compresses the whole window into k states, from k learned prototypes P:

    X~(0) = P
    S = (X~(l) W_Q) (X W_K)^T / sqrt(d)           k x n, a tile at a time
    A = softmax of S over the PROTOTYPES           what each event gives, it divides among them
    X- = LN(X~(l) + A X)                           a sum over all events, which the LN rescales
    X~(l+1) = LN(X- + SwiGLU(X-))

STCA reads the sketch (z_u) and the last `recent_length` events (z_r), and z = [z_u | z_r] W.  A
sketch depends on a user's window and on no target: `SequenceO1.sketch` makes it, to be kept, and
`SequenceO1.read` scores any targets with it and whatever events are recent then.  It is as wide as
a token; the paper's is narrower than its STCA.

History tokens never interact, and a sketch is made once for all targets of one window, so requests
share rows exactly; but each target slot of a row has room for a sketch of k d numbers: take rows of
few targets.  Sketches are computed again in the backward pass.  Cost: 4 k d FLOPs per event and
sketch layer, once per window and not per target.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.models.layers import LayerNorm, Linear, SwiGLU, parameter
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.models.stca import Stca, StcaConfig
from stca_jax.ops.range_sum import range_sum
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges

_BLOCKS = BlockSizes(history=256, targets=1)  # one sketch at a time: k prototypes by 256 events


@dataclasses.dataclass(frozen=True)
class SequenceO1Config(SequenceConfig):
    """Shape of the module.

    Attributes:
      num_layers: Of each of the two STCA.
      num_heads: Of each of the two STCA; must divide `width`.
      num_prototypes: k.
      num_sketch_layers: Sketch attention layers.
      recent_length: Events that STCA reads as they are.
    """

    num_layers: int = 2
    num_heads: int = 4
    num_prototypes: int = 1_024
    num_sketch_layers: int = 2
    recent_length: int = 10_000

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    @property
    def reader(self) -> StcaConfig:
        """STCA on the recent events; on the sketch it has no counts, which would be constant."""
        return StcaConfig(
            width=self.width,
            ffn_ratio=self.ffn_ratio,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )

    @property
    def num_counts(self) -> int:
        """Those of STCA on the recent events."""
        return self.reader.num_counts

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> SequenceO1:
        """The module."""
        return SequenceO1(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a history no longer than `recent_length`, with a window for each target."""
        d, k, N = self.width, self.num_prototypes, self.num_sketch_layers
        recent = self.reader.cost(targets_per_token)
        sketch = dataclasses.replace(self.reader, count_channel=False).cost(targets_per_token)
        of_state = N * (2 + 6 * self.ffn_ratio) * d * d + sketch.per_token + sketch.per_pair
        return SequenceCost(
            per_token=N * (2 * d * d + 4 * k * d) + recent.per_token,
            per_target=k * of_state + sketch.per_target + recent.per_target + 4 * d * d,
            per_pair=recent.per_pair,
            num_layers=N + self.num_layers,
        )


class Sketch(NamedTuple):
    """Compressed windows.

    Attributes:
      states: S sketches of a row.
      place: Which of them each target reads; -1 for none, as with an empty window.
    """

    states: Float[Array, "R S k D"]
    place: Int[Array, "R M"]


class _SketchLayer(nnx.Module):
    """One layer of sketch attention."""

    def __init__(self, config: SequenceO1Config, *, rngs: nnx.Rngs):
        d = config.width
        self.query = Linear(d, d, rngs=rngs)
        self.key = Linear(d, d, rngs=rngs)
        self.sum_norm = LayerNorm(d, rngs=rngs)
        self.ffn = SwiGLU(d, config.ffn_ratio * d, d, rngs=rngs)
        self.ffn_norm = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        states: Float[Array, "R 1 k D"],
        keys_and_tokens: tuple[Float[Array, "R L D"], Float[Array, "R L D"]],
        windows: Ranges,
    ) -> Float[Array, "R 1 k D"]:
        """The next states of one window of each row."""
        query = self.query(states)
        summed = range_sum(
            _divide_events, None, query, keys_and_tokens, windows, block_sizes=_BLOCKS
        )
        x = self.sum_norm(states + summed.astype(states.dtype))
        return self.ffn_norm(x + self.ffn(x))


def _divide_events(
    weights: None,
    query: Float[Array, "C k D"],
    tokens: tuple[Float[Array, "T D"], Float[Array, "T D"]],
    in_range: Bool[Array, "C T"],
) -> Float[Array, "C k D"]:
    """What the events of a tile give to the prototypes."""
    del weights
    key, value = tokens
    score = jnp.einsum("ckd,td->ckt", query, key, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(score / math.sqrt(query.shape[-1]), axis=1)
    share = jnp.where(in_range[:, None], share, 0).astype(value.dtype)
    return jnp.einsum("ckt,td->ckd", share, value, preferred_element_type=jnp.float32)


class SequenceO1(nnx.Module):
    """The sequence module."""

    def __init__(self, config: SequenceO1Config, *, remat: bool = False, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.prototypes = parameter(rngs, (config.num_prototypes, d), (None, "embed"), _normal)
        self.sketch_layers = nnx.List(
            [_SketchLayer(config, rngs=rngs) for _ in range(config.num_sketch_layers)]
        )
        of_sketch = dataclasses.replace(config.reader, count_channel=False)
        self.sketch_reader = Stca(of_sketch, remat=remat, rngs=rngs)
        self.recent_reader = Stca(config.reader, remat=remat, rngs=rngs)
        self.output = Linear(2 * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Sketches every window and reads it for every target of every row."""
        return self.read(inputs, self.sketch(inputs.tokens, inputs.ranges))

    def sketch(self, tokens: Float[Array, "R L D"], ranges: Ranges) -> Sketch:
        """Compresses each distinct window, at the place of the first target that has it.

        Args:
          tokens: History tokens.
          ranges: Of each target, or of one target per user to be cached.
        """
        R, M = ranges.start.shape
        is_same = (ranges.start[:, :, None] == ranges.start[:, None]) & (
            ranges.end[:, :, None] == ranges.end[:, None]
        )
        first = jnp.argmax(is_same, axis=2)
        is_first = (first == jnp.arange(M)) & (ranges.lengths > 0)
        windows = [jnp.where(is_first, bound, 0).T for bound in ranges]
        inputs = [(layer.key(tokens), tokens) for layer in self.sketch_layers]
        shape = (R, 1, *self.prototypes.shape)
        empty = jnp.zeros(shape, tokens.dtype)

        def compress(window: Ranges) -> Array:
            states = jnp.broadcast_to(self.prototypes[...].astype(tokens.dtype), shape)
            for layer, of_layer in zip(self.sketch_layers, inputs, strict=True):
                states = layer(states, of_layer, window)
            return states

        @jax.checkpoint
        def of_slot(window: tuple[Array, Array]) -> Array:
            start, end = (bound[:, None] for bound in window)
            is_used = (end > start).any()
            return lax.cond(is_used, compress, lambda _: empty, Ranges(start, end))

        # One target slot after the other: most have the window of an earlier one, and cost nothing.
        states = lax.map(of_slot, tuple(windows))[:, :, 0].swapaxes(0, 1)
        return Sketch(states, jnp.where(ranges.lengths > 0, first, -1))

    def read(self, inputs: SequenceInput, sketch: Sketch) -> SequenceOutput:
        """Reads sketches, made now or earlier, and the recent events.

        Args:
          inputs: Tokens of the recent events at least.
          sketch: From `sketch`; `place` for these targets.
        """
        R, S, k, D = sketch.states.shape
        start = jnp.maximum(sketch.place, 0) * k
        of_sketch = inputs._replace(
            tokens=sketch.states.reshape(R, S * k, D),
            history_time=jnp.zeros((R, S * k), jnp.int32),
            ranges=Ranges(start, jnp.where(sketch.place >= 0, start + k, start)),
        )
        long_term = self.sketch_reader(of_sketch)
        ranges = inputs.ranges
        newest = jnp.maximum(ranges.start, ranges.end - self.config.recent_length)
        recent = self.recent_reader(inputs._replace(ranges=Ranges(newest, ranges.end)))
        summary = self.output(jnp.concatenate([long_term.summary, recent.summary], -1))
        return SequenceOutput(summary, recent.counts)


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)
