"""Stacked Target-to-History Cross Attention: E1-E7 of arXiv 2511.06077, and additions of ours.

History tokens never interact and targets never interact, so the cost is linear in the history and a
target's output does not depend on its row-mates.  In the paper's equations there is no residual:
concatenation is the skip path.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stca_jax.models.layers import (
    LayerNorm,
    Linear,
    SwiGLU,
    in_chunks,
    parameter,
    recomputed,
    zeros,
)
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.ops.attention import (
    AttentionOptions,
    AttentionOutput,
    ImplementationName,
    cheaper_order,
    history_layer,
)
from stca_jax.ops.encoder import HistoryEncoder, encode_history
from stca_jax.ops.implementation import Order
from stca_jax.schema import SECONDS_PER_DAY

# Log-sum-exps and log counts over 10,000 events are of order 10; the tokens they join, of order 1.
COUNT_SCALE = 0.25
_SCORE_OF_EQUALS = 8.0  # of an event that equals the target, at step 0 of a "scaled" start


@dataclasses.dataclass(frozen=True)
class StcaConfig(SequenceConfig):
    """Shape of the sequence module.

    Attributes:
      num_layers: N.
      num_heads: h; must divide `width`.
      initialization: "matched" starts target side and history side equal, so that at step 0 an
        event's score is the similarity of its item to the target; "scaled" is that, with sizes that
        depend on neither width nor depth: the score of an event that equals the target starts at 8
        for any head width (it is sqrt(d_h) otherwise), a layer after the first starts as no change,
        o^i = 0, and the model's head starts at zero; "independent" draws every weight on its own,
        as the paper presumably does.
      skip_paths: Encode history tokens and queries as LN(x + SwiGLU(x)) instead of LN(SwiGLU(x)) of
        E1, E2 and E6. Tokens have entries far below 1, of which SwiGLU is a quadratic form: without
        the path, the attention sees the square of the similarity of two tokens.
      count_channel: Give query fusion (E6) and output (E7) the log-sum-exp of each head's scores
        and the log of the number of events, n. Softmax averages; it cannot say how much matched.
      temperature_length: Multiply the queries of E3 by log(1 + n) / log(1 + temperature_length),
        so that softmax over a history much longer than this length does not flatten. None: by 1.
      attention_sink: Give each head a learned logit that joins the softmax's denominator, so that a
        head may gather less than a whole average, down to nothing.
      attention_order: Order of the algebra, see `stca_jax.ops.attention`; None takes the
        one with fewer FLOPs.
      attention_implementation: Of the attention, see `stca_jax.ops.attention`; None takes the best
        one that always works on the devices at hand.
      recency_score: Add to each head's scores a learned rate times the event's time, exact for
        ranges that requests of different times share.
    """

    num_layers: int = 2
    num_heads: int = 4
    initialization: Literal["matched", "scaled", "independent"] = "matched"
    skip_paths: bool = False
    count_channel: bool = True
    temperature_length: int | None = None
    attention_sink: bool = False
    recency_score: bool = False
    attention_order: Order | None = None
    attention_implementation: ImplementationName | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        head_width(self.width, self.num_heads)

    @property
    def head_width(self) -> int:
        """d_h."""
        return head_width(self.width, self.num_heads)

    def counts_after(self, num_layers: int) -> int:
        """Size of the count channel after that many layers."""
        return num_layers * self.num_heads + 1 if self.count_channel else 0

    @property
    def num_counts(self) -> int:
        """Size of `SequenceOutput.counts`."""
        return self.counts_after(self.num_layers)

    @property
    def can_cache_history(self) -> bool:
        """True: what becomes of an event depends on nothing else."""
        return True

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> Stca:
        """The module."""
        return Stca(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs in the order of attention that is run."""
        N, d, h = self.num_layers, self.width, self.num_heads
        order = self.attention_order or cheaper_order(targets_per_token, h, d)
        ffn, square = 6 * self.ffn_ratio * d * d, 2 * d * d
        keys_and_values = 2 * square
        is_projected = order == "projected"
        of_layer = ffn + 2 * square + (0 if is_projected else keys_and_values)
        fused = sum(2 * ((i + 1) * d + self.counts_after(i)) * d for i in range(1, N + 1))
        return SequenceCost(
            per_token=N * (ffn + is_projected * keys_and_values),
            per_target=N * of_layer + fused + ffn,
            per_pair=N * 4 * d * (1 if is_projected else h),
            num_layers=N,
        )


# What the layers so far gathered, the targets, and the count channel.
_Gathered = tuple[list[Array], Array, list[Array]]


