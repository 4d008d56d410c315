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
from jaxtyping import Array, Bool, Float, Int

from stca_jax.ops.encoder import HistoryEncoder, encode_history
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.implementation import GroupedImplementation, Tokens, TokenWeights
from stca_jax.ops.lowering import lowered_for
from stca_jax.ops.tiles import BlockSizes, Tiling, make_tiling, tile_targets, untile_targets
from stca_jax.ranges import Ranges

_SCORE_COLUMNS = 3


class Inputs(NamedTuple):
    """Inputs of the kernels.

    Attributes:
      query: Scaled queries by target tile.
      key: Keys by row, padded to whole history tiles; None until tokens are encoded, which they
        are then.
      value: Values; None if they are the keys.
      start: First token of each target's range, repeated for its heads.
      end: One past its last token.
      first: First history tile that some target of the tile needs.
      last: One past the last one; not above `first` if none.
    """

    query: Float[Array, "J G E C"]
    key: Float[Array, "R G L E"] | None
    value: Float[Array, "R G L E"] | None
    start: Int[Array, "J 1 C"]
    end: Int[Array, "J 1 C"]
    first: Int[Array, " J"]
    last: Int[Array, " J"]

    @property
    def arrays(self) -> int:
        """How many keys and values are: one if they are the same."""
        return 1 if self.value is None else 2

    @property
    def history(self) -> tuple[Array, ...]:
        """Keys and values, or the one array that is both."""
        return tuple(x for x in (self.key, self.value) if x is not None)


class Outcome(NamedTuple):
    """What the backward pass needs to know of the forward pass, and of the loss.

    Attributes:
      log_sum_exp: float32, as `Kernels.forward` returned it.
      delta: float32, such that d(score) = weight * (d(weight) - delta).
      d_output: Gradient of the weighted sums, in the dtype of the queries.
    """

    log_sum_exp: Float[Array, "J G 1 C"]
    delta: Float[Array, "J G 1 C"]
    d_output: Float[Array, "J G E C"]


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
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """Gradients of the queries, and of `Inputs.history`.

        Args:
          tiling: How the batch is cut.
          inputs: Of the forward pass.
          outcome: Of it.

        Returns:
          Of the shapes of `inputs`: float32 for the queries, the keys' dtype for the history.
        """

    @abc.abstractmethod
    def can_encode(self, encoder: HistoryEncoder, dtype: Any) -> bool:
        """Whether `encode` takes these weights and tokens of that dtype.

        XLA's `encode_history` encodes the others, and stores hidden units of all tokens.
        """

    @abc.abstractmethod
    def encode(self, unencoded: Unencoded) -> Float[Array, "R L D"]:
        """E1 of all tokens, see `encode_history`, without storing hidden units.

        Returns:
          In the tokens' dtype; any finite numbers where nothing is covered.
        """

    @abc.abstractmethod
    def encode_backward(
        self, unencoded: Unencoded, d_encoded: Float[Array, "R L D"]
    ) -> tuple[HistoryEncoder, Float[Array, "R n D"]]:
        """Gradients of the weights, float32, and of the tokens; equal inputs give equal bits.

        Args:
          unencoded: As for `encode`.
          d_encoded: Gradients of what `encode` returned; ignored where nothing is covered.
        """

    def layer_forward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, keep: bool
    ) -> tuple[Array, Array, Float[Array, "R 1 L E"] | None]:
        """What `forward` returns for tokens that are encoded first, and those for `layer_backward`.

        Args:
          tiling: How the batch is cut.
          inputs: Of `forward`, without keys.
          unencoded: Of the keys, which are the values.
          keep: Without it, the encoded tokens may be None.
        """
        del keep
        encoded = self.encode(unencoded)[:, None]
        key = pad_to(encoded, *encoded.shape[:3], inputs.query.shape[2])
        return *self.forward(tiling, inputs._replace(key=key)), key

    def layer_backward(
        self,
        tiling: Tiling,
        inputs: Inputs,
        unencoded: Unencoded,
        outcome: Outcome,
    ) -> tuple[Array, HistoryEncoder, Float[Array, "R n D"]]:
        """Gradients of the queries, see `backward`, and those that `encode_backward` returns.

        Args:
          tiling: As for `backward`.
          inputs: As for `backward`, with the keys that `layer_forward` returned; those that no
            range has may be anything.
          unencoded: As for `layer_forward`.
          outcome: As for `backward`.
        """
        d_query, (d_key,) = self.backward(tiling, inputs, outcome)
        d_encoded = d_key[:, 0, :, : unencoded.tokens.shape[-1]]
        return d_query, *self.encode_backward(unencoded, d_encoded)

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
        covered = pad_to(ranges.covered(length)[..., None], R, tiling.tiles_per_row * tile, 1)
        key = value = unencoded = None
        if tokens.score is None and self._encodes_keys(weights, tokens.value.dtype):
            unencoded = Unencoded(weights.encoder, tokens.value, covered)  # type: ignore[arg-type]
        else:
            key, value = self._keys_and_values(tokens.value, weights, covered)
            if tokens.score is not None:
                score = _clean(tokens.score, covered).astype(jnp.float32)
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
        output, log_sum_exp = _attend(self, tiling, inputs, unencoded)

        def unstack(x: Float[Array, "J G e C"]) -> Float[Array, "R M G A e"]:
            x = x[..., : A * tiling.targets]
            x = x.reshape(*x.shape[:3], A, tiling.targets).transpose(0, 4, 1, 3, 2)
            return untile_targets(x, tiling, M)

        return unstack(output)[..., :E], unstack(log_sum_exp)[..., 0]

    def _encodes_keys(self, weights: TokenWeights, dtype: Any) -> bool:
        """Whether keys are encoded tokens, and values as well, and they encode them."""
        encoder, is_token = weights.encoder, weights.w_key is None or weights.w_value is None
        return is_token and encoder is not None and self.can_encode(encoder, dtype)

    def _keys_and_values(
        self, tokens: Float[Array, "R n D"], weights: TokenWeights, covered: Bool[Array, "R L 1"]
    ) -> tuple[Float[Array, "R G L E"], Float[Array, "R G L E"] | None]:
        """Of whole rows, padded to whole history tiles; see `Inputs`."""
        if weights.encoder is None:
            x = _clean(tokens, covered)
        else:
            x = encode_tokens(self, Unencoded(weights.encoder, tokens, covered))
        if weights.w_key is None or weights.w_value is None:
            return x[:, None], None
        key, value = (jnp.einsum("rld,dgk->rglk", x, w) for w in (weights.w_key, weights.w_value))
        return key, value


