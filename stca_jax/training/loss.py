"""What a step minimises: a weighted sum of losses, first of all cross-entropy (E10)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from stca_jax.batch import RequestBatch
from stca_jax.models.ranker import Ranker, RankerOutput

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


def label_weights(batch: RequestBatch, weighting: LossWeighting) -> Float[Array, "R M tasks"]:
    """How much each label counts: the target's weight over the tasks; zero where it is missing."""
    weights = target_weights(batch, weighting)[..., None] / batch.label.shape[-1]
    return jnp.where(jnp.isnan(batch.label), 0, weights)


def binary_cross_entropy(
    logits: Float[Array, "R M tasks"],
    batch: RequestBatch,
    weighting: LossWeighting = "target",
    total_weight: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Weighted mean over the labels of valid targets, in float32; NaN is a missing label.

    A batch without a label has loss 0.

    Args:
      logits: Of every target slot.
      batch: The batch.
      weighting: See `target_weights`.
      total_weight: Sum of the weights that the mean is over, as `label_weights` gives them.
        The losses of micro-batches, each with the total of all, add up to the loss of the whole
        batch; None is this batch's own.
    """
    # Garbage in padding is selected away before it meets a product, whose gradient it would reach.
    used = batch.target_mask[..., None] & ~jnp.isnan(batch.label)
    logits, label = (jnp.where(used, x.astype(jnp.float32), 0) for x in (logits, batch.label))
    losses = jnp.logaddexp(0.0, logits) - label * logits  # -log p, without overflow
    weights = label_weights(batch, weighting)
    total_weight = weights.sum() if total_weight is None else total_weight
    return (losses * weights).sum() / jnp.maximum(total_weight, jnp.finfo(jnp.float32).tiny)


class LossInputs(NamedTuple):
    """What a loss may look at: a batch or a micro-batch, and what the model made of it.

    Attributes:
      ranker: With the parameters of this step.  A table that is divided over devices has only the
        rows that the batch touches, in an order of their own: its embeddings are in `embedded`.
      batch: Padding may hold anything.
      output: Logits, history tokens and target tokens.
      embedded: Embeddings of divided tables, by level and feature.
      key: For random choices; another one for each step and each micro-batch.
    """

    ranker: Ranker
    batch: RequestBatch
    output: RankerOutput
    embedded: Mapping[str, Mapping[str, Float[Array, "R N width"]]]
    key: Key[Array, ""]


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """Something that a step minimises, with its settings as fields.

    Attributes:
      weight: What its value is multiplied by in the sum that is minimised.
      reads_unlabelled: Its batches must have `history_unlabelled`.
    """

    weight: float = dataclasses.field(default=1.0, kw_only=True)
    reads_unlabelled: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """By which its value is reported, as `train/loss/NAME`."""

    @abc.abstractmethod
    def total_weight(self, batch: RequestBatch) -> Float[Array, ""]:
        """What the mean of a whole batch is divided by, before it is cut into micro-batches."""

    @abc.abstractmethod
    def __call__(self, inputs: LossInputs, total_weight: Float[Array, ""]) -> Float[Array, ""]:
        """The loss, or a micro-batch's share of it: the shares add up to the batch's loss."""


@dataclasses.dataclass(frozen=True)
class LabelLoss(Loss):
    """`binary_cross_entropy` of the logits.

    Attributes:
      weighting: See `target_weights`.
    """

    weighting: LossWeighting = "target"

    @property
    def name(self) -> str:
        """The first of all losses."""
        return "label"

    def total_weight(self, batch: RequestBatch) -> Float[Array, ""]:
        """Sum of the labels' weights."""
        return label_weights(batch, self.weighting).sum()

    def __call__(self, inputs: LossInputs, total_weight: Float[Array, ""]) -> Float[Array, ""]:
        """E10."""
        return binary_cross_entropy(
            inputs.output.logits, inputs.batch, self.weighting, total_weight
        )
