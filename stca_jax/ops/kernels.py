"""What the Pallas kernels share: layout, ranges, and the rule that joins forward and backward.

A kernel works on one target tile and one history tile at a time, in the transposed layout

    query [E, C]   keys, values [t, E]   scores [t, C]   output [E, C]

where the C targets x heads of a tile lie along lanes: ranges, maxima and sums are rows of C.
The history tiles that a target tile needs are a band `[first, last)`; the others are skipped.
Encoded tokens are arrays of the whole row here; scores never are.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.encoder import HistoryEncoder, encode_history
from stca_jax.ops.implementation import GroupedImplementation, Tokens, TokenWeights
from stca_jax.ops.tiled import NO_SCORE
from stca_jax.ops.tiles import BlockSizes, Tiling, make_tiling, tile_targets, untile_targets
from stca_jax.ranges import Ranges

_SCORE_COLUMNS = 3


class Inputs(NamedTuple):
    """Inputs of the kernels.

    Attributes:
      query: Scaled queries by target tile.
      key: Keys by row, padded to whole history tiles.
      value: Values; None if they are the keys.
      start: First token of each target's range, repeated for its heads.
      end: One past its last token.
      first: First history tile that some target of the tile needs.
      last: One past the last one; not above `first` if none.
    """

    query: Float[Array, "J G E C"]
    key: Float[Array, "R G L E"]
    value: Float[Array, "R G L E"] | None
    start: Int[Array, "J 1 C"]
    end: Int[Array, "J 1 C"]
    first: Int[Array, " J"]
    last: Int[Array, " J"]

    @property
    def history(self) -> tuple[Array, ...]:
        """Keys and values, or the one array that is both."""
        return (self.key,) if self.value is None else (self.key, self.value)


class Kernels(GroupedImplementation):
    """Pallas kernels, forward and backward, of one kind of device.

    They can be traced anywhere, for a program may be compiled for another machine; lowering them
    for a platform that is not theirs raises ValueError with the reason that `unavailable` gives.
    """

    @property
    @abc.abstractmethod
    def platform(self) -> str | None:
        """The one platform they can be lowered for, as `jax.lax` names it; None for any."""

    def unavailable(self, platform: str) -> str | None:
        """See `Implementation`."""
        if self.platform in (None, platform, {"gpu": "cuda"}.get(platform)):
            return None
        return (
            f"{type(self).__name__} run on platform {self.platform!r} only, and the program is "
            'lowered for another. Use implementation="xla", which runs anywhere'
        )

    @abc.abstractmethod
    def default_block_sizes(self, heads_per_group: int, width: int, dtype: Any) -> BlockSizes:
        """Block sizes for A heads per group and keys of that width and dtype."""

    @abc.abstractmethod
    def padded_sizes(self, width: int, columns: int, history: int) -> tuple[int, int, int]:
        """Least E, C and history tile that the kernels take, not below those given."""

    @abc.abstractmethod
    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """E3 and E4 of all target tiles.

        Returns:
          float32 weighted sums [J, G, E, C] and log-sum-exps [J, G, 1, C], both 0 where empty.

        Raises:
          ValueError: blocks that do not fit the device's fast memory, or a device that is too old.
        """

    @abc.abstractmethod
    def backward(
        self, tiling: Tiling, inputs: Inputs, d_output: Array, log_sum_exp: Array, delta: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Gradients of the queries, and of `Inputs.history`.

        Args:
          tiling: How the batch is cut.
          inputs: Of the forward pass.
          d_output: Gradient of the weighted sums [J, G, E, C], in the dtype of the queries.
          log_sum_exp: As `forward` returned it.
          delta: float32 [J, G, 1, C], such that d(score) = weight * (d(weight) - delta).

        Returns:
          Of the shapes of `inputs`: float32 for the queries, the keys' dtype for the history.
        """

    @abc.abstractmethod
    def can_encode(self, encoder: HistoryEncoder, dtype: Any) -> bool:
        """Whether `encode` takes these weights and tokens of that dtype.

        XLA's `encode_history` encodes the others, and stores hidden units of all tokens.
        """

    @abc.abstractmethod
    def encode(
        self,
        encoder: HistoryEncoder,
        tokens: Float[Array, "R n D"],
        covered: Bool[Array, "R L 1"],
    ) -> Float[Array, "R L D"]:
        """E1 of all tokens, see `encode_history`, without storing hidden units.

        Args:
          encoder: Weights of any dtype.
          tokens: What is not covered may hold anything.
          covered: Padded with False to whole history tiles.

        Returns:
          In the tokens' dtype; any finite numbers where nothing is covered.
        """

    @abc.abstractmethod
    def encode_backward(
        self,
        encoder: HistoryEncoder,
        tokens: Float[Array, "R n D"],
        covered: Bool[Array, "R L 1"],
        d_encoded: Float[Array, "R L D"],
    ) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
        """Gradients of the weights, float32, and of the tokens; equal inputs give equal bits.

        Args:
          encoder: As for `encode`.
          tokens: As for `encode`.
          covered: As for `encode`.
          d_encoded: Gradients of what `encode` returned; ignored where nothing is covered.
        """

    def attend_grouped(
        self,
        query: Float[Array, "R M G A E"],
        tokens: Tokens,
        weights: TokenWeights,
        ranges: Ranges,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M G A E"], Float[Array, "R M G A"]]:
        """See `GroupedImplementation`."""
        R, M, _, A, E = query.shape
        length = tokens.value.shape[1]
        width = E if tokens.score is None else E + _SCORE_COLUMNS * A
        sizes = block_sizes or self.default_block_sizes(A, width, tokens.value.dtype)
        tiling = make_tiling(R, length, M, sizes)
        width, columns, tile = self.padded_sizes(width, A * tiling.targets, tiling.history)
        tiling = dataclasses.replace(tiling, history=tile, tiles_per_row=-(-length // tile))
        covered = ranges.covered(length)[..., None]
        key, value = self._keys_and_values(tokens.value, weights, covered, tiling)
        if tokens.score is not None:
            score = jnp.where(covered, tokens.score, 0).astype(jnp.float32)
            score = pad_to(score, R, key.shape[2], score.shape[-1])
            # Keys that are values too get columns whose weighted sums nobody reads.
            query, key = _with_score(query, key, score)
        key = pad_to(key, *key.shape[:3], width)
        if value is not None:
            value = pad_to(value, *value.shape[:3], width)
        stacked = tile_targets(query, tiling).transpose(0, 2, 4, 3, 1)  # [J, G, E, A, m]
        stacked = stacked.reshape(*stacked.shape[:3], -1)
        stacked = pad_to(stacked, *stacked.shape[:2], width, columns)
        start, end = (
            pad_to(jnp.tile(tile_targets(x, tiling), A)[:, None], len(stacked), 1, columns)
            for x in ranges
        )
        inputs = Inputs(stacked, key, value, start, end, *_bands(ranges, tiling))
        output, log_sum_exp = _attend(self, tiling, inputs)

        def unstack(x: Float[Array, "J G e C"]) -> Float[Array, "R M G A e"]:
            x = x[..., : A * tiling.targets]
            x = x.reshape(*x.shape[:3], A, tiling.targets).transpose(0, 4, 1, 3, 2)
            return untile_targets(x, tiling, M)

        return unstack(output)[..., :E], unstack(log_sum_exp)[..., 0]

    def _keys_and_values(
        self,
        tokens: Float[Array, "R n D"],
        weights: TokenWeights,
        covered: Bool[Array, "R n 1"],
        tiling: Tiling,
    ) -> tuple[Float[Array, "R G L E"], Float[Array, "R G L E"] | None]:
        """Of whole rows, padded to whole history tiles; see `Inputs`."""
        length = tiling.tiles_per_row * tiling.history
        if weights.encoder is None:
            x = jnp.where(covered, tokens, 0)
            x = pad_to(x, len(x), length, x.shape[-1])
        else:
            covered = pad_to(covered, len(tokens), length, 1)
            x = encode_tokens(self, weights.encoder, tokens, covered)
        if weights.w_key is None or weights.w_value is None:
            return x[:, None], None
        key, value = (jnp.einsum("rld,dgk->rglk", x, w) for w in (weights.w_key, weights.w_value))
        return key, value


def encode_tokens(
    kernels: Kernels,
    encoder: HistoryEncoder,
    tokens: Float[Array, "R n D"],
    covered: Bool[Array, "R L 1"],
) -> Float[Array, "R L D"]:
    """`Kernels.encode` where they can, and else XLA's `encode_history`; differentiable."""
    if kernels.can_encode(encoder, tokens.dtype):
        return _encode(kernels, encoder, tokens, covered)
    x = encode_history(encoder, jnp.where(covered[:, : tokens.shape[1]], tokens, 0))
    return pad_to(x, *covered.shape[:2], x.shape[-1])


def pad_to(x: Array, *shape: int) -> Array:
    """With zeros behind each axis."""
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _with_score(
    query: Float[Array, "R M G A E"], key: Float[Array, "R G L E"], score: Float[Array, "R L H"]
) -> tuple[Array, Array]:
    """Adds a token's score to every query's through extra columns of keys and queries.

    The columns of a head sum to the float32 score in any dtype: bfloat16 keeps 8 bits in each.
    """
    R, M, G, A, _ = query.shape
    parts, rest = [], score
    for _ in range(_SCORE_COLUMNS):
        parts.append(rest.astype(key.dtype))
        rest = rest - lax.stop_gradient(parts[-1]).astype(jnp.float32)
        rest = lax.stop_gradient(rest)
    columns = jnp.stack(parts, -1).reshape(R, -1, G, A * _SCORE_COLUMNS).swapaxes(1, 2)
    ones = jnp.repeat(jnp.eye(A, dtype=query.dtype), _SCORE_COLUMNS, axis=1)
    ones = jnp.broadcast_to(ones, (R, M, G, A, columns.shape[-1]))
    return jnp.concatenate([query, ones], -1), jnp.concatenate([key, columns], -1)


def _bands(ranges: Ranges, tiling: Tiling) -> tuple[Int[Array, " J"], Int[Array, " J"]]:
    start, end = ranges
    nonempty = end > start
    first = tile_targets(jnp.where(nonempty, start, jnp.iinfo(jnp.int32).max - 1), tiling)
    padded = tile_targets(nonempty, tiling)
    first = jnp.where(padded, first, jnp.iinfo(jnp.int32).max).min(1) // tiling.history
    last = tile_targets(jnp.where(nonempty, end, 0), tiling).max(1)
    return first.astype(jnp.int32), (-(-last // tiling.history)).astype(jnp.int32)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Product over the given axes, summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)  # fmt: skip


def mask_scores(
    score: Float[Array, "t C"], start: Int[Array, "1 C"], end: Int[Array, "1 C"], position: Any
) -> Float[Array, "t C"]:
    """Scores of the tokens from `position` on; `NO_SCORE` outside a range."""
    position = position + lax.broadcasted_iota(jnp.int32, score.shape, 0)
    return jnp.where((position >= start) & (position < end), score, NO_SCORE)


def softmax_step(
    score: Float[Array, "t C"], peak: Float[Array, "1 C"], total: Float[Array, "1 C"]
) -> tuple[Float[Array, "t C"], Float[Array, "1 C"], Float[Array, "1 C"], Float[Array, "1 C"]]:
    """Weights of a tile, factor for what was summed before, and the new maximum and sum."""
    new_peak = jnp.maximum(peak, score.max(0, keepdims=True))
    weight = jnp.exp(score - new_peak)
    rescale = jnp.exp(peak - new_peak)
    return weight, rescale, new_peak, total * rescale + weight.sum(0, keepdims=True)


def score_gradients(
    score: Float[Array, "t C"],
    d_weight: Float[Array, "t C"],
    log_sum_exp: Float[Array, "1 C"],
    delta: Float[Array, "1 C"],
) -> tuple[Float[Array, "t C"], Float[Array, "t C"]]:
    """Softmax weights and the gradients of the scores."""
    weight = jnp.exp(score - log_sum_exp)
    return weight, weight * (d_weight - delta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels: Kernels, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
    return _forward(kernels, tiling, inputs)[0]


def _forward(kernels: Kernels, tiling: Tiling, inputs: Inputs) -> tuple[Any, Any]:
    forward = functools.partial(kernels.forward, tiling)
    output, log_sum_exp = _lowered_for(kernels, forward, inputs)
    nonempty = (inputs.end > inputs.start)[:, None]
    shown = jnp.where(nonempty, log_sum_exp, -jnp.inf)
    return (output, shown), (inputs, output, log_sum_exp)


def _backward(kernels: Kernels, tiling: Tiling, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    inputs, output, log_sum_exp = residuals
    nonempty = (inputs.end > inputs.start)[:, None]
    d_output, d_log_sum_exp = (jnp.where(nonempty, x, 0) for x in cotangents)
    # d(score) = weight * (d(weight) - delta), log-sum-exp included: its gradient is the weight.
    delta = (d_output * output).sum(2, keepdims=True) - d_log_sum_exp
    backward = functools.partial(kernels.backward, tiling)
    d_query, d_history = _lowered_for(
        kernels, backward, inputs, d_output.astype(inputs.query.dtype), log_sum_exp, delta
    )
    gradients: dict[str, Any] = dict.fromkeys(Inputs._fields)  # None: integers have no gradient
    gradients["query"] = d_query.astype(inputs.query.dtype)
    return (Inputs(**gradients | dict(zip(("key", "value"), d_history, strict=False))),)


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encode(kernels: Kernels, encoder: HistoryEncoder, tokens: Array, covered: Array) -> Array:
    return _encode_forward(kernels, encoder, tokens, covered)[0]


def _encode_forward(
    kernels: Kernels, encoder: HistoryEncoder, tokens: Array, covered: Array
) -> tuple[Array, Any]:
    return _lowered_for(kernels, kernels.encode, encoder, tokens, covered), (
        encoder, tokens, covered,
    )  # fmt: skip


def _encode_backward(
    kernels: Kernels, residuals: Any, d_encoded: Array
) -> tuple[HistoryEncoder, Array, None]:
    gradients, d_tokens = _lowered_for(kernels, kernels.encode_backward, *residuals, d_encoded)
    gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, residuals[0])
    return gradients, d_tokens, None


_encode.defvjp(_encode_forward, _encode_backward)


def _lowered_for(kernels: Kernels, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; where the kernels cannot run, lowering it raises ValueError.

    Tracing must not raise: it does not know the platform, which may be absent from this machine.
    """
    if kernels.platform is None:
        return call(*arguments)
    message = kernels.unavailable("any other")
    shapes = jax.eval_shape(call, *arguments)

    def refuse(*_: Any) -> Any:
        return jax.tree.map(
            lambda x: _unavailable.bind(jnp.zeros(x.shape, x.dtype), message=message), shapes
        )

    return lax.platform_dependent(*arguments, **{kernels.platform: call}, default=refuse)


def _refuse(*_: Any, message: str) -> Any:
    raise ValueError(message)


_unavailable = Primitive("unavailable")
_unavailable.def_abstract_eval(lambda x, *, message: x)
_unavailable.def_impl(_refuse)
mlir.register_lowering(_unavailable, _refuse)