def encode_tokens(kernels: Kernels, unencoded: Unencoded) -> Float[Array, "R L D"]:
    """`Kernels.encode` where they can, and else XLA's `encode_history`; differentiable."""
    encoder, tokens, covered = unencoded
    if kernels.can_encode(encoder, tokens.dtype):
        return _encode(kernels, unencoded)
    return encode_history(encoder, _clean(tokens, covered))


def _clean(x: Float[Array, "R n D"], covered: Bool[Array, "R L 1"]) -> Float[Array, "R L D"]:
    """Zero where nothing is covered, and behind the rows."""
    R, n, D = x.shape
    return pad_to(jnp.where(covered[:, :n], x, 0), R, covered.shape[1], D)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    kernels: Kernels, tiling: Tiling, inputs: Inputs, unencoded: Unencoded | None
) -> tuple[Array, Array]:
    """`Kernels.forward`, or `layer_forward` if tokens are not encoded yet."""
    return _forward(kernels, tiling, inputs, unencoded, keep=False)[0]


def _forward(
    kernels: Kernels, tiling: Tiling, inputs: Inputs, unencoded: Unencoded | None, keep: bool = True
) -> tuple[Any, Any]:
    if unencoded is None:
        forward = functools.partial(kernels.forward, tiling)
        output, log_sum_exp = _lowered_for(kernels, forward, inputs)
    else:
        layer_forward = functools.partial(kernels.layer_forward, tiling, keep=keep)
        output, log_sum_exp, key = _lowered_for(kernels, layer_forward, inputs, unencoded)
        inputs = inputs._replace(key=key)
    nonempty = (inputs.end > inputs.start)[:, None]
    shown = jnp.where(nonempty, log_sum_exp, -jnp.inf)
    return (output, shown), (inputs, unencoded, output, log_sum_exp)


def _backward(
    kernels: Kernels, tiling: Tiling, residuals: Any, cotangents: Any
) -> tuple[Inputs, Unencoded | None]:
    inputs, unencoded, output, log_sum_exp = residuals
    nonempty = (inputs.end > inputs.start)[:, None]
    d_output, d_log_sum_exp = (jnp.where(nonempty, x, 0) for x in cotangents)
    # d(score) = weight * (d(weight) - delta), log-sum-exp included: its gradient is the weight.
    delta = (d_output * output).sum(2, keepdims=True) - d_log_sum_exp
    outcome = Outcome(log_sum_exp, delta, d_output.astype(inputs.query.dtype))
    gradients: dict[str, Any] = dict.fromkeys(Inputs._fields)  # None: integers have no gradient
    d_unencoded: Any = None
    if unencoded is None:
        backward = functools.partial(kernels.backward, tiling)
        d_query, d_history = _lowered_for(kernels, backward, inputs, outcome)
        gradients |= dict(zip(("key", "value"), d_history, strict=False))
    else:
        layer_backward = functools.partial(kernels.layer_backward, tiling)
        d_query, *d_layer = _lowered_for(kernels, layer_backward, inputs, unencoded, outcome)
        d_unencoded = _gradients(unencoded, *d_layer)
    gradients["query"] = d_query.astype(inputs.query.dtype)
    return Inputs(**gradients), d_unencoded


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encode(kernels: Kernels, unencoded: Unencoded) -> Array:
    return _encode_forward(kernels, unencoded)[0]


def _encode_forward(kernels: Kernels, unencoded: Unencoded) -> tuple[Array, Unencoded]:
    return _lowered_for(kernels, kernels.encode, unencoded), unencoded


def _encode_backward(kernels: Kernels, unencoded: Unencoded, d_encoded: Array) -> tuple[Unencoded]:
    gradients = _lowered_for(kernels, kernels.encode_backward, unencoded, d_encoded)
    return (_gradients(unencoded, *gradients),)


_encode.defvjp(_encode_forward, _encode_backward)


def _gradients(unencoded: Unencoded, d_encoder: HistoryEncoder, d_tokens: Array) -> Any:
    d_encoder = jax.tree.map(lambda g, w: g.astype(w.dtype), d_encoder, unencoded.encoder)
    return Unencoded(d_encoder, d_tokens, None)  # type: ignore[arg-type]  # no gradient


def _lowered_for(kernels: Kernels, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; where the kernels cannot run, lowering it raises ValueError."""
    if kernels.platform is None:
        return call(*arguments)
    return lowered_for(kernels.platform, str(kernels.unavailable("any other")), call, *arguments)


def compute_capability() -> str:
    """Of this process's GPU, as NVIDIA names it; other makers' are no numbers."""
    return str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))
