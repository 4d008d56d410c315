"""Yambda: listens and likes in a music service, by Yandex."""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds

from stca_jax.data.interaction_log.interaction_log_dataset_builder import LogDatasetBuilder
from stca_jax.data.interaction_log.log_config import LogConfig

# Seconds, more than nearly every track has: playing on does not end a session.  With a request for
# each listen, 5b would have more than the 2^31 that records can number.
_SESSION_GAP = 600
_DLRM = "dlrm_v4_"  # the task of MLPerf's DLRMv4: every listen, after all events before it


class Builder(LogDatasetBuilder):
    """See README.md."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "From https://huggingface.co/datasets/yandex/yambda download flat/SIZE/multi_event.parquet "
        "(SIZE is 50m, 500m or 5b) and artist_item_mapping.parquet, and keep these paths."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        *(
            tfds.core.BuilderConfig(name=size, description=f"About {size} events.")
            for size in ("50m", "500m", "5b")
        ),
        *(
            tfds.core.BuilderConfig(
                name=f"{_DLRM}{size}", description=f"{size}, each listen a request of its own."
            )
            for size in ("50m", "500m")
        ),
    ]

    def log_config(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """Whether at least half of a track is listened to."""
        assert self.builder_config is not None
        name = self.builder_config.name
        size = name.removeprefix(_DLRM)
        events, artists = self.find_files(
            manual_dir,
            "yambda",
            (f"flat/{size}/multi_event.parquet", "artist_item_mapping.parquet"),
        )
        return LogConfig(
            log=(events,),
            user_id="uid",
            item_id="item_id",
            timestamp="timestamp",
            time_unit="s",
            session_gap=0 if name.startswith(_DLRM) else _SESSION_GAP,
            # Likes and dislikes have no label, and so are history only.
            labels=("listen=CASE WHEN event_type = 'listen' THEN played_ratio_pct >= 50 END",),
            target_features=("is_organic", "track_length_seconds:numeric"),
            history_features=("event_type", "played_ratio_pct:numeric"),
            items=(artists,),
            item_features=("artist=artist_id",),
            allow_odd=0.5,  # a track has a row for each of its artists, of whom the first is read
            # The last of the 26,000,000 seconds' days is the authors' test, the day before theirs
            # for validation; a number of seconds reads as that time after 1970-01-01.
            validation_start="1970-10-26 22:13",
            test_start="1970-10-27 22:13",
        )
