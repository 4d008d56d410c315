"""Encoders of a log's columns, fitted on training events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data.interaction_log.moments import Moments
from stca_jax.input.encoding import Encoder, Scale, Vocabulary


def fit_vocabulary(
    values: pa.Array, train_count: np.ndarray, min_count: int, num_oov: int
) -> Vocabulary:
    """Ids for distinct values, own ones for those that training events have often enough."""
    distinct = values.to_numpy(zero_copy_only=False)
    distinct = distinct.astype(str if pa.types.is_string(values.type) else np.int64)
    return Vocabulary.fit(distinct, train_count, min_count=min_count, num_oov=num_oov)


def fit_scale(moments: Moments, scaling: str = "") -> Scale:
    """Standardises training events; a constant becomes 0.

    Args:
      moments: Of training events.
      scaling: "linear", "log", or "" for log where the tail is heavy: there few events would have
        all of the deviation, and the others none.
    """
    if scaling == "linear" or not (scaling == "log" or moments.is_heavy_tailed):
        return Scale(moments.mean, moments.deviation or 1.0)
    magnitude = np.abs(moments.sample)
    unit = float(np.median(magnitude[magnitude > 0])) if magnitude.any() else 1.0
    values = Scale(transform="log", unit=unit).transformed(moments.sample)
    mean = float(np.average(values, weights=moments.weight))
    deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=moments.weight)))
    return Scale(mean, deviation or 1.0, "log", unit)


def encode_column(encoder: Encoder, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """What `encoder.encode` makes of a column, each distinct value of categories encoded once."""
    if not encoder.size:
        return encoder.encode(pc.fill_null(column, np.nan).to_numpy())
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    encoded = column.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    if pa.types.is_string(encoded.dictionary.type):
        distinct = distinct.astype(str)
    ids = np.append(encoder.encode(distinct), encoder.encode([None])).astype(np.int32)
    return ids[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def positions(column: pa.Array | pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Where each entry of the column stands among the values; -1 if nowhere, or missing."""
    found = pc.index_in(column, values, skip_nulls=True)
    return found.fill_null(-1).to_numpy().astype(np.int64)
