"""KuaiRand: what users of a short-video app were shown, and did, by Kuaishou and USTC."""

from __future__ import annotations

import dataclasses
import pathlib

import tensorflow_datasets as tfds

from stca_jax.data.interaction_log.interaction_log_dataset_builder import LogDatasetBuilder
from stca_jax.data.interaction_log.log_config import LogConfig

_STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_RANDOM = "log_random_4_22_to_5_08"
_TIME_ZONE = "Asia/Shanghai"
# Impressions of the random log have no label, and so are history only.
_TASK = "{}=CASE WHEN is_rand = '0' THEN {} END"


@dataclasses.dataclass
class Size(tfds.core.BuilderConfig):
    """One of the published sizes.

    Attributes:
      folder: What its archive unpacks to.
      parts: How many files each standard log is split into.
      suffix: Of its files' names.
      unirank: Whether targets, tasks, features and splits are those of the benchmark UniRank.
    """

    folder: str = ""
    parts: int = 1
    suffix: str = ""
    unirank: bool = False


class Builder(LogDatasetBuilder):
    """See README.md."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.0.0": "First version.",
        "2.0.0": "Hours and weekdays of Beijing.",
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download KuaiRand-1K.tar.gz, KuaiRand-27K.tar.gz or KuaiRand-Pure.tar.gz from "
        "https://zenodo.org/records/10439422 and unpack it in the folder."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        Size(
            name=name, folder=folder, parts=parts, suffix=suffix, description=text, unirank=unirank
        )
        for name, folder, parts, suffix, text, unirank in (
            ("1k", "KuaiRand-1K/data", 1, "1k", "1,000 users, all they saw.", False),
            ("27k", "KuaiRand-27K/data", 2, "27k", "27,285 users.", False),
            ("pure", "KuaiRand-Pure/data", 1, "pure", "7,583 videos only.", False),
            ("unirank", "KuaiRand-27K/data", 2, "27k", "27k by UniRank's protocol.", True),
            ("unirank_1k", "KuaiRand-1K/data", 1, "1k", "1k by UniRank's protocol.", True),
        )
    ]

    def log_config(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """Whether a video is clicked, viewed long, and liked."""
        size = self.builder_config
        assert isinstance(size, Size)
        suffixes = [f"_part{k + 1}" for k in range(size.parts)] if size.parts > 1 else [""]
        logs = [f"{log}_{size.suffix}{suffix}.csv" for log in _STANDARD for suffix in suffixes]
        logs.append(f"{_RANDOM}_{size.suffix}.csv")
        tables = [f"video_features_basic_{size.suffix}.csv", f"user_features_{size.suffix}.csv"]
        *found, videos, users = self.find_files(manual_dir, size.folder, [*logs, *tables])
        if size.unirank:
            return _unirank(tuple(found), videos, users)
        return LogConfig(
            log=tuple(found),
            user_id="user_id",
            item_id="video_id",
            timestamp="time_ms",
            time_unit="ms",
            labels=(
                _TASK.format("click", "is_click"),
                _TASK.format("long_view", "long_view"),
                _TASK.format("like", "is_like"),
            ),
            target_features=("tab",),
            history_features=(
                "watched=least(play_time_ms::DOUBLE / greatest(duration_ms::DOUBLE, 1), 5)",
            ),
            items=(videos,),
            item_features=(
                "author=author_id",
                "video_type",
                "music=music_id",
                "tag=split_part(tag, ',', 1)",
                "duration=video_duration:numeric",
            ),
            users=(users,),
            user_features=(
                "user_active_degree",
                "is_live_streamer",
                "is_video_author",
                "follow_user_num_range",
                "fans_user_num_range",
                "friend_user_num_range",
                "register_days_range",
            ),
            time_zone=_TIME_ZONE,
            # The first log is for training, as its authors propose.
            validation_start="2022-04-22",
            test_start="2022-04-25",
        )


def _unirank(log: tuple[str, ...], videos: str, users: str) -> LogConfig:
    """Every impression, random ones too, is a target of six tasks; 25, 3 and 3 days of 31.

    UniRank (arXiv 2607.19987) describes a split of each user's targets; its preprocessing of
    KuaiRand splits by date, in Beijing, and its logs count as many targets as that gives.
    """
    return LogConfig(
        log=log,
        user_id="user_id",
        item_id="video_id",
        timestamp="time_ms",
        time_unit="ms",
        labels=("is_click", "is_follow", "is_like", "is_comment", "is_forward", "long_view"),
        target_features=("tab",),
        items=(videos,),
        item_features=(
            "video_type",
            "tag=split_part(tag, ',', 1)",
            "music_type",
            f"duration={_buckets('video_duration', 0, 3_000, 7_000, 15_000, 30_000, 60_000)}"
            ":categorical",
        ),
        users=(users,),
        user_features=(
            "user_active_degree",
            "is_lowactive_period",
            "is_live_streamer",
            "is_video_author",
            "follow_user_num_range",
            "fans_user_num_range",
            "friend_user_num_range",
            "register_days_range",
            *(f"onehot_feat{k}" for k in range(18)),
        ),
        time_zone=_TIME_ZONE,
        validation_start="2022-05-03",
        test_start="2022-05-06",
        min_count=1,
    )


def _buckets(column: str, *bounds: int) -> str:
    """SQL of how many bounds a number exceeds; a missing one counts as 0."""
    number = f"coalesce(try_cast({column} AS DOUBLE), 0)"
    return " + ".join(f"({number} > {bound})::INTEGER" for bound in bounds)
