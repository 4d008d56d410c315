"""An exported model in memory: programs, weights, tables, and what encodes features for them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Float
from safetensors.numpy import load_file

from stca_jax.errors import UserError, first_line
from stca_jax.input.features import Features
from stca_jax.serving import folder as folders
from stca_jax.serving.events import as_array
from stca_jax.serving.folder import SHARPNESS, ModelInfo, read_folder
from stca_jax.serving.soft_counts import SoftCounts

MAX_TARGETS = 2_048
# Numbers of targets that programs are compiled for: what is asked for is padded to the next.
BUCKETS = (1, 4, 16, 32, 48, 64, 80, 104, 128, 256, 384, 512, 768, 1_024, 1_536, MAX_TARGETS)
DEFAULT_CACHE = "keys_values"


class ServingModel:
    """What `load` returns.

    Attributes:
      info: model.json.
      cache: Kind of cache; None for a model that is served uncached.
      features: What encodes raw values; None if the dataset had none, so that ids and numbers as
        trained must be given.
      weights: On the device.
      soft_counts: Soft counts of the match channel; None without any.
    """

    def __init__(self, directory: pathlib.Path, info: ModelInfo, cache: str | None):
        """Use `load`."""
        self.directory = directory
        self.info = info
        self.cache = cache
        folder = directory / folders.FEATURES
        self.features = Features.read(folder) if folder.exists() else None
        weights = load_file(directory / folders.WEIGHTS)
        self.weights: dict[str, Array] = jax.device_put(weights)
        self._tables = {
            name: np.load(directory / folders.TABLES / f"{name}.npy", mmap_mode="r")
            for name in info.schema.vocabularies
        }
        self.soft_counts = None
        if info.soft_fields:
            tables = {name: self._tables[name] for name in info.soft_fields}
            self.soft_counts = SoftCounts(tables, weights[SHARPNESS])
        self._programs: dict[str, Any] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, cache: str = DEFAULT_CACHE) -> ServingModel:
        """Reads an export folder, whose every file is checked against its SHA-256.

        `Scorer` then checks the golden requests, on the device and in the cache that will serve.

        Args:
          directory: What `python -m stca_jax.experiments.export` wrote.
          cache: "keys_values", "tokens" (1/2 of the memory, slower) or "int8" (1/8, and logits
            that differ a little; by how much is in model.json). A model that is served uncached has
            none of them.

        Raises:
          UserError: the folder is no export, a file is damaged or of another version, or there is
            no such cache.
        """
        path = pathlib.Path(directory)
        info = read_folder(path)
        if info.caches and cache not in info.caches:
            raise UserError(f"cache is {cache!r}; this model has {', '.join(info.caches)}")
        return cls(path, info, cache if info.caches else None)

    @property
    def tolerance(self) -> float:
        """By how much logits of golden requests may differ from the evaluation's."""
        return self.info.tolerance if self.cache is None else self.info.caches[self.cache].tolerance

    def embed(self, level: str, columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n W"]:
        """Encoded features as programs take them: rows of tables and numbers, side by side.

        Args:
          level: "history", "target" or "request".
          columns: Ids and numbers by name, n each.
        """
        names = self.info.levels[level].names
        parts = [
            self._tables[name][columns[name]]
            if name in self._tables
            else np.asarray(columns[name], np.float32)[:, None]
            for name in names
        ]
        if not parts:
            return np.zeros((1, 0), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def program(self, name: str) -> Any:
        """A compiled function by the name of its program; it compiles for shapes it has not met.

        Raises:
          UserError: this version of JAX cannot read it.
        """
        if name not in self._programs:
            folder = folders.PROGRAMS if self.cache is None else f"{folders.PROGRAMS}/{self.cache}"
            path = self.directory / folder / f"{name}.stablehlo"
            try:
                exported = jax_export.deserialize(bytearray(path.read_bytes()))
            except Exception as error:  # of many kinds, by version
                raise UserError(
                    f"{path} was exported by jax {self.info.values['jax']} and cannot be read by "
                    f"jax {jax.__version__} ({first_line(error)}): export the model again"
                ) from error
            changes_pool = name in ("write_page", "append")
            donated = (1,) if changes_pool else ()
            self._programs[name] = jax.jit(exported.call, donate_argnums=donated)
        return self._programs[name]

    def score_program(self, num_targets: int, num_events: int) -> tuple[str, int, int]:
        """Program, number of targets and, of an uncached model, of events that it is called with.

        Args:
          num_targets: At least.
          num_events: At least; of any number, of a cached model.
        """
        if self.cache is not None:
            bucket = next(size for size in BUCKETS if size >= num_targets)
            for name, most, multiple in self.info.score_programs:
                if (most is None or bucket <= most) and bucket % multiple == 0:
                    return name, bucket, 0
        shapes = []
        for name, *_ in self.info.score_programs:
            length, _, targets = name.removeprefix("rows/").partition("x")
            shapes.append((int(length), int(targets), name))
        fits = min(s for s in shapes if s[0] >= num_events and s[1] >= num_targets)
        return fits[2], fits[1], fits[0]


def check_encoded(
    model: ServingModel, level: str, columns: Mapping[str, Any], size: int | None = None
) -> dict[str, np.ndarray]:
    """Ids and numbers as the tables and programs take them: int32 in range, finite float32.

    Args:
      model: Whose.
      level: "history", "target" or "request".
      columns: By name; others than the model reads are left out.
      size: Values that each must have; None is that of the first.

    Raises:
      UserError: a feature is missing, of another length or kind, or a value is out of range; names
        feature and value.
    """
    checked = {}
    for name in model.info.levels[level].names:
        if name not in columns:
            raise UserError(f"{level} lacks {name!r}; it has {', '.join(columns) or 'nothing'}")
        values = as_array(name, columns[name])
        size = len(values) if size is None and values.ndim else size
        if values.shape != (size,):
            raise UserError(f"{level} {name!r} has shape {values.shape}, expected ({size},)")
        if values.size and values.dtype.kind not in "biuf":
            raise UserError(f"{level} {name!r} has values like {values.tolist()[0]!r}, not numbers")
        vocabulary = model.info.schema.vocabularies.get(name)
        if vocabulary is None:
            bad, rule = ~np.isfinite(values.astype(np.float32)), "must be finite float32"
        else:
            bad = ~((values >= 0) & (values < vocabulary) & (values == np.floor(values)))
            rule = f"must be whole numbers from 0 to {vocabulary - 1}"
        if bad.any():
            raise UserError(f"{level} {name!r} has {values[bad][0]}; its values {rule}")
        checked[name] = values.astype(np.float32 if vocabulary is None else np.int32)
    return checked
