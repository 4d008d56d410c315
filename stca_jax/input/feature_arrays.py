"""Texts and trends as plain arrays, in which `stca_jax.input.features` stores them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from stca_jax.input.trends import Trends, ValueEvents


def pack_trends(trends: Trends | None) -> dict[str, np.ndarray]:
    """The arrays of `Trends.tail`; none without trends."""
    if trends is None:
        return {}
    assert trends.first is not None
    arrays = {"time": np.asarray(trends.time), "events": np.asarray(trends.events)}
    counts = {"": trends} | dict(trends.fields)
    for field, events in counts.items():
        for what in ("positive", "known"):
            for k, column in enumerate(getattr(events, what)):
                arrays[f"{what}_{k}:{field}"] = np.asarray(column)
    for field, of_field in trends.fields.items():
        arrays |= {f"key:{field}": of_field.key, f"first:{field}": trends.first[field]}
    return arrays


def unpack_trends(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Trends:
    """The inverse, with what is no array."""
    if "events" not in arrays:  # as written before: the time of each event, labels likewise
        arrays = {**arrays, "events": np.arange(len(arrays["time"]) + 1, dtype=np.int32)}

    def counts(field: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        tasks = range(len(values["tasks"]))
        return (
            [arrays[f"positive_{k}:{field}"] for k in tasks],
            [arrays[f"known_{k}:{field}"] for k in tasks],
        )

    fields = values["fields"]
    return Trends(
        values["windows"],
        tuple(values["tasks"]),
        values["label_delay"],
        {field: ValueEvents(arrays[f"key:{field}"], *counts(field)) for field in fields},
        arrays["time"],
        arrays["events"],
        *counts(""),
        {field: arrays[f"first:{field}"] for field in fields},
    )


def pack(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Integers as they are; texts as bytes, and where each begins."""
    if values.dtype.kind == "i":
        return {f"values:{name}": values.astype(np.int64)}
    encoded = [text.encode() for text in values.tolist()]
    return {
        f"bytes:{name}": np.frombuffer(b"".join(encoded), np.uint8),
        f"begin:{name}": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }


def unpack(name: str, arrays: Mapping[str, np.ndarray], is_text: bool, dtype: type) -> np.ndarray:
    """The inverse; texts of a dtype."""
    if not is_text:
        return arrays[f"values:{name}"]
    data, begin = arrays[f"bytes:{name}"].tobytes(), arrays[f"begin:{name}"].tolist()
    texts = [data[a:b].decode() for a, b in itertools.pairwise(begin)]
    return np.array(texts, dtype)
