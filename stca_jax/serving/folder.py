"""The export folder as a server reads it.

model.json             what it is, what it takes, and the SHA-256 of every other file
programs/…             StableHLO by jax.export, for CPU, CUDA and TPU
weights.safetensors    dense parameters
tables/NAME.npy        embedding tables by id, memory-mapped
features/…             what encodes raw values, where the dataset has it
golden.safetensors     requests with the evaluation's logits
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from stca_jax.errors import UserError
from stca_jax.schema import Schema

FORMAT = 1  # of the folder
MODEL = "model.json"
PROGRAMS = "programs"
WEIGHTS = "weights.safetensors"
TABLES = "tables"
FEATURES = "features"
GOLDEN = "golden.safetensors"
SHARPNESS = "match_channel/sharpness"  # the weight that servers read on the host, of soft counts


@dataclasses.dataclass(frozen=True)
class Level:
    """Features of a level, in the order in which programs take them side by side.

    Attributes:
      names: Features.
      widths: Columns of each: of an embedding, or 1 for a number.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PageArray:
    """An array of a page pool, [layers, pages, *shape].

    Attributes:
      layers: Layers of the model that are kept apart.
      shape: Of a page.
      dtype: Its dtype.
    """

    layers: int
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class CacheKind:
    """A kind of cache.

    Attributes:
      arrays: Of its pool.
      tolerance: By how much logits of golden requests may differ from the evaluation's.
    """

    arrays: Mapping[str, PageArray]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """model.json.

    Attributes:
      version: Names this export: a digest of its files.
      schema: What the model reads.
      max_history: Events of a user that it reads, the latest.
      page: Slots of a page.
      time_origin: Unix second from which the dataset counts.
      levels: "history", "target" and "request".
      match_fields: Fields of the match channel.
      decay_seconds: Its time constants.
      soft_fields: Those of its fields that have soft counts.
      caches: Kinds of caches by name; empty for a model that is served uncached.
      score_programs: (name, most targets or None, of what the number is a multiple); of an uncached
        model the name is "rows/LxM".
      tolerance: Of an uncached model.
      values: Everything in the file.
    """

    version: str
    schema: Schema
    max_history: int
    page: int
    time_origin: int
    levels: Mapping[str, Level]
    match_fields: tuple[str, ...]
    decay_seconds: tuple[float, ...]
    soft_fields: tuple[str, ...]
    caches: Mapping[str, CacheKind]
    score_programs: Sequence[tuple[str, int | None, int]]
    tolerance: float
    values: Mapping[str, Any]


def read_folder(directory: str | os.PathLike[str]) -> ModelInfo:
    """Reads model.json and checks every file against it.

    Raises:
      UserError: the folder is no export, of another version, or a file is missing, damaged or one
        too many; names it.
    """
    folder = pathlib.Path(directory)
    path = folder / MODEL
    try:
        text = path.read_text()
        values = json.loads(text)
    except OSError as error:
        raise UserError(
            f"{folder} is no exported model ({error.strerror}: {MODEL}); "
            "python -m stca_jax.experiments.export makes one"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): export the model again") from None
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {values.get('format')}, and this version of stca_jax reads "
            f"{FORMAT}: export the model again"
        )
    _check_files(folder, values["files"])
    try:
        return _info(values, hashlib.sha256(text.encode()).hexdigest()[:12])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): export the model again") from None


def describe_file(path: pathlib.Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _check_files(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    for name, described in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: export the model again, or copy the whole folder")
        if describe_file(path) != described:
            raise UserError(
                f"{path} is damaged or changed (SHA-256): export the model again, or copy the "
                "folder again"
            )


def _info(values: Mapping[str, Any], version: str) -> ModelInfo:
    inputs = values["inputs"]
    return ModelInfo(
        version=version,
        schema=Schema.from_dict(values["schema"]),
        max_history=values["max_history"],
        page=values["page"],
        time_origin=values["dataset"]["time_origin"],
        levels={
            name: Level(tuple(level["names"]), tuple(level["widths"]))
            for name, level in inputs["levels"].items()
        },
        match_fields=tuple(inputs["match_fields"]),
        decay_seconds=tuple(inputs["decay_seconds"]),
        soft_fields=tuple(inputs.get("soft_fields", ())),  # older exports know none
        caches={
            name: CacheKind(
                {
                    n: PageArray(a["layers"], tuple(a["shape"]), a["dtype"])
                    for n, a in kind["arrays"].items()
                },
                kind["tolerance"],
            )
            for name, kind in values["caches"].items()
        },
        score_programs=[tuple(p) for p in values["score_programs"]],
        tolerance=values["tolerance"],
        values=values,
    )