class Fusion(nnx.Module):
    """[o^1 | ... | o^i | x_t] W of E6 and E7, plus the count channel through weights of its own."""

    def __init__(self, config: StcaConfig, num_layers: int, *, rngs: nnx.Rngs):
        d = config.width
        num_counts = config.counts_after(num_layers)
        fan_in = (num_layers + 1) * d + num_counts

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / jnp.sqrt(fan_in)  # rows of one matrix

        self.weight = parameter(rngs, (fan_in - num_counts, d), ("embed", "embed_out"), init)
        self.count_weight = (
            parameter(rngs, (num_counts, d), (None, "embed_out"), init) if num_counts else None
        )

    def __call__(
        self, outputs: list[Array], targets: Float[Array, "R M D"], counts: list[Array]
    ) -> Float[Array, "R M D"]:
        """Fuses what the layers so far have gathered with the target."""
        x = jnp.concatenate([*outputs, targets], -1)
        y = x @ self.weight[...].astype(x.dtype)
        if self.count_weight is not None:
            y += jnp.concatenate(counts, -1) @ self.count_weight[...].astype(x.dtype)
        return y

    def pass_target_through(self, width: int) -> None:
        """Starts as the identity on x_t, with a tenth of the usual weight on everything else."""
        weight = 0.1 * self.weight[...]
        self.weight[...] = weight.at[-width:].set(jnp.eye(width))
        if self.count_weight is not None:
            self.count_weight[...] = 0.1 * self.count_weight[...]


class History(Protocol):
    """What the layers attend to: tokens of packed rows, or what was encoded of them before."""

    @property
    def num_events(self) -> Int[Array, "R M"]:
        """Events that each target reads."""
        ...

    def attend(self, layer: StcaLayer, query: Float[Array, "R M H K"]) -> AttentionOutput:
        """E3 and E4 of a layer; log-sum-exps are of scores relative to the request's time."""
        ...


class RowHistory(NamedTuple):
    """Tokens of packed rows, which each layer encodes (E1) as it attends to them.

    Attributes:
      inputs: Of the sequence module.
    """

    inputs: SequenceInput

    @property
    def num_events(self) -> Int[Array, "R M"]:
        """See `History`."""
        return self.inputs.ranges.lengths

    def attend(self, layer: StcaLayer, query: Float[Array, "R M H K"]) -> AttentionOutput:
        """See `History`."""
        history_score, request_score = self._recency(layer)
        attended = history_layer(
            query,
            self.inputs.tokens,
            layer.encoder,
            layer.w_key[...].astype(query.dtype),
            layer.w_value[...].astype(query.dtype),
            self.inputs.ranges,
            history_score=history_score,
            options=AttentionOptions(layer.order, layer.implementation),
        )
        return attended._replace(log_sum_exp=attended.log_sum_exp - request_score)

    def _recency(self, layer: StcaLayer) -> tuple[Array | None, Array | float]:
        """Scores rate * (event time - t0) of tokens and rate * (request time - t0) of requests.

        Softmax cancels t0 and the request's time; the log-sum-exp does not, hence the second value.
        """
        if layer.recency_rate is None:
            return None, 0.0
        rate = layer.recency_rate[...]
        origin = self.inputs.request_time.max(-1, keepdims=True)

        def score(time: Array) -> Array:
            days = (time - origin).astype(jnp.float32) / SECONDS_PER_DAY
            return days[..., None] * rate

        return score(self.inputs.history_time), score(self.inputs.request_time)


