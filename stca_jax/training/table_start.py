"""Tables that start from what occurs together in the histories."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stca_jax.input.cooccurrence import cooccurrence_rows
from stca_jax.input.dataset import RequestDataset
from stca_jax.models.ranker import RankerConfig
from stca_jax.training.table_rows import Tables, stored_row


def start_from_cooccurrence(
    tables: Tables, model: RankerConfig, dataset: RequestDataset, seed: int
) -> dict[str, Float[Array, "V W"]]:
    """Tables of history features with rows from co-occurrence, where they have been seen.

    Args:
      tables: At random, as they are stored.
      model: The model that they are of.
      dataset: Whose histories.
      seed: Of the factorisation.
    """
    schema = model.read_schema(dataset.schema)
    names = [n for n in schema.history if schema.is_categorical(n)]
    shares = {n: model.embedding.cooccurrence_share if n == schema.item else 1.0 for n in names}
    widths = {n: max(1, round(tables[n].shape[1] * shares[n])) for n in names}
    found = cooccurrence_rows(dataset, widths, seed)
    most = model.embedding.replicated_rows
    return {
        **tables,
        **{n: _start(tables[n], found[n], shares[n], len(found[n]) > most) for n in names},
    }


def _start(
    table: Float[Array, "V W"], rows: Float[np.ndarray, "ids w"], share: float, is_divided: bool
) -> Float[Array, "V W"]:
    """The random row's first W - w columns beside w from co-occurrence, a share of the square."""
    num_stored, width = table.shape
    num_random = width - rows.shape[1]
    stored = np.zeros((num_stored, rows.shape[1]), np.float32)
    places = jnp.arange(len(rows))
    if is_divided:  # over devices: stored in an order of its own
        places = stored_row(places, num_stored)
    stored[np.asarray(places)] = rows
    sharded = jax.make_array_from_callback(stored.shape, table.sharding, lambda part: stored[part])

    def mix(table: Array, known: Array) -> Array:
        mixed = known
        if num_random:
            random = table[:, :num_random] * math.sqrt((1 - share) * width / num_random)
            mixed = jnp.concatenate([random, known * math.sqrt(share)], -1)
        return jnp.where((known != 0).any(-1, keepdims=True), mixed, table)

    as_before = table.format  # type: ignore[attr-defined]  # sharding and layout
    return jax.jit(mix, out_shardings=as_before)(table, sharded)
