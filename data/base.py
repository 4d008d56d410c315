"""What all dataset builders share: TFDS builders of one record per user, without TensorFlow."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from stca_jax.input.dataset import USERS, describe_file
from stca_jax.input.records import REQUEST_COLUMNS, UserRecord, encode_record, validate_record
from stca_jax.schema import Schema


@dataclasses.dataclass(frozen=True)
class UserData:
    """What a builder has made of its source.

    Attributes:
      schema: Features and vocabularies, fitted on training events.
      time_origin: Unix seconds of time 0.
      validation_start: Requests before it, in seconds since the origin, are for training.
      test_start: Requests from it on are for testing.
      num_users: How many records there will be, for the progress bar.
      shards: One function for each record file, yielding its users' records in order.
      notes: What else a reader of the metadata should know: rates, counts, rejected rows.
    """

    schema: Schema
    time_origin: int
    validation_start: int
    test_start: int
    num_users: int
    shards: Sequence[Callable[[], Iterable[UserRecord]]]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class UserDatasetBuilder(  # type: ignore[call-arg]
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """Base class of builders: a subclass names its features and implements `user_data`.

    The only TFDS split is "users", one record per user in the builder's own order; train,
    validation and test are a column of the requests.  `metadata.json` holds the schema, the time
    split, and the size and SHA-256 of every record file.
    """

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)

    @property
    @abc.abstractmethod
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Names by level, `{"history": …, "target": …, "request": …, "tasks": …}` of a `Schema`."""

    @abc.abstractmethod
    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """Reads the source and builds every user's log, requests and targets."""

    def schema(self, vocabularies: Mapping[str, int]) -> Schema:
        """The schema of `feature_names` with vocabularies of these sizes."""
        names = self.feature_names
        return Schema(
            history=names["history"],
            target=names["target"],
            request=names["request"],
            tasks=names["tasks"],
            vocabularies=vocabularies,
        )

    @staticmethod
    def manual_dir(dl_manager: tfds.download.DownloadManager) -> pathlib.Path | None:
        """The folder of files downloaded by hand, or None if there is none."""
        try:
            return pathlib.Path(dl_manager.manual_dir)
        except AssertionError:  # TFDS's way to say that it is empty or absent
            return None

    def _info(self) -> tfds.core.DatasetInfo:
        names = self.feature_names

        def matrix(num_rows: int) -> tfds.features.Tensor:
            # Raw bytes read 3 times faster than TFDS's default encoding.
            return tfds.features.Tensor(shape=(num_rows, None), dtype=np.int32, encoding="bytes")

        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "user_id": np.int64,
                    "events": matrix(1 + len(names["history"])),
                    "requests": matrix(REQUEST_COLUMNS + len(names["request"])),
                    "targets": matrix(len(names["target"]) + len(names["tasks"])),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        data = self.user_data(dl_manager)
        self.info.metadata.update(
            schema=data.schema.to_dict(),
            time_origin=data.time_origin,
            validation_start=data.validation_start,
            test_start=data.test_start,
            notes=dict(data.notes),
            record_files={},
        )
        progress = tqdm(
            total=data.num_users, desc=f"Writing {self.name}", unit="user", disable=None
        )

        def examples(
            shard: Callable[[], Iterable[UserRecord]],
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for record in shard():
                validate_record(record, data.schema)
                progress.update()
                yield record.user_id, encode_record(record, data.schema)

        return {USERS: [functools.partial(examples, shard) for shard in data.shards]}

    def _example_writer(self) -> _RecordFileWriter:
        return _RecordFileWriter(self.info)


class _RecordFileWriter(tfds.core.writer.ExampleWriter):
    """Writes a record file and notes its size and hash in the metadata."""

    def __init__(self, info: tfds.core.DatasetInfo):
        super().__init__(info.file_format)
        self._info = info

    def write(self, path: os.PathLike[str], examples: Iterable[tuple[int, bytes]]) -> None:
        """Writes serialized records, one to a group, for random access.

        Uncompressed: histories are read far more often than written, and zstd reads 3 times slower.

        Raises:
          OSError: the disk is full or the file cannot be written.
        """
        file, num_records = os.fspath(path), 0
        with _write_errors(file):
            writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
        for _, example in examples:
            with _write_errors(file):
                writer.write(_deterministic(example))
            num_records += 1
        with _write_errors(file):
            writer.close()
        self._info.metadata["record_files"][os.path.basename(file)] = {
            "records": num_records,
            **describe_file(file),
        }


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
