"""A prepared dataset: random access to users' records, and an index of all their requests."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import resource
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int
from tqdm import tqdm

from stca_jax.errors import UserError
from stca_jax.files import replacing
from stca_jax.input.example import read_example
from stca_jax.input.features import FOLDER, Features
from stca_jax.input.records import REQUEST_COLUMNS, SPLITS, UserRecord, decode_record
from stca_jax.schema import Schema

USERS = "users"  # the one TFDS split of a prepared dataset
_INDEX_FILE = "request_index.npz"


class DatasetError(UserError):
    """A prepared dataset is missing, damaged, or not what it was."""


@dataclasses.dataclass(frozen=True)
class RequestIndex:
    """All requests of a dataset in flat int32 arrays, by user and then by time.

    Attributes:
      record: Index of the user's record.
      position: The request's position within its record.
      request_id: The request's index in the dataset.
      user_id: The user's index in the dataset.
      request_time: Seconds since the dataset's origin.
      split: Index into `records.SPLITS`.
      history_end: Events of the user strictly before the request.
      num_targets: Targets of the request.
    """

    record: Int[np.ndarray, " q"]
    position: Int[np.ndarray, " q"]
    request_id: Int[np.ndarray, " q"]
    user_id: Int[np.ndarray, " q"]
    request_time: Int[np.ndarray, " q"]
    split: Int[np.ndarray, " q"]
    history_end: Int[np.ndarray, " q"]
    num_targets: Int[np.ndarray, " q"]

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.record)

    def select(self, which: np.ndarray) -> RequestIndex:
        """The requests that a boolean mask, or an array of positions, picks."""
        return RequestIndex(**{n: v[which] for n, v in vars(self).items()})

    @property
    def training_end(self) -> int:
        """Time of the first request that is not of training; of none, later than all."""
        others = self.request_time[self.split != SPLITS.index("train")]
        return int(others.min()) if others.size else np.iinfo(np.int32).max

    def of_split(self, split: str) -> RequestIndex:
        """The requests of "train", "validation" or "test".

        Raises:
          ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
        return self.select(self.split == SPLITS.index(split))


class RequestDataset:
    """Random access to the users' records of a prepared dataset.

    Safe to read from many threads, and to pickle into worker processes (files reopen there).

    Attributes:
      directory: Where the dataset lies.
      metadata: The builder's `metadata.json`: time origin and split, notes, record files.
      schema: The dataset's features and vocabularies.
      index: All requests.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a dataset; the first time, reads all of it once to check and index it.

        Args:
          directory: A prepared dataset, as `data.prepare` returns it.

        Raises:
          DatasetError: the folder is no prepared dataset, or a record file is missing, truncated,
            damaged or changed; the message names it.
        """
        self.directory = pathlib.Path(directory)
        self.metadata = _read_metadata(self.directory)
        self.schema = Schema.from_dict(self.metadata["schema"])
        self._files = [
            _RecordFile(self.directory / name, **values)
            for name, values in sorted(self.metadata["record_files"].items())
        ]
        for file in self._files:
            file.check_size()
        self._record_ends = np.cumsum([f.records for f in self._files])
        self._readers = _Readers()
        self.index = self._load_index()

    def __len__(self) -> int:
        """The number of users."""
        return int(self._record_ends[-1])

    def record(self, i: int) -> UserRecord:
        """Reads the i-th user's record; its columns are read-only views of the bytes read.

        Raises:
          IndexError: there is no i-th user.
          DatasetError: the record file is damaged; the message names it.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"no user {i}; the dataset has {len(self)}")
        k = int(np.searchsorted(self._record_ends, i, side="right"))
        file, end = self._files[k], int(self._record_ends[k])
        try:
            example = self._readers.read(file.path, i - end + file.records)
            columns = _matrices(read_example(example), self.schema)
        except (RuntimeError, ValueError) as error:
            raise file.unreadable(str(error)) from error
        return decode_record(columns, self.schema)

    @functools.cached_property
    def features(self) -> Features:
        """How raw values become what the records hold.

        Raises:
          UserError: a file of it is missing or damaged.
        """
        return Features.read(self.directory / FOLDER)

    @property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each record file by name: equal for equal data, wherever it lies."""
        return {f.path.name: f.sha256 for f in self._files}

    def check_fingerprint(self, expected: Mapping[str, str]) -> None:
        """Checks that the data are what a checkpoint was trained on.

        Args:
          expected: An earlier `fingerprint`.

        Raises:
          DatasetError: a record file differs, is new or is gone; the message names the first.
        """
        found = self.fingerprint
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise DatasetError(
                    f"record file {self.directory / name} is not the one this run began with; "
                    "restore the earlier data, or start a new run"
                )

    def _load_index(self) -> RequestIndex:
        """The cached index if the record files have not been touched since, or a new one."""
        path = self.directory / _INDEX_FILE
        stamp = json.dumps([f.stamp() for f in self._files])
        if (cached := _read_index(path, stamp)) is not None:
            return cached
        for file in self._files:
            file.check_digest()
        index = self._build_index()
        # A folder that cannot be written is read anew each time.
        with contextlib.suppress(OSError), replacing(path) as output:
            np.savez(output, stamp=np.array(stamp), **vars(index))
        return index

    def _build_index(self) -> RequestIndex:
        columns: dict[str, list[np.ndarray]] = {f.name: [] for f in _INDEX_FIELDS}
        for i in tqdm(range(len(self)), desc="Indexing requests", unit="user", disable=None):
            record = self.record(i)
            size = len(record.request_time)
            for name, value in {
                "record": np.full(size, i),
                "position": np.arange(size),
                "request_id": record.request_id,
                "user_id": np.full(size, record.user_id),
                "request_time": record.request_time,
                "split": record.request_split,
                "history_end": record.history_end,
                "num_targets": np.diff(record.target_offset),
            }.items():
                columns[name].append(value.astype(np.int32))
        return RequestIndex(**{n: np.concatenate(v) for n, v in columns.items()})


