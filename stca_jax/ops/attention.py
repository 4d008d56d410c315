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

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stca_jax.batch import covered_tokens
from stca_jax.ops import pallas_tpu, pallas_triton
from stca_jax.ops.encoder import HistoryEncoder, encode_history
from stca_jax.ops.kernels import Kernels, kernel_attention
from stca_jax.ops.reference import Order, reference_attention
from stca_jax.ops.sharded import merge_softmax, on_mesh, platform
from stca_jax.ops.tiled import Weights, tiled_attention
from stca_jax.ops.tiles import BlockSizes, default_block_sizes

Implementation = Literal["reference", "xla", "mosaic_tpu", "triton"]
_KERNELS: dict[str, Callable[[], Kernels]] = {
    "mosaic_tpu": pallas_tpu.MosaicKernels,
    "triton": pallas_triton.kernels_of_this_gpu,
}


class AttentionOutput(NamedTuple):
    """What a target gathered from its range.

    Attributes:
      output: Per-head weighted sums of values (o^ij of E4); zero for an empty range.
      log_sum_exp: float32 log of the sum of exp(scores) over the range: how much of the history
        matched.  `-inf`, with zero gradient, for an empty range.
    """

    output: Float[Array, "R M H K"]
    log_sum_exp: Float[Array, "R M H"]


