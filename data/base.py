"""What all dataset builders share: TFDS builders of one record per user, without TensorFlow."""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from stca_jax.data.record_files import RecordFiles
from stca_jax.data.running import Runner, run_here
from stca_jax.input.dataset import USERS
from stca_jax.input.features import FOLDER, Features
from stca_jax.input.records import REQUEST_COLUMNS, UserRecord
from stca_jax.schema import Schema

STAGING = "staging"  # folder of what a restart goes on from, beside the dataset's versions


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
      features: How raw values became ids and numbers; those not described are taken as they are.
      notes: What else a reader of the metadata should know: rates, counts, rejected rows.
      staging: Where finished record files are kept until all are, so that another attempt after a
        kill goes on from them; for data that take long.  Of this state of the source only.
    """

    schema: Schema
    time_origin: int
    validation_start: int
    test_start: int
    num_users: int
    shards: Sequence[Callable[[], Iterable[UserRecord]]]
    features: Features = dataclasses.field(default_factory=lambda: Features({}))
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    staging: pathlib.Path | None = None


class UserDatasetBuilder(  # type: ignore[call-arg]
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """Base class of builders: a subclass names its features and implements `user_data`.

    The only TFDS split is "users", one record per user in the builder's own order; train,
    validation and test are a column of the requests.  `metadata.json` holds the schema, the time
    split, and the size and SHA-256 of every record file; `features/` what encodes raw values.
    """

    run: Runner = staticmethod(run_here)
    """How to run the steps that can be done side by side."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # TFDS would look for this package below the working directory first, and anyone may have a
        # folder that is called data.
        if file := getattr(sys.modules[cls.__module__], "__file__", None):
            cls.pkg_dir_path = epath.Path(file).parent

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
        except (AssertionError, ValueError):  # TFDS's ways to say that it is empty or not used
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
        features = data.features.completed(
            data.schema,
            {
                "dataset": self.info.full_name,
                "time_origin": data.time_origin,
                "validation_start": data.validation_start,
                "test_start": data.test_start,
            },
        )
        features.write(pathlib.Path(self.data_path) / FOLDER)
        # With trends they can be as large as the log.
        del features
        data = dataclasses.replace(data, features=Features({}))
        files = self._files = RecordFiles(
            folder=data.staging or pathlib.Path(self.data_path) / STAGING,
            shards=tuple(data.shards),
            schema=data.schema,
            features=self.info.features,
            num_users=data.num_users,
        )
        self.run("Writing", files.write, len(data.shards))

        def examples(index: int) -> Iterator[tuple[int, dict[str, Any]]]:
            """Placeholders that TFDS counts; the records are written."""
            return ((i, {}) for i in range(files.description(index)["records"]))

        return {USERS: [functools.partial(examples, i) for i in range(len(data.shards))]}

    def _example_writer(self) -> _RecordFileWriter:
        return _RecordFileWriter(self)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        shutil.rmtree(pathlib.Path(self.data_path) / STAGING, ignore_errors=True)

    def download_and_prepare(self, **kwargs: Any) -> None:
        """As TFDS does, and removes what a restart would have gone on from."""
        super().download_and_prepare(**kwargs)
        shutil.rmtree(pathlib.Path(self.data_path).parent / STAGING, ignore_errors=True)


class _RecordFileWriter(tfds.core.writer.ExampleWriter):
    """Puts written record files where TFDS wants them, and notes size and hash in the metadata."""

    def __init__(self, builder: UserDatasetBuilder):
        super().__init__(builder.info.file_format)
        self._builder = builder

    def write(self, path: os.PathLike[str], examples: Iterable[Any]) -> None:
        """Links the file, or moves it where that fails; `examples` are placeholders."""
        name, files = pathlib.Path(path).name, self._builder._files
        index = int(name.split("-")[-3])  # DATASET-users.array_record-INDEX-of-COUNT
        try:
            os.link(files.path(index), path)
        except OSError:  # exFAT, SMB, Google Drive in Colab
            os.replace(files.path(index), path)
        self._builder.info.metadata["record_files"][name] = files.description(index)