_INDEX_FIELDS = dataclasses.fields(RequestIndex)


class _Readers:
    """Readers of the record files read last; can be sent to other processes, without them.

    As many as a quarter of the files that a process may have open, and fewer where it has others
    open: other files are opened again when they are read again.  A reader closes its file when
    nothing holds it.
    """

    def __init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        several = None if limit == resource.RLIM_INFINITY else max(1, limit // 4)
        self._kept = functools.lru_cache(several)(_open_record_file)

    def read(self, path: pathlib.Path, i: int) -> bytes:
        """The i-th record of a file.

        Raises:
          RuntimeError, ValueError: the file cannot be opened, or is damaged.
        """
        try:
            return self._kept(path).read([i])[0]
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) not in str(error):
                raise
        self._kept.cache_clear()
        return self._kept(path).read([i])[0]

    def __reduce__(self) -> tuple[type[_Readers], tuple[()]]:
        return _Readers, ()


def _open_record_file(path: pathlib.Path) -> array_record_module.ArrayRecordReader:
    return array_record_module.ArrayRecordReader(
        os.fspath(path), options="readahead_buffer_size:0", file_reader_buffer_size=32_768
    )


@dataclasses.dataclass(frozen=True)
class _RecordFile:
    """A record file, as it was when the dataset was prepared."""

    path: pathlib.Path
    records: int
    bytes: int
    sha256: str

    def check_size(self) -> None:
        """Raises DatasetError if the file is missing or has another size."""
        if not self.path.exists():
            raise DatasetError(f"record file {self.path} is missing: prepare the dataset again")
        if (found := self.path.stat().st_size) != self.bytes:
            raise self.damaged(f"it has {found} bytes, not {self.bytes}")

    def check_digest(self) -> None:
        """Raises DatasetError if the file's content has changed."""
        if describe_file(self.path)["sha256"] != self.sha256:
            raise self.damaged("its content is not what was prepared")

    def stamp(self) -> tuple[str, str, int]:
        """Changes when the dataset is prepared anew or the file is touched; cheap to compute."""
        return self.path.name, self.sha256, self.path.stat().st_mtime_ns

    def unreadable(self, reason: str) -> DatasetError:
        """The error to raise if a record cannot be read."""
        if os.strerror(errno.EMFILE) in reason:
            return DatasetError(
                f"record file {self.path} cannot be opened ({reason}): allow this process more "
                "open files, such as by ulimit -n 65536"
            )
        return self.damaged(reason)

    def damaged(self, reason: str) -> DatasetError:
        """The error to raise if a file is not what it was."""
        return DatasetError(
            f"record file {self.path} is damaged, truncated or changed ({reason}): delete "
            f"{self.path.parent} and prepare the dataset again"
        )


def describe_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}


def _read_index(path: pathlib.Path, stamp: str) -> RequestIndex | None:
    """The index in an .npz file, or None if it is absent, damaged or of other record files."""
    try:
        with np.load(path) as arrays:
            if arrays["stamp"].item() != stamp:
                return None
            return RequestIndex(**{f.name: arrays[f.name] for f in _INDEX_FIELDS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_metadata(directory: pathlib.Path) -> dict[str, Any]:
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
    except OSError as error:
        raise DatasetError(
            f"{directory} holds no prepared dataset ({error.strerror}: metadata.json); "
            "data.prepare(name, data_dir) makes one"
        ) from None
    except ValueError as error:
        raise DatasetError(f"{directory / 'metadata.json'} is damaged: {error}") from error
    return metadata


def _matrices(example: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """The argument of `decode_record`: views of the bytes, shaped by the number of columns."""
    rows = {
        "events": 1 + len(schema.history),
        "requests": REQUEST_COLUMNS + len(schema.request),
        "targets": len(schema.target) + len(schema.tasks),
    }
    matrices = {
        n: np.frombuffer(example[n], np.int32).reshape(size, -1) for n, size in rows.items()
    }
    return {"user_id": example["user_id"], **matrices}
