"""The rows of each embedding table that a batch touches.

A train step gathers those rows, lets the model run on them as if they were the whole tables, and
writes them back.  Its time and its gradients therefore do not grow with the vocabulary:

    batch.history["item"]   812   7  812  55        ids into a table of 100,000,000 rows
    touched rows              7  55  812  V         distinct, padded to a static length with V
    local ids                 2   0    2   1        the same batch, ids into the touched rows
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stca_jax.batch import RequestBatch

_LEVELS = ("history", "target", "request")


def touch(
    batch: RequestBatch, num_rows: Mapping[str, int]
) -> tuple[RequestBatch, dict[str, Int[Array, " U"]]]:
    """Renumbers the batch's ids by the distinct rows they touch.

    Renumbering keeps equality of ids, which is all that the match channel asks of them.

    Args:
      batch: A batch; ids in [0, num_rows).
      num_rows: Rows of each table.

    Returns:
      The batch with local ids, and for each table the ids of its touched rows: sorted, padded at
      the end with `num_rows`.  A table no larger than the batch's ids is touched whole.
    """
    local = {level: dict(getattr(batch, level)) for level in _LEVELS}
    touched = {}
    for name, size in num_rows.items():
        places = [level for level in _LEVELS if name in local[level]]
        ids = [local[level][name] for level in places]
        num_ids = sum(i.size for i in ids)
        if size <= num_ids:
            touched[name] = jnp.arange(size)
            continue
        flat = jnp.concatenate([i.reshape(-1) for i in ids])
        touched[name], inverse = jnp.unique(
            flat, size=num_ids, fill_value=size, return_inverse=True
        )
        offset = 0
        for level, i in zip(places, ids, strict=True):
            local[level][name] = inverse[offset : offset + i.size].reshape(i.shape)
            offset += i.size
    return batch.replace(**local), touched


def gather(
    tables: Mapping[str, Float[Array, "V W"]], touched: Mapping[str, Int[Array, " U"]]
) -> dict[str, Float[Array, "U W"]]:
    """The touched rows; unused places hold some row that no local id refers to."""
    return {name: table.at[touched[name]].get(mode="clip") for name, table in tables.items()}
