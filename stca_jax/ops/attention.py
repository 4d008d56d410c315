"""Target-to-history attention: m targets attend to contiguous ranges of one flat row of history.

The op is E3 and E4 of the paper, and with `history_layer` E1 as well.  History tokens never
interact, so a range is only a mask on scores: targets of several requests, users and windows share
a row exactly.

Two orders of the same algebra (`order`):

- "projected": K = X W_K and V = X W_V, then attention over K and V;
- "absorbed": u = q W_K^T, attention over X itself, then W_V on the m weighted sums.

Dimensions: R rows, L history tokens and M targets per row, H heads, K head width, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.implementation import Implementation, Order, Tokens, Weights
from stca_jax.ops.pallas_mosaic_gpu import MosaicGpuKernels
from stca_jax.ops.pallas_tpu import MosaicKernels
from stca_jax.ops.pallas_triton import TritonKernels
from stca_jax.ops.reference import Reference
from stca_jax.ops.sharded import merge_softmax, on_mesh, platform
from stca_jax.ops.tiled import Tiled
from stca_jax.ops.tiles import BlockSizes, targets_per_token
from stca_jax.ranges import Ranges, SharedRanges

ImplementationName = Literal["reference", "xla", "mosaic_tpu", "triton", "mosaic_gpu"]
IMPLEMENTATIONS: Mapping[str, type[Implementation]] = {
    "reference": Reference,
    "xla": Tiled,
    "mosaic_tpu": MosaicKernels,
    "triton": TritonKernels,
    "mosaic_gpu": MosaicGpuKernels,
}
# The first that can run is taken.  The kernels of Mosaic are not among them: they are checked by
# interpreter and compiler, but have not been seen running on a device.
_PREFERRED: tuple[ImplementationName, ...] = ("triton", "xla")


class AttentionOptions(NamedTuple):
    """How the op is computed; nothing here changes its result.

    Attributes:
      order: "absorbed" or "projected"; None takes the one with fewer FLOPs for as many targets as
        `targets_per_token` expects to read a token.
      implementation: "reference" (einsums), "xla" (tiles that follow the ranges; anywhere),
        "mosaic_tpu", "triton" or "mosaic_gpu" (Pallas kernels of TPUs, of NVIDIA GPUs, and of
        those in bfloat16 without Triton; lowering them for another platform raises ValueError), or
        one of your own. None: `best_implementation`.
      block_sizes: Tile sizes, where the defaults do not suit.
    """

    order: Order | None = None
    implementation: ImplementationName | Implementation | None = None
    block_sizes: BlockSizes | None = None


class AttentionOutput(NamedTuple):
    """What a target gathered from its range.

    Attributes:
      output: Per-head weighted sums of values (o^ij of E4); zero for an empty range.
      log_sum_exp: float32 log of the sum of exp(scores) over the range: how much of the history
        matched.  `-inf`, with zero gradient, for an empty range.
    """

    output: Float[Array, "R M H K"]
    log_sum_exp: Float[Array, "R M H"]


_DEFAULT = AttentionOptions()


def target_to_history_attention(
    query: Float[Array, "R M H K"],
    history: Float[Array, "R L D"],
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
    ranges: Ranges,
    *,
    history_score: Float[Array, "R L H"] | None = None,
    options: AttentionOptions = _DEFAULT,
) -> AttentionOutput:
    """Softmax attention of each target over its own range of the row (E3, E4).

    Scores are `query . (history w_key) / sqrt(K) + history_score`, in float32 like the softmax and
    the sums, whatever the inputs' dtype.  Tokens that no range covers may hold anything, NaN
    included.  Differentiable in `query`, `history`, `w_key`, `w_value` and `history_score`.

    Args:
      query: Queries after W_Q, not yet scaled.
      history: Encoded tokens X~ of E1.
      w_key: W_K of E3 for all heads.
      w_value: W_V of E4 for all heads.
      ranges: Tokens that each target reads.
      history_score: Optional additive score of each token and head, the same for every target.
      options: How it is computed.

    Returns:
      `AttentionOutput`; `output` has the dtype of `query`.  Rows without tokens are empty
      histories, and without targets there is nothing to return: arrays of size zero.

    Raises:
      ValueError: shapes that do not fit together or do not divide over the mesh, an unknown option,
        or an implementation that cannot run, see `Implementation.unavailable`.
    """
    weights = Weights(None, w_key, w_value)
    return _attention(query, Tokens(history, history_score), weights, ranges, options)


def history_layer(
    query: Float[Array, "R M H K"],
    tokens: Float[Array, "R L D"],
    encoder: HistoryEncoder,
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
    ranges: Ranges,
    *,
    history_score: Float[Array, "R L H"] | None = None,
    options: AttentionOptions = _DEFAULT,
) -> AttentionOutput:
    """The history path of a layer in one pass: encode the tokens (E1) and attend to them (E3, E4).

    Equals `target_to_history_attention(query, encode_history(encoder, tokens), ...)`, but encoded
    tokens exist one block at a time, in the backward pass too, and blocks that no range touches are
    not encoded.  Differentiable in the weights as well.

    Args:
      query: Queries after W_Q, not yet scaled.
      tokens: Tokens X; those that no range covers may hold anything.
      encoder: Weights of the history FFN and LayerNorm.
      w_key: W_K of E3 for all heads.
      w_value: W_V of E4 for all heads.
      ranges: Tokens that each target reads.
      history_score: Optional additive score of each token and head, the same for every target.
      options: How it is computed.

    Returns:
      See `target_to_history_attention`.

    Raises:
      ValueError: see `target_to_history_attention`.
    """
    weights = Weights(encoder, w_key, w_value)
    return _attention(query, Tokens(tokens, history_score), weights, ranges, options)


def best_implementation() -> ImplementationName:
    """What `implementation=None` takes on the devices of the mesh, or else of this process.

    "triton" on NVIDIA GPUs that have it; "xla" elsewhere.
    """
    here = platform()
    return next(n for n in _PREFERRED if IMPLEMENTATIONS[n].here().unavailable(here) is None)


def cheaper_order(num_targets: int, num_heads: int, width: int) -> Order:
    """The order with fewer FLOPs for m targets of a token: projecting pays when m > d / (h - 1)."""
    return "projected" if num_targets * (num_heads - 1) > width else "absorbed"


def _attention(
    query: Array, tokens: Tokens, weights: Weights, ranges: Ranges, options: AttentionOptions
) -> AttentionOutput:
    _check_options(options)
    _check_shapes(query, tokens, weights, ranges)
    if 0 in (*query.shape[:2], tokens.value.shape[1]):
        return AttentionOutput(
            jnp.zeros_like(query), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
        )
    M, H = query.shape[1:3]
    L, D = tokens.value.shape[1:]
    readers = targets_per_token(L, M, is_shared=isinstance(ranges, SharedRanges))
    order = options.order or cheaper_order(readers, H, D)
    implementation = options.implementation or best_implementation()
    if isinstance(implementation, str):
        implementation = IMPLEMENTATIONS[implementation].here()
    _, w_key, w_value = weights

    def on_device(
        weights: Weights, query: Array, tokens: Tokens, ranges: Ranges
    ) -> tuple[Array, Array]:
        return implementation.attend(query, tokens, weights, ranges, order, options.block_sizes)

    output, log_sum_exp = on_mesh(
        on_device,
        merge_softmax,
        weights._replace(w_key=w_key.astype(query.dtype), w_value=w_value.astype(query.dtype)),
        query,
        tokens,
        ranges,
    )
    return AttentionOutput(output.astype(query.dtype), log_sum_exp)


def _check_shapes(query: Array, tokens: Tokens, weights: Weights, ranges: Ranges) -> None:
    if query.ndim != 4 or tokens.value.ndim != 3:
        raise ValueError(
            f"query has shape {query.shape} and tokens {tokens.value.shape}; expected "
            "[R, M, H, K] and [R, L, D]"
        )
    R, M, H, K = query.shape
    L, D = tokens.value.shape[1:]
    expected: dict[str, tuple[Array | None, tuple[int, ...]]] = {
        "tokens": (tokens.value, (R, L, D)),
        "w_key": (weights.w_key, (D, H, K)),
        "w_value": (weights.w_value, (D, H, K)),
        "ranges.start": (ranges.start, (R, M)),
        "ranges.end": (ranges.end, (R, M)),
        "history_score": (tokens.score, (R, L, H)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} has shape {value.shape}, expected {shape} beside query {query.shape} and "
                f"tokens {tokens.value.shape}"
            )


def _check_options(options: AttentionOptions) -> None:
    for name, choices in (
        ("order", get_args(Order)),
        ("implementation", get_args(ImplementationName)),
    ):
        choice = getattr(options, name)
        if isinstance(choice, str) and choice not in choices:
            raise ValueError(f"{name} is {choice!r}; it must be one of {choices} or None")
