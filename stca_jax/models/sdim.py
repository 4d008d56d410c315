"""SDIM (arXiv 2205.10249): sampled hashes for scores; a target sums the events of its bucket.

Random projections give target and token `num_groups` hash values of `bits` bits.  Per group the
target takes the sum of the events whose hash equals its own, scaled to length 1; the mean over
groups estimates an attention with weights (1 - angle / pi)^bits.

    s_g = sum of x_j over the events j with hash_g(x_j) = hash_g(t)
    z = [mean over g of s_g / |s_g| | attention to the last events | t] W

The projections are drawn once and not learned.  Sums per bucket exist for each tile of the row, so
that a target of any range adds whole tiles and looks at the events of two: nothing depends on M L.
History tokens never interact, so requests share rows exactly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stca_jax.models.layers import Linear
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.models.target_attention import Reader
from stca_jax.ranges import Ranges

_TILE = 64  # tokens whose sums per bucket are kept
_CHUNK = 64  # targets of a row whose partial tiles are read at once
_SMALLEST = 1e-12  # of a squared length, below which a sum is not scaled to length 1


@dataclasses.dataclass(frozen=True)
class SdimConfig(SequenceConfig):
    """Shape of the module; it has no FFN, so that `ffn_ratio` is that of the token fusion alone.

    Attributes:
      num_heads: Of the attention to the last events; must divide `width`.
      num_groups: Hash values of a token.
      bits: Of a hash value: 2^bits buckets.
      recent_length: Events that are also read by attention.
    """

    num_heads: int = 4
    num_groups: int = 16
    bits: int = 3
    recent_length: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> Sdim:
        """The module."""
        return Sdim(self, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a history of at least `recent_length` events; sums per bucket are products."""
        d, G = self.width, self.num_groups
        hashes = 2 * d * G * self.bits
        return SequenceCost(
            per_token=hashes + 2 * G * 2**self.bits * d + 4 * d * d,
            per_target=hashes + 4 * _TILE * G * d + 4 * d * self.recent_length + 8 * d * d,
            per_pair=0,
            num_layers=2,
        )


class Sdim(nnx.Module):
    """The sequence module."""

    def __init__(self, config: SdimConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.recent = Reader(d, config.num_heads, rngs=rngs)
        self.output = Linear(3 * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Reads the history for every target of every row."""
        x, tokens, ranges = inputs.targets, inputs.tokens, inputs.ranges
        newest = jnp.maximum(ranges.start, ranges.end - self.config.recent_length)
        recent = self.recent(x, tokens, Ranges(newest, ranges.end))
        summed = self._summed(inputs)
        scale = lax.rsqrt(jnp.maximum(jnp.square(summed).sum(-1, keepdims=True), _SMALLEST))
        pooled = (summed * scale).mean(-2).astype(x.dtype)
        summary = self.output(jnp.concatenate([pooled, recent, x], -1))
        return SequenceOutput(summary, summary[..., :0])

    def _summed(self, inputs: SequenceInput) -> Float[Array, "R M G D"]:
        """Per group, the sum of the events in the target's bucket."""
        config, ranges = self.config, inputs.ranges
        R, M, D = inputs.targets.shape
        shape = (config.width, config.num_groups, config.bits)
        bucket = _bucket(inputs.targets, shape)
        tokens = jnp.pad(inputs.tokens, ((0, 0), (0, -inputs.tokens.shape[1] % _TILE), (0, 0)))
        if not tokens.shape[1]:
            return jnp.zeros((R, M, config.num_groups, D))
        tokens = tokens.reshape(R, -1, _TILE, D)
        token_bucket = _bucket(tokens, shape)
        one_hot = jax.nn.one_hot(token_bucket, 2**config.bits, dtype=tokens.dtype)
        sums = jnp.einsum("rntgb,rntd->rngbd", one_hot, tokens, preferred_element_type=jnp.float32)
        first, last = -(-ranges.start // _TILE), ranges.end // _TILE  # whole tiles
        rows, groups = jnp.arange(R)[:, None, None], jnp.arange(config.num_groups)

        @jax.checkpoint
        def add(total: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
            index, of_tile = tile
            is_whole = (first <= index) & (index < last)
            part = of_tile[rows, groups, bucket]
            return total + jnp.where(is_whole[..., None, None], part, 0), None

        zeros = jnp.zeros((R, M, config.num_groups, D), jnp.float32)
        tiles = (jnp.arange(tokens.shape[1]), sums.swapaxes(0, 1))
        total = lax.scan(add, zeros, tiles)[0]
        before = Ranges(ranges.start, jnp.minimum(ranges.end, first * _TILE))
        after = Ranges(jnp.maximum(jnp.maximum(first, last) * _TILE, ranges.start), ranges.end)
        for part, tile in ((before, ranges.start // _TILE), (after, last)):
            total += _of_one_tile(bucket, tokens, token_bucket, part, tile)
        return total


def _bucket(x: Float[Array, "... D"], shape: tuple[int, int, int]) -> Int[Array, "... G"]:
    """The hash values: signs of random projections [D, G, bits], read as binary numbers."""
    projection = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = lax.stop_gradient(x).astype(jnp.float32)
    signs = jnp.tensordot(x, projection, 1) > 0
    return (signs * 2 ** np.arange(shape[2])).sum(-1)


def _of_one_tile(
    bucket: Int[Array, "R M G"],
    tokens: Float[Array, "R n T D"],
    token_bucket: Int[Array, "R n T G"],
    ranges: Ranges,
    tile: Int[Array, "R M"],
) -> Float[Array, "R M G D"]:
    """Sums over ranges that each lie within one tile."""
    R, M = bucket.shape[:2]
    size = min(_CHUNK, M)
    rows = jnp.arange(R)[:, None]

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -M % size), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(R, -1, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(tokens: Array, chunk: tuple[Array, Ranges, Array]) -> Array:
        bucket, ranges, tile = chunk
        tile = jnp.minimum(tile, tokens.shape[1] - 1)  # of an empty range
        position = tile[..., None] * _TILE + jnp.arange(_TILE)
        in_range: Bool[Array, "R C T"] = (position >= ranges.start[..., None]) & (
            position < ranges.end[..., None]
        )
        is_equal = (token_bucket[rows, tile] == bucket[:, :, None]) & in_range[..., None]
        return jnp.einsum(
            "rctg,rctd->rcgd",
            is_equal.astype(tokens.dtype),
            tokens[rows, tile],
            preferred_element_type=jnp.float32,
        )

    chunks = jax.tree.map(cut, (bucket, ranges, tile))
    parts = lax.map(lambda chunk: of_chunk(tokens, chunk), chunks)
    return parts.swapaxes(0, 1).reshape(R, -1, *parts.shape[3:])[:, :M]
