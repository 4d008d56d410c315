"""A log of interactions of one's own, as requests with histories."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import tensorflow_datasets as tfds

from stca_jax.data.base import STAGING, UserData, UserDatasetBuilder
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.plan import Plan, describe_features
from stca_jax.data.interaction_log.records import build_user_logs
from stca_jax.data.interaction_log.staging import Staging
from stca_jax.errors import UserError
from stca_jax.input.records import UserRecord


class LogDatasetBuilder(UserDatasetBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class of builders of logs: a subclass tells what the columns mean."""

    @abc.abstractmethod
    def log_config(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """What to build from which files.

        Args:
          manual_dir: Folder of files downloaded by hand; None if only names of features matter.

        Raises:
          FileNotFoundError: the folder lacks a file; the message says how to get it.
        """

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Features by level."""
        return self.log_config(None).feature_names

    def find_files(
        self, manual_dir: pathlib.Path | None, folder: str, names: Sequence[str]
    ) -> list[str]:
        """Paths of published files, in `manual_dir` or in a folder of it.

        Args:
          manual_dir: None gives the bare names.
          folder: What the published archive unpacks to.
          names: Of the files.

        Raises:
          FileNotFoundError: a file is missing; says which, and where to get it.
        """
        if manual_dir is None:
            return list(names)
        places = [place for place in (manual_dir / folder, manual_dir) if place.is_dir()]
        for place in places:
            if all((place / name).exists() for name in names):
                return [str(place / name) for name in names]
        place = places[0] if places else manual_dir
        missing = [name for name in names if not (place / name).exists()]
        raise FileNotFoundError(
            f"{place} lacks {', '.join(missing)}. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )

    def describe(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """`log_config` of files that are there.

        Raises:
          FileNotFoundError: they are not; says where to get them.
        """
        if manual_dir is None and self.MANUAL_DOWNLOAD_INSTRUCTIONS:
            config = f"/{self.builder_config.name}" if self.builder_config else ""
            raise FileNotFoundError(
                f"run python -m stca_jax.experiments.prepare --dataset={self.name}{config} "
                f"--manual_dir=FOLDER, a folder of the files. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            )
        return self.log_config(manual_dir)

    def stage(self, manual_dir: pathlib.Path | None) -> Staging:
        """Sorts the log into shards, or goes on with it; the first step of preparing it.

        Raises:
          UserError: the log, or what was said of it, is wrong.
        """
        source = LogSource.open(self.describe(manual_dir))
        return Staging(source, pathlib.Path(self.data_path).parent / STAGING, self.run)

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """Sorts the log and fits vocabularies; records are built shard by shard."""
        staging = self.stage(self.manual_dir(dl_manager))
        plan = staging.plan
        folder = pathlib.Path(self.data_path)
        profile = staging.profile()
        (folder / "profile.txt").write_text(profile + "\n")
        return UserData(
            schema=plan.schema,
            time_origin=plan.time_origin,
            validation_start=plan.validation_start - plan.time_origin,
            test_start=plan.test_start - plan.time_origin,
            num_users=staging.total.num_users,
            shards=[
                functools.partial(_records, staging, plan, index)
                for index in range(len(staging.statistics))
            ],
            features=describe_features(plan, staging.user_ids()),
            notes={
                "log": dataclasses.asdict(staging.source.config),
                "fingerprint": staging.source.fingerprint,
                "rows_left_out": dict(staging.reasons),
            },
            staging=staging.folder / "records",
        )


@dataclasses.dataclass
class OwnLog(tfds.core.BuilderConfig):
    """A log that its user described.

    Attributes:
      log: The description.
    """

    log: LogConfig | None = None


class Builder(LogDatasetBuilder):
    """See README.md."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012

    def log_config(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """What the user said; the files are named there."""
        del manual_dir
        assert isinstance(self.builder_config, OwnLog)
        assert self.builder_config.log is not None
        return self.builder_config.log


def make_builder(name: str, log: LogConfig, data_dir: pathlib.Path) -> Builder:
    """The builder of one's own log, which is "interaction_log/NAME" from then on."""
    config = OwnLog(name=name, description="A log of interactions.", log=log)
    return Builder(data_dir=data_dir, config=config)


def find_builder(name: str, data_dir: pathlib.Path) -> Builder:
    """The builder of a log that has been prepared.

    Raises:
      UserError: there is none of that name.
    """
    folder = data_dir / Builder.name
    found = sorted(f.parent.parent.name for f in folder.glob(f"*/{Builder.VERSION}/metadata.json"))
    if name not in found:
        raise UserError(
            f"no prepared log in {folder} is called {name!r}, but {', '.join(found) or 'none'}: "
            f"run python -m stca_jax.experiments.prepare --dataset={Builder.name} "
            f"--name={name or 'NAME'} "
            "--log=PATH ..."
        )
    metadata = json.loads((folder / name / str(Builder.VERSION) / "metadata.json").read_text())
    return make_builder(name, LogConfig.from_dict(metadata["notes"]["log"]), data_dir)


def check_same(builder: Builder) -> None:
    """Checks that a log prepared under the builder's name is the builder's.

    Raises:
      UserError: it is of other files, or was described differently; lists the differences.
    """
    path = pathlib.Path(builder.data_path) / "metadata.json"
    if not path.exists():
        return
    config = builder.log_config(None)
    notes = json.loads(path.read_text())["notes"]
    if notes["fingerprint"] == LogSource.open(config).fingerprint:
        return
    before, now = vars(LogConfig.from_dict(notes["log"])), vars(config)
    differences = [f"{n}: {before[n]!r} -> {now[n]!r}" for n in now if before[n] != now[n]]
    raise UserError(
        f"{path.parent} was prepared otherwise ({'; '.join(differences) or 'files have changed'}): "
        "choose another --name, or delete the folder"
    )


def _records(staging: Staging, plan: Plan, index: int) -> Iterable[UserRecord]:
    if staging.statistics[index] is None:
        return ()
    return build_user_logs(plan, staging.shard(index), index)
