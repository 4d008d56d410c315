"""Binary cross-entropy of request-level batches (E10)."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from stca_jax.batch import RequestBatch

LossWeighting = Literal["target", "request"]


def target_weights(batch: RequestBatch, weighting: LossWeighting) -> Float[Array, "R M"]:
    """How much each target slot counts; zero in padding.

    Args:
      batch: The batch.
      weighting: "target" weighs every target alike, which is exactly the per-impression objective;
        "request" weighs every request alike (the paper's mean over requests of the mean over
        targets).  The two differ when the number of targets varies.
    """
    mask = batch.target_mask.astype(jnp.float32)
    if weighting == "target":
        return mask
    return mask / jnp.maximum(batch.num_request_targets, 1).astype(jnp.float32)


def binary_cross_entropy(
    logits: Float[Array, "R M tasks"],
    batch: RequestBatch,
    weighting: LossWeighting = "target",
    total_weight: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Weighted mean over valid targets of the mean over tasks, in float32.

    A batch without a valid target has loss 0.

    Args:
      logits: Of every target slot.
      batch: The batch.
      weighting: See `target_weights`.
      total_weight: Sum of the weights that the mean is over.  The losses of micro-batches, each
        with the total of all, add up to the loss of the whole batch; None is this batch's own.
    """
    # Garbage in padding is selected away before it meets a product, whose gradient it would reach.
    used = batch.target_mask[..., None]
    logits, label = (jnp.where(used, x.astype(jnp.float32), 0) for x in (logits, batch.label))
    losses = (jnp.logaddexp(0.0, logits) - label * logits).mean(-1)  # -log p, without overflow
    weights = target_weights(batch, weighting)
    total_weight = weights.sum() if total_weight is None else total_weight
    return (losses * weights).sum() / jnp.maximum(total_weight, jnp.finfo(jnp.float32).tiny)
