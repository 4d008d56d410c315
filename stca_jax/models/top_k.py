"""Two stages: search all of the history, attend to the best k. TWIN and SIM's soft search.

"twin" (TWIN, arXiv 2302.02352): each head scores all events by the weights of its attention, keeps
the k best, and its softmax is over those alone.

    s_j = (t W_Q^j) (X W_K^j)^T / sqrt(d_h);  o_j = softmax(s_j over its top k) X W_V^j

"sim" (SIM, arXiv 2006.05639): a score of its own weights, s = (t W_a) (X W_b)^T / sqrt(d), keeps k
events for all heads.  The choice of events has no gradient: W_a and W_b learn from a pool of the
history, weighted by s, which is another input of the output map (in the paper, of a loss).

Both, as in their papers, read the last `recent_length` events by attention of their own.
Of equal scores the older event is kept.  History tokens never interact, so requests share rows
exactly.

Cost: M L scores for a row of M targets and L tokens, whatever their ranges, for `_CHUNK` targets at
once; attention is constant in L.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
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

_CHUNK = 64  # targets of a row scored at once
_NO_SCORE = -1e30


@dataclasses.dataclass(frozen=True)
class TopKConfig(SequenceConfig):
    """Shape of the module; it has no FFN, so that `ffn_ratio` is that of the token fusion alone.

    Attributes:
      num_heads: Must divide `width`.
      num_selected: k.
      search: Whose search: TWIN's by the weights of the attention, or SIM's by its own.
      recent_length: Events that are read in any case, by an attention of their own.
    """

    num_heads: int = 4
    num_selected: int = 100
    search: Literal["twin", "sim"] = "twin"
    recent_length: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> TopK:
        """The module; scores are computed again in any case."""
        return TopK(self, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a history of at least `num_selected` and `recent_length` events."""
        d, is_sim = self.width, self.search == "sim"
        read = 4 * d * (self.num_selected + self.recent_length)
        return SequenceCost(
            per_token=(8 + 2 * is_sim) * d * d,
            per_target=(10 + 4 * is_sim) * d * d + read,
            per_pair=2 * d * (2 if is_sim else 1),
            num_layers=2,
        )


class TopK(nnx.Module):
    """The sequence module."""

    def __init__(self, config: TopKConfig, *, rngs: nnx.Rngs):
        d, H = config.width, config.num_heads
        self.config = config
        self.selected = Reader(d, H, rngs=rngs)
        self.recent = Reader(d, H, rngs=rngs)
        is_sim = config.search == "sim"
        self.search_target = Linear(d, d, rngs=rngs) if is_sim else None
        self.search_token = Linear(d, d, rngs=rngs) if is_sim else None
        self.output = Linear((4 if is_sim else 3) * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Searches and reads the history for every target of every row."""
        x, tokens, ranges = inputs.targets, inputs.tokens, inputs.ranges
        newest = jnp.maximum(ranges.start, ranges.end - self.config.recent_length)
        recent = self.recent(x, tokens, Ranges(newest, ranges.end))
        found = self._search(inputs) if tokens.shape[1] else [jnp.zeros_like(x)]
        summary = self.output(jnp.concatenate([*found, recent, x], -1))
        return SequenceOutput(summary, summary[..., :0])

    def _search(self, inputs: SequenceInput) -> list[Float[Array, "R M D"]]:
        """What is read of the best events and, of SIM, the pool."""
        x, tokens = inputs.targets, inputs.tokens
        M = x.shape[1]

        def heads(x: Array, weight: nnx.Param) -> Array:
            return jnp.einsum("rnd,dhk->rnhk", x, weight[...].astype(x.dtype))

        query = heads(x, self.selected.w_query)
        history = _History(
            heads(tokens, self.selected.w_key), heads(tokens, self.selected.w_value), None, None
        )
        search = None
        if self.search_target is not None and self.search_token is not None:
            search = self.search_target(x)
            history = history._replace(search=self.search_token(tokens), tokens=tokens)
        k = min(self.config.num_selected, tokens.shape[1])

        @jax.checkpoint
        def read(history: _History, chunk: tuple[Array, Array | None, Ranges]) -> list[Array]:
            return _read(history, *chunk, k)

        chunks = jax.tree.map(_cut, (query, search, inputs.ranges))
        found = lax.map(lambda chunk: read(history, chunk), chunks)
        return [
            f.swapaxes(0, 1).reshape(len(x), -1, x.shape[2])[:, :M].astype(x.dtype) for f in found
        ]


class _History(NamedTuple):
    """What targets read; the last two for SIM's search alone."""

    key: Float[Array, "R L H K"]
    value: Float[Array, "R L H K"]
    search: Float[Array, "R L D"] | None
    tokens: Float[Array, "R L D"] | None


def _cut(x: Array) -> Float[Array, "chunks R C ..."]:
    """[R, M, ...] in chunks of targets, padded with zeros, whose ranges are empty."""
    M = x.shape[1]
    size = min(_CHUNK, M)
    x = jnp.pad(x, ((0, 0), (0, -M % size), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)


def _read(
    history: _History,
    query: Float[Array, "R C H K"],
    search: Float[Array, "R C D"] | None,
    ranges: Ranges,
    k: int,
) -> list[Float[Array, "R C D"]]:
    in_range = ranges.contain(jnp.arange(history.key.shape[1]))
    if search is None:
        score = jnp.einsum("rchk,rlhk->rchl", query, history.key)
        place = _best(score, in_range, k)
    else:
        score = jnp.einsum("rcd,rld->rcl", search, history.search) / math.sqrt(search.shape[-1])
        place = _best(score[:, :, None], in_range, k)
        place = jnp.broadcast_to(place, (*query.shape[:3], k))
    rows, heads = jnp.arange(len(query))[:, None, None, None], jnp.arange(query.shape[2])[:, None]
    key, value = (x[rows, place, heads] for x in (history.key, history.value))
    chosen = jnp.einsum("rchk,rchsk->rchs", query, key, preferred_element_type=jnp.float32)
    is_valid = (place >= ranges.start[..., None, None]) & (place < ranges.end[..., None, None])
    chosen = jnp.where(is_valid, chosen / math.sqrt(query.shape[-1]), _NO_SCORE)
    weight = jnp.where(is_valid, jax.nn.softmax(chosen, -1), 0).astype(value.dtype)
    read = jnp.einsum("rchs,rchsk->rchk", weight, value, preferred_element_type=jnp.float32)
    found = [read.reshape(*query.shape[:2], -1)]
    if search is not None:
        count = jnp.sqrt(jnp.maximum(ranges.lengths, 1).astype(jnp.float32))[..., None]
        weighted = jnp.where(in_range, score, 0)
        found.append(jnp.einsum("rcl,rld->rcd", weighted, history.tokens) / count)
    return found


def _best(
    score: Float[Array, "R C G L"], in_range: Bool[Array, "R C L"], k: int
) -> Int[Array, "R C G k"]:
    """Places of the k best in range, then any."""
    score = jnp.where(in_range[:, :, None], lax.stop_gradient(score).astype(jnp.float32), _NO_SCORE)
    return lax.top_k(score, k)[1]
