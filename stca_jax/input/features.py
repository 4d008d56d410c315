"""The folder `features/` of a prepared dataset: all that turns raw values into what a model reads.

    features/
      features.json      of each feature: where it comes from, how it is encoded; time, trends
      vocabularies.npz   the values that have ids of their own, of each vocabulary
      items.npz          every item's own id, and its features as encoded
      trends.npz         the latest events of each item or field, for counts in windows
      users.npz          every user's own id, and their features as encoded; users of records first

NumPy and the standard library read it, and nothing in it is pickled.  Texts are UTF-8 bytes, one
after the other, and where each begins.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from stca_jax.errors import UserError
from stca_jax.files import replacing, write_json
from stca_jax.input.encoding import (
    Buckets,
    Clock,
    Encoder,
    Ids,
    Scale,
    Vocabulary,
    as_integer,
    as_text,
    is_missing,
)
from stca_jax.input.feature_arrays import pack, pack_trends, unpack, unpack_trends
from stca_jax.input.hashing import text_hash
from stca_jax.input.trends import Trends
from stca_jax.schema import Schema

FOLDER = "features"
_FORMAT = 2  # of the files
_READ = (1, 2)  # before 2, trends had a number for each event where they have one for each second
_JSON = "features.json"
_VOCABULARIES = "vocabularies.npz"
_TABLES = ("items", "users")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTable:
    """What is known of items or users beforehand, as encoded.

    Attributes:
      ids: Their own ids, each once: int64, or text.
      columns: Features by name, one entry for each id.
      absent: The features of an id that is not here, by name.
    """

    ids: np.ndarray
    columns: Mapping[str, np.ndarray]
    absent: Mapping[str, int | float]

    def __len__(self) -> int:
        """The number of ids."""
        return len(self.ids)

    @property
    def is_text(self) -> bool:
        """Whether ids are text, or else integers."""
        return self.ids.dtype.kind != "i"

    def rows(self, ids: Sequence[Any] | np.ndarray) -> Int[np.ndarray, " n"]:
        """Where each id stands; -1 for one that is not here."""
        wanted = [_as_id(v, self.is_text) for v in np.asarray(ids, object).tolist()]
        if not len(self):
            return np.full(len(wanted), -1)
        keys = text_hash(wanted) if self.is_text else np.array(wanted, np.int64)
        sorted_keys, order = self._index
        place = np.searchsorted(sorted_keys, keys).clip(max=len(self) - 1)
        row = order[place]
        same = self.ids[row] == np.array(wanted, object if self.is_text else np.int64)
        return np.where(same, row, -1)

    def of(self, rows: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """The features of some rows, by name; -1 stands for an id that is not here."""
        found = {}
        for name, column in self.columns.items():
            padded = np.append(column, np.array([self.absent[name]], column.dtype))
            found[name] = padded[rows]
        return found

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        keys = text_hash(self.ids.tolist()) if self.is_text else self.ids
        order = np.argsort(keys, kind="stable")
        return keys[order], order


def empty_table() -> FeatureTable:
    """A table of nothing, for a dataset that has none."""
    return FeatureTable(np.empty(0, np.int64), {}, {})


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """How raw values become what a dataset's records hold.

    Attributes:
      encoders: Of each feature, by name.
      items: Every item, with the target's features that it alone decides.
      users: Every user, with the request's features that they alone decide; user u of the records
        is row u.
      trends: Features of targets as of a request, with the events at the end of the log.
      user_windows: Features of requests that count the user's events before them: seconds by name.
      clock: Of the request's features "hour" and "weekday".
      null_words: Texts that stand for a missing value.
      definitions: What people should know of a feature, by name: "from" and, of a column, "column"
        or "sql".
      facts: Of the dataset: time origin, label delay, and what else serving needs.
    """

    encoders: Mapping[str, Encoder]
    items: FeatureTable = dataclasses.field(default_factory=empty_table)
    users: FeatureTable = dataclasses.field(default_factory=empty_table)
    trends: Trends | None = None
    user_windows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    clock: Clock = dataclasses.field(default_factory=Clock)
    null_words: tuple[str, ...] = ()
    definitions: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def completed(self, schema: Schema, facts: Mapping[str, Any]) -> Features:
        """With features that no one described taken as they are, and facts beside the others.

        Raises:
          ValueError: an encoder has another number of ids than the schema.
        """
        encoders = dict(self.encoders)
        for name in dict.fromkeys((*schema.history, *schema.target, *schema.request)):
            size = schema.vocabularies.get(name, 0)
            encoder = encoders.setdefault(name, Ids(size) if size else Scale())
            if encoder.size != size:
                raise ValueError(f"{name} has {size} ids in the schema, {encoder.size} as encoded")
        return dataclasses.replace(
            self, encoders=encoders, facts={"schema": schema.to_dict(), **facts, **self.facts}
        )

    def encode(self, name: str, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """int32 ids or float32 numbers of a feature's raw values, exactly as in training.

        Args:
          name: Of the feature.
          values: As the log had them; None is missing.

        Raises:
          UserError: there is no such feature, or a value is nothing of its kind; names both.
        """
        if name not in self.encoders:
            raise UserError(f"there is no feature {name!r}, but {', '.join(self.encoders)}")
        if self.null_words and not (isinstance(values, np.ndarray) and values.dtype.kind in "biuf"):
            values = [None if isinstance(v, str) and v in self.null_words else v for v in values]
        try:
            return self.encoders[name].encode(values)
        except UserError as error:
            raise UserError(f"feature {name!r}: {error}") from error

    def item_features(self, ids: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
        """Features of items by their own ids, known or not: those of `items.columns`."""
        row = self.items.rows(ids)
        new = row < 0
        hashed = self.encode("item", np.asarray(ids, object)[new].tolist())
        found = self.items.of(row)
        found["item"][new] = hashed
        return found

    def trend_features(
        self, ids: Sequence[Any] | np.ndarray, time: Int[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        """Features of `trends` of items by their own ids, as of Unix seconds; none without trends.

        Exact for requests after the end of the log, as of its events.
        """
        if self.trends is None:
            return {}
        row = self.items.rows(ids)
        items = self.item_features(ids)
        values = {n: row if n == "item" else items[n] for n in self.trends.fields}
        return self.trends.encode(values, np.asarray(time, np.int64))

    def user_features(self, ids: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
        """Features of users by their own ids, known or not: those of `users.columns`."""
        return self.users.of(self.users.rows(ids))

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files; features.json, which has the hashes of the others, is the last one."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        encoders, arrays = {}, dict[str, np.ndarray]()
        for name, encoder in self.encoders.items():
            described = {"kind": encoder.kind, "size": encoder.size}
            if isinstance(encoder, Vocabulary):
                arrays |= pack(name, encoder.known)
                described |= {
                    "is_text": encoder.is_text,
                    "num_oov": encoder.num_oov,
                    "missing": encoder.missing,
                    "missing_id": encoder.missing_id,
                }
            else:
                described |= dataclasses.asdict(encoder)
            encoders[name] = described
        tables = {"vocabularies": arrays, "trends": pack_trends(self.trends)}
        for what in _TABLES:
            table: FeatureTable = getattr(self, what)
            columns = {f"column:{name}": column for name, column in table.columns.items()}
            tables[what] = pack("id", table.ids) | columns
        for name, contents in tables.items():
            with replacing(folder / f"{name}.npz") as file:
                np.savez(file, **contents)  # type: ignore[arg-type]
        described_tables = {
            what: {
                "rows": len(getattr(self, what)),
                "is_text": getattr(self, what).is_text,
                "absent": dict(getattr(self, what).absent),
            }
            for what in _TABLES
        }
        write_json(
            folder / _JSON,
            {
                "format": _FORMAT,
                "features": {
                    name: {**self.definitions.get(name, {}), "encoder": described}
                    for name, described in encoders.items()
                },
                "time_zone": self.clock.zone,
                "null_words": list(self.null_words),
                "trends": self.trends
                and {
                    "windows": dict(self.trends.windows),
                    "tasks": self.trends.tasks,
                    "label_delay": self.trends.label_delay,
                    "fields": list(self.trends.fields),
                },
                "user_windows": dict(self.user_windows),
                "facts": dict(self.facts),
                "tables": described_tables,
                "sha256": {f"{name}.npz": _digest(folder / f"{name}.npz") for name in tables},
            },
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Features:
        """Reads what `write` wrote.

        Args:
          folder: "features" in the folder of a prepared dataset, or a copy of it.

        Raises:
          UserError: a file is missing, damaged, or of another version; names it.
        """
        folder = pathlib.Path(folder)
        values = _read_json(folder / _JSON)
        for name, digest in values["sha256"].items():
            path = folder / name
            if not path.exists() or _digest(path) != digest:
                raise UserError(f"{path} is missing or damaged: prepare the dataset again")
        with _open(folder / _VOCABULARIES) as known:
            encoders = {
                name: _encoder(name, feature["encoder"], known)
                for name, feature in values["features"].items()
            }
        definitions = {
            name: {n: v for n, v in feature.items() if n != "encoder"}
            for name, feature in values["features"].items()
        }
        tables = {}
        for what in _TABLES:
            described = values["tables"][what]
            with _open(folder / f"{what}.npz") as arrays:
                columns = {
                    n.removeprefix("column:"): arrays[n] for n in arrays if n.startswith("column:")
                }
                ids = unpack("id", arrays, described["is_text"], object)
            tables[what] = FeatureTable(ids, columns, described["absent"])
        with _open(folder / "trends.npz") as arrays:
            trends = values["trends"] and unpack_trends(values["trends"], arrays)
        return cls(
            encoders=encoders,
            trends=trends,
            user_windows=values.get("user_windows", {}),
            clock=Clock(values["time_zone"]),
            null_words=tuple(values["null_words"]),
            definitions=definitions,
            facts=values["facts"],
            **tables,
        )


def _encoder(name: str, described: Mapping[str, Any], known: Mapping[str, np.ndarray]) -> Encoder:
    values = {n: v for n, v in described.items() if n not in ("kind", "size")}
    match described["kind"]:
        case Vocabulary.kind:
            packed = unpack(name, known, described["is_text"], str)
            return Vocabulary(packed, described["num_oov"], described["missing"])
        case Ids.kind:
            return Ids(described["size"])
        case Buckets.kind:
            return Buckets(tuple(values["edges"]))
        case Scale.kind:
            return Scale(**values)
        case other:
            raise UserError(f"feature {name!r} is encoded as {other!r}, which is not known here")


def _open(path: pathlib.Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): prepare the dataset again") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path.parent} holds no features ({error.strerror}: {path.name}): prepare the dataset "
            "again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): prepare the dataset again") from error
    if values.get("format") not in _READ:
        raise UserError(
            f"{path} has format {values.get('format')}, and this version reads "
            f"{' and '.join(map(str, _READ))}: prepare the dataset again"
        )
    return values


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_id(value: Any, is_text: bool) -> Any:
    """An id of the table's type.

    Raises:
      UserError: it is missing, or of another type.
    """
    if is_missing(value):
        raise UserError("an id is missing; give a text or an integer")
    if is_text:
        return as_text(value)
    return as_integer(value)
