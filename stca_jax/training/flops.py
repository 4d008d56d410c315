"""Analytic cost of a train step: floating-point operations, memory traffic, and what chips can do.

Only matrix products are counted, as the model's algebra has them: neither recomputation nor padding
nor elementwise work.  Forward, a weight costs 2 FLOPs per entry and row that it multiplies; the
backward pass costs twice the forward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from flax import nnx

from stca_jax.models.layers import is_matrix
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.sequence import SequenceCost
from stca_jax.ops.tiles import targets_per_token
from stca_jax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device, from its vendor's data sheet.

    Attributes:
      device_kinds: How JAX calls it.
      flops: bfloat16 FLOP/s, dense.
      memory: Bytes of HBM.
      bandwidth: Bytes/s of HBM.
      interconnect: Bytes/s that a device can send to the others of its slice or node.
    """

    device_kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# Compared on 2026-11-25 with https://cloud.google.com/tpu/docs/v5e, v5p and v6e, which give the
# interconnect of a chip in bits (1,600, 4,800 and 3,200 Gbit/s), and with NVIDIA's data sheets of
# the SXM cards, which count both directions of NVLink and, for peaks, sparsity.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 0.819e12, 200e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2.765e12, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1.64e12, 400e9),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 2**30, 2.039e12, 300e9),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * 2**30, 3.352e12, 450e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * 10**9, 4.8e12, 450e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180 * 10**9, 8e12, 900e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls by that name; None if its peak is not known here."""
    return next((c for c in CHIPS.values() if device_kind in c.device_kinds), None)


def model_flops(
    config: RankerConfig, schema: Schema, row_length: int, targets_per_row: int
) -> SequenceCost:
    """FLOPs of the configured model, in the order of attention that it runs.

    Args:
      config: The model.
      schema: Of its dataset; the sizes of vocabularies do not matter.
      row_length: Tokens of a row, which the order follows beside the next.
      targets_per_row: Target slots of a row.
    """
    cost = config.sequence.cost(targets_per_token(row_length, targets_per_row))
    ranker = nnx.eval_shape(lambda: Ranker(config, schema, rngs=nnx.Rngs(0)))
    for path, weight in nnx.to_flat_state(nnx.state(ranker, nnx.Param)):
        module, name = str(path[0]), str(path[-1])
        if module == "sequence" or not is_matrix(name, weight):
            continue  # counted above, or multiplies nothing
        amount = "per_token" if module == "history_fusion" else "per_target"
        flops = 2 * math.prod(weight.shape)
        cost = cost._replace(**{amount: getattr(cost, amount) + flops})
    num_soft = len(ranker.match_channel.soft_fields) if ranker.match_channel else 0
    cosine = 2 * config.embedding.feature_width
    return cost._replace(per_pair=cost.per_pair + num_soft * cosine)


def step_traffic(
    config: RankerConfig,
    schema: Schema,
    *,
    tokens: float,
    targets: float,
    dense_bytes: float,
    optimizer_bytes: float,
) -> float:
    """Bytes that a train step must move to and from memory, at the least.

    Dense parameters are read by the forward pass, the backward pass and the update, and written;
    their gradients and the optimizer's slots are written and read.  History tokens are written
    once; every layer reads them in both passes and adds to their gradient.  A table row is read,
    its gradient written and read, and the row updated, for every id anew.

    Args:
      config: The model.
      schema: Of its dataset.
      tokens: History tokens of the batch.
      targets: Targets of the batch.
      dense_bytes: Of the dense parameters.
      optimizer_bytes: Of the optimizer's slots.
    """
    sequence = config.sequence
    schema = config.read_schema(schema)
    widths = config.embedding.table_widths(schema, sequence.width)
    row_bytes = {
        level: 4 * sum(widths.get(name, 0) for name in getattr(schema, level))
        for level in ("history", "target", "request")
    }
    rows = tokens * row_bytes["history"]
    rows += targets * (row_bytes["target"] + row_bytes["request"])
    itemsize = 2 if config.dtype == "bfloat16" else 4
    token_bytes = (1 + 4 * sequence.cost(1).num_layers) * tokens * sequence.width * itemsize
    return 6 * dense_bytes + 2 * optimizer_bytes + 5 * rows + token_bytes
