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
    logits: Float[Array, "R M tasks"], batch: RequestBatch, weighting: LossWeighting = "target"
) -> Float[Array, ""]:
    """Weighted mean over valid targets of the mean over tasks, in float32.

    A batch without a valid target has loss 0.
    """
    logits = logits.astype(jnp.float32)
    # Padding is selected away, not multiplied, so that no garbage there reaches a gradient: on the
    # way in for the derivative in the logit, which is a label, and on the way out for the value.
    label = jnp.where(batch.target_mask[..., None], batch.label, 0)
    losses = jnp.logaddexp(0.0, logits) - label * logits  # -log p(label), without overflow
    losses = jnp.where(batch.target_mask[..., None], losses, 0).mean(-1)
    weights = target_weights(batch, weighting)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
