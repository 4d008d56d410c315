"""Generated users with a known function of their whole history behind the labels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.data.synthetic_interests.catalogue import make_catalogue
from stca_jax.data.synthetic_interests.generator import (
    CONFIGS,
    GeneratorConfig,
    generate_users,
)
from stca_jax.data.synthetic_interests.latent import (
    LATENT_CONFIGS,
    LatentConfig,
    generate_latent_users,
    make_latent_catalogue,
)
from stca_jax.data.synthetic_interests.users import feature_names, make_schema
from stca_jax.input.features import Features, FeatureTable


@dataclasses.dataclass
class SyntheticInterestsConfig(tfds.core.BuilderConfig):
    """A size of the dataset.

    Attributes:
      generator: How many users, how long their logs are, and the seed.
    """

    generator: GeneratorConfig | LatentConfig = CONFIGS["default"]


class Builder(UserDatasetBuilder):
    """Users with drifting interests; see README.md."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.0.0": "First version.",
        "1.1.0": "Requests have the number of the user's earlier events, but for `tiny`; sessions "
        "of `latent` have one interest of each scale, and 5,000 users meet 1,024 items.",
    }
    BUILDER_CONFIGS = [  # noqa: RUF012
        SyntheticInterestsConfig(
            name=name,
            description=f"{config.num_users} users of up to {config.max_events:,} events.",
            generator=config,
            version=None if config.counts_events else "1.0.0",
        )
        for name, config in (CONFIGS | LATENT_CONFIGS).items()
    ]

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Features by level."""
        return feature_names(self.builder_config.generator)

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """Generates the users while they are written; nothing is downloaded."""
        config = self.builder_config.generator
        if isinstance(config, LatentConfig):
            kind = "latent"
            category = make_latent_catalogue(config).category
            shard = functools.partial(generate_latent_users, config)
        else:
            kind = "generator"
            category = make_catalogue(config).category_of_item
            shard = functools.partial(generate_users, config)
        return UserData(
            schema=make_schema(config),
            time_origin=0,
            validation_start=config.validation_start,
            test_start=config.test_start,
            num_users=config.num_users,
            shards=[shard],
            features=Features(
                encoders={},
                items=FeatureTable(
                    np.arange(len(category)),
                    {"item": np.arange(len(category), dtype=np.int32), "category": category},
                    {"item": 0, "category": 0},  # there are no others
                ),
                users=FeatureTable(np.arange(config.num_users), {}, {}),
                user_windows=config.user_windows,
            ),
            notes={kind: dataclasses.asdict(config)},
        )
