"""Writes users' records into files, each whole before its description says so."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from stca_jax.files import write_json
from stca_jax.input.dataset import describe_file
from stca_jax.input.records import UserRecord, encode_record, validate_record
from stca_jax.schema import Schema


@dataclasses.dataclass(frozen=True)
class RecordFiles:
    """The record files of a dataset that is being prepared; can be sent to workers.

    Attributes:
      folder: Where they lie: 00000.array_record, and 00000.json once it is whole.
      shards: One function for each file, yielding its users' records in order.
      schema: Of the records.
      features: The same for TFDS.
      num_users: Of all files, for the progress bar.
    """

    folder: pathlib.Path
    shards: tuple[Callable[[], Iterable[UserRecord]], ...]
    schema: Schema
    features: tfds.features.FeaturesDict
    num_users: int

    def path(self, index: int) -> pathlib.Path:
        """Of the file."""
        return self.folder / f"{index:05d}.array_record"

    def description(self, index: int) -> dict[str, Any]:
        """Records, bytes and SHA-256 of a whole file."""
        return json.loads(self.path(index).with_suffix(".json").read_text())

    def write(self, index: int) -> None:
        """Writes a file, unless an earlier attempt finished it.

        Raises:
          OSError: the disk is full or the file cannot be written.
        """
        path, done = self.path(index), self.path(index).with_suffix(".json")
        # Where there are no hard links, an attempt that was killed at the end has moved the file.
        if not (done.exists() and path.exists()):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                records = _write_records(os.fspath(path), self._examples(index))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            write_json(done, {"records": records, **describe_file(path)})

    def _examples(self, index: int) -> Iterator[bytes]:
        serializer = tfds.core.example_serializer.ExampleSerializer(
            self.features.get_serialized_info()
        )
        several = len(self.shards) > 1
        for record in tqdm(
            self.shards[index](),
            desc=f"Writing file {index + 1} of {len(self.shards)}" if several else "Writing",
            total=None if several else self.num_users,
            unit="user",
            leave=not several,
            disable=None,
        ):
            validate_record(record, self.schema)
            encoded = self.features.encode_example(encode_record(record, self.schema))
            yield serializer.serialize_example(encoded)


def _write_records(file: str, examples: Iterable[bytes]) -> int:
    """Writes serialized records, one to a group, for random access; returns how many.

    Uncompressed: histories are read far more often than written, and zstd reads 3 times slower.
    """
    num_records = 0
    with _write_errors(file):
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
    for example in examples:
        with _write_errors(file):
            writer.write(_deterministic(example))
        num_records += 1
    with _write_errors(file):
        writer.close()
    return num_records


def _deterministic(example: bytes) -> bytes:
    """The same protocol message with its map in key order, so that equal data give equal files."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


@contextlib.contextmanager
def _write_errors(file: str) -> Iterator[None]:
    """Turns the RuntimeErrors of ArrayRecord into OSErrors."""
    try:
        yield
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise OSError(errno.EIO, str(error), file) from error
        raise OSError(
            errno.ENOSPC,
            "no space left on the disk for the prepared dataset; free some, or choose another "
            "data_dir. Nothing half-written is kept",
            file,
        ) from error
