"""MovieLens: ratings of movies, by GroupLens."""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds

from stca_jax.data.interaction_log.interaction_log_dataset_builder import LogDatasetBuilder
from stca_jax.data.interaction_log.log_config import LogConfig


class Builder(LogDatasetBuilder):
    """See README.md."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download ml-20m.zip, ml-25m.zip or ml-32m.zip from "
        "https://grouplens.org/datasets/movielens and unpack it in the folder."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=size, description=f"{size[:-1]} million ratings.")
        for size in ("20m", "25m", "32m")
    ]

    def log_config(self, manual_dir: pathlib.Path | None) -> LogConfig:
        """Whether a movie is rated 4 stars or more."""
        assert self.builder_config is not None
        folder = f"ml-{self.builder_config.name}"
        ratings, movies = self.find_files(manual_dir, folder, ("ratings.csv", "movies.csv"))
        return LogConfig(
            log=(ratings,),
            user_id="userId",
            item_id="movieId",
            timestamp="timestamp",
            time_unit="s",
            labels=("like=rating::DOUBLE >= 4",),
            history_features=("rating",),
            items=(movies,),
            item_features=(
                "genre=split_part(genres, '|', 1)",
                "genres",
                r"year=regexp_extract(title, '\((\d{4})\)\s*$', 1)",
            ),
        )