class StcaLayer(nnx.Module):
    """One layer: history encoder (E1), query encoder (E2, E6) and attention (E3-E5)."""

    def __init__(self, config: StcaConfig, index: int, *, rngs: nnx.Rngs):
        d, H, K = config.width, config.num_heads, config.head_width
        self.index = index
        self.order = config.attention_order
        self.implementation = config.attention_implementation
        self.temperature_length = config.temperature_length
        self.skip = config.skip_paths
        hidden_width = config.ffn_ratio * d
        self.history_ffn = SwiGLU(d, hidden_width, d, rngs=rngs)
        self.history_norm = LayerNorm(d, rngs=rngs)
        self.fusion = Fusion(config, index, rngs=rngs) if index else None
        self.query_ffn = SwiGLU(d, hidden_width, d, rngs=rngs)
        self.query_norm = LayerNorm(d, rngs=rngs)
        axes = ("embed", "head", "head_width")
        self.w_query = parameter(rngs, (d, H, K), axes)
        self.w_key = parameter(rngs, (d, H, K), axes)
        self.w_value = parameter(rngs, (d, H, K), axes)
        self.w_output = Linear(d, d, rngs=rngs)
        self.recency_rate = (
            parameter(rngs, (H,), ("head",), _recency_rates) if config.recency_score else None
        )
        self.sink = parameter(rngs, (H,), ("head",), zeros) if config.attention_sink else None
        if config.initialization != "independent":
            self._match(config, rngs)
        if config.initialization == "scaled":
            self.w_query[...] *= _SCORE_OF_EQUALS / math.sqrt(K)
            if index:
                self.w_output.weight[...] = jnp.zeros((d, d))

    def _match(self, config: StcaConfig, rngs: nnx.Rngs) -> None:
        for name in ("up", "gate", "out"):
            getattr(self.query_ffn, name)[...] = getattr(self.history_ffn, name)[...]
        square = jax.random.orthogonal(rngs.params(), config.width)
        self.w_query[...] = square.reshape(self.w_query[...].shape)
        self.w_key[...] = self.w_query[...]
        if self.fusion is not None:
            self.fusion.pass_target_through(config.width)

    @property
    def encoder(self) -> HistoryEncoder:
        """Weights of E1."""
        return HistoryEncoder(
            self.history_ffn.up[...],
            self.history_ffn.gate[...],
            self.history_ffn.out[...],
            self.history_norm.scale[...],
            self.history_norm.bias[...],
            self.skip,
        )

    def __call__(
        self,
        targets: Float[Array, "R M D"],
        history: History,
        outputs: list[Array],
        counts: list[Array],
    ) -> tuple[Float[Array, "R M D"], Float[Array, "R M H"]]:
        """Returns o^i (E5) and the log-sum-exps of the scores, relative to the request's time."""
        query = in_chunks(self._encode_query, (outputs, targets, counts))
        if self.temperature_length is not None:
            sharpness = _sharpness(history.num_events, self.temperature_length)
            query *= sharpness[..., None].astype(query.dtype)
        w_query = self.w_query[...].astype(query.dtype)
        heads, log_sum_exp = history.attend(self, jnp.einsum("rmd,dhk->rmhk", query, w_query))
        if self.sink is not None:
            # exp(lse) / (exp(lse) + exp(sink)): what the sink leaves of the sum that is divided by.
            kept = jax.nn.sigmoid(log_sum_exp - self.sink[...])
            heads *= kept[..., None].astype(heads.dtype)
        return self.w_output(heads.reshape(query.shape)), log_sum_exp

    def _encode_query(self, gathered: _Gathered) -> Float[Array, "*N D"]:
        """E2, or E6 of the layers after the first."""
        query = gathered[1] if self.fusion is None else self.fusion(*gathered)
        encoded = self.query_ffn(query)
        return self.query_norm(query + encoded if self.skip else encoded)


def _sharpness(num_events: Int[Array, "R M"], length: int) -> Float[Array, "R M"]:
    """log(1 + n) relative to that of a length."""
    return jnp.log1p(num_events.astype(jnp.float32)) / math.log1p(length)


def _recency_rates(key: Array, shape: tuple[int, ...]) -> Array:
    """Per day: none for the first head, then time scales of 100, 300, 900, ... days."""
    del key
    return 0.03 * 3.0 ** -jnp.arange(shape[0], dtype=jnp.float32) * (jnp.arange(shape[0]) > 0)


class Stca(nnx.Module):
    """The sequence module: N layers and the output z."""

    def __init__(self, config: StcaConfig, *, remat: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        self.layers = nnx.List([StcaLayer(config, i, rngs=rngs) for i in range(config.num_layers)])
        self.output_fusion = Fusion(config, config.num_layers, rngs=rngs)
        d = config.width
        self.output_ffn = SwiGLU(d, config.ffn_ratio * d, d, rngs=rngs)

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """E1-E7 for every target of every row."""
        return self.read(inputs.targets, RowHistory(inputs))

    def encode(self, tokens: Float[Array, "*T D"]) -> Float[Array, "N *T D"]:
        """X~ of E1 in each layer, in the dtype of the tokens: all that `read` needs of an event."""
        return jnp.stack([encode_history(layer.encoder, tokens) for layer in self.layers])

    def read(self, targets: Float[Array, "R M D"], history: History) -> SequenceOutput:
        """E2-E7: what targets gather from a history, encoded before or not."""
        num_events = history.num_events
        dtype = targets.dtype
        outputs: list[Array] = []
        counts: list[Array] = []
        if self.config.count_channel:
            counts.append(log_count(num_events)[..., None].astype(dtype))
        for layer in self.layers:
            output, log_sum_exp = recomputed(layer, self.remat)(targets, history, outputs, counts)
            outputs.append(output)
            if self.config.count_channel:
                matched = jnp.where(num_events[..., None] > 0, log_sum_exp, 0) * COUNT_SCALE
                counts.append(matched.astype(dtype))
        summary = in_chunks(self._summarise, (outputs, targets, counts))
        empty = summary[..., :0]
        return SequenceOutput(summary, jnp.concatenate(counts, -1) if counts else empty)

    def _summarise(self, gathered: _Gathered) -> Float[Array, "*N D"]:
        """E7."""
        return self.output_ffn(self.output_fusion(*gathered))


def log_count(count: Array) -> Float[Array, ...]:
    """log(1 + count), scaled to the order of a token's entries."""
    return jnp.log1p(count.astype(jnp.float32)) * COUNT_SCALE