def target_to_history_attention(
    query: Float[Array, "R M H K"],
    history: Float[Array, "R L D"],
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
    history_start: Int[Array, "R M"],
    history_end: Int[Array, "R M"],
    *,
    history_score: Float[Array, "R L H"] | None = None,
    order: Order | None = None,
    implementation: Implementation | Kernels | None = None,
    block_sizes: BlockSizes | None = None,
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
      history_start: First token of each target's range.
      history_end: One past its last token; `start == end` is an empty history.
      history_score: Optional additive score of each token and head, the same for every target.
      order: "absorbed" or "projected"; None takes the one with fewer FLOPs if every target reads
        the whole row. Where rows pack many requests, pass `cheaper_order` of one request's targets.
      implementation: "reference" (einsums), "xla" (tiles that follow the ranges; anywhere),
        "mosaic_tpu" or "triton" (Pallas kernels of TPUs and of NVIDIA GPUs; lowering them for
        another platform raises ValueError), or kernels of your own. None: `best_implementation`.
      block_sizes: Tile sizes, where the defaults do not suit.

    Returns:
      `AttentionOutput`; `output` has the dtype of `query`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown `order` or `implementation`.
    """
    return _attention(
        query, history, None, w_key, w_value, history_start, history_end,
        history_score, order, implementation, block_sizes,
    )  # fmt: skip


def history_layer(
    query: Float[Array, "R M H K"],
    tokens: Float[Array, "R L D"],
    encoder: HistoryEncoder,
    w_key: Float[Array, "D H K"],
    w_value: Float[Array, "D H K"],
    history_start: Int[Array, "R M"],
    history_end: Int[Array, "R M"],
    *,
    history_score: Float[Array, "R L H"] | None = None,
    order: Order | None = None,
    implementation: Implementation | Kernels | None = None,
    block_sizes: BlockSizes | None = None,
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
      history_start: First token of each target's range.
      history_end: One past its last token; `start == end` is an empty history.
      history_score: Optional additive score of each token and head, the same for every target.
      order: See `target_to_history_attention`.
      implementation: See `target_to_history_attention`.
      block_sizes: See `target_to_history_attention`.

    Returns:
      `AttentionOutput`; `output` has the dtype of `query`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown `order` or `implementation`.
    """
    return _attention(
        query, tokens, encoder, w_key, w_value, history_start, history_end,
        history_score, order, implementation, block_sizes,
    )  # fmt: skip


def best_implementation() -> Implementation:
    """What `implementation=None` takes on the devices of the mesh, or else of this process.

    "triton" on NVIDIA GPUs that have it; "xla" elsewhere, on TPUs as well: its kernels are checked
    by interpreter and compiler, but have not been seen running on a device.
    """
    return "triton" if platform() == "gpu" and pallas_triton.gpu_is_supported() else "xla"


def cheaper_order(num_targets: int, num_heads: int, width: int) -> Order:
    """The order with fewer FLOPs: projecting L tokens pays when m > d / (h - 1)."""
    return "projected" if num_targets * (num_heads - 1) > width else "absorbed"


def _attention(
    query: Array,
    tokens: Array,
    encoder: HistoryEncoder | None,
    w_key: Array,
    w_value: Array,
    history_start: Array,
    history_end: Array,
    history_score: Array | None,
    order: Order | None,
    implementation: Implementation | Kernels | None,
    block_sizes: BlockSizes | None,
) -> AttentionOutput:
    """Both public functions: `encoder` is None where the tokens are encoded already."""
    _check(query, tokens, w_key, w_value, history_start, history_end, history_score,
           order, implementation)  # fmt: skip
    order = order or cheaper_order(query.shape[1], query.shape[2], tokens.shape[-1])
    implementation = implementation or best_implementation()
    weights = (encoder, w_key.astype(query.dtype), w_value.astype(query.dtype))
    if implementation == "reference":
        single_device = functools.partial(_reference, order=order)
    else:
        grouped = _grouped_attention(implementation, query.shape[1], block_sizes)
        single_device = functools.partial(_grouped, order=order, attend=grouped)
    output, log_sum_exp = on_mesh(
        single_device, merge_softmax, weights, query, (tokens, history_score),
        history_start, history_end,
    )  # fmt: skip
    return AttentionOutput(output.astype(query.dtype), log_sum_exp)


_Weights = tuple[HistoryEncoder | None, Array, Array]
_Tokens = tuple[Array, Array | None]


def _reference(
    weights: _Weights, query: Array, per_token: _Tokens, start: Array, end: Array,
    *, order: Order,
) -> tuple[Array, Array]:  # fmt: skip
    encoder, w_key, w_value = weights
    history, history_score = per_token
    covered = covered_tokens(start, end, history.shape[1])[..., None]
    history = jnp.where(covered, history, 0)
    if history_score is not None:
        history_score = jnp.where(covered, history_score, 0)
    if encoder is not None:
        history = encode_history(encoder, history)
    return reference_attention(query, history, w_key, w_value, start, end, history_score, order)


def _grouped_attention(
    implementation: Implementation | Kernels, num_targets: int, block_sizes: BlockSizes | None
) -> Callable[..., tuple[Array, Array]]:
    """`tiled_attention` or its equivalent by kernels, with block sizes."""
    if implementation == "xla":
        sizes = block_sizes or default_block_sizes(num_targets, platform())
        return functools.partial(tiled_attention, sizes=sizes)
    kernels = _KERNELS[implementation]() if isinstance(implementation, str) else implementation
    return functools.partial(kernel_attention, kernels, sizes=block_sizes)


def _grouped(
    weights: _Weights, query: Array, per_token: _Tokens, start: Array, end: Array,
    *, order: Order, attend: Callable[..., tuple[Array, Array]],
) -> tuple[Array, Array]:  # fmt: skip
    """Brings an order into the form of grouped attention, see `stca_jax.ops.tiled`."""
    encoder, w_key, w_value = weights
    tokens, history_score = per_token
    covered = covered_tokens(start, end, tokens.shape[1])
    scaled = query.astype(jnp.float32) / jnp.sqrt(jnp.float32(query.shape[-1]))
    if order == "projected":
        grouped, tile_weights = scaled[:, :, :, None], Weights(encoder, w_key, w_value)
    else:
        grouped = jnp.einsum("rmhk,dhk->rmhd", scaled, w_key)[:, :, None]
        tile_weights = Weights(encoder, None, None)
    output, log_sum_exp = attend(
        grouped.astype(tokens.dtype), tokens, tile_weights, covered, start, end, history_score
    )
    if order == "projected":
        output = output[:, :, :, 0]
    else:
        output = jnp.einsum("rmhd,dhk->rmhk", output[:, :, 0], w_value)
    return output, log_sum_exp.reshape(query.shape[:3])


def _check(
    query: Array,
    tokens: Array,
    w_key: Array,
    w_value: Array,
    history_start: Array,
    history_end: Array,
    history_score: Array | None,
    order: Order | None,
    implementation: Implementation | Kernels | None,
) -> None:
    if query.ndim != 4 or tokens.ndim != 3:
        raise ValueError(
            f"query has shape {query.shape} and tokens {tokens.shape}; expected [R, M, H, K] and "
            "[R, L, D]"
        )
    R, M, H, K = query.shape
    L, D = tokens.shape[1:]
    expected: dict[str, tuple[Array | None, tuple[int, ...]]] = {
        "tokens": (tokens, (R, L, D)),
        "w_key": (w_key, (D, H, K)),
        "w_value": (w_value, (D, H, K)),
        "history_start": (history_start, (R, M)),
        "history_end": (history_end, (R, M)),
        "history_score": (history_score, (R, L, H)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} has shape {value.shape}, expected {shape} beside query {query.shape} and "
                f"tokens {tokens.shape}"
            )
    for name, choice, choices in (
        ("order", order, get_args(Order)),
        ("implementation", implementation, get_args(Implementation)),
    ):
        if isinstance(choice, str) and choice not in choices:
            raise ValueError(f"{name} is {choice!r}; it must be one of {choices} or None")
