"""The 84.51° Complete Journey grocery data, as requests with histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data import request_building as rb
from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.data.complete_journey import source
from stca_jax.input.arrays import offsets, run_starts
from stca_jax.input.encoding import Encoder
from stca_jax.input.features import Features, FeatureTable
from stca_jax.input.hashing import counter_hash, uniform

_SEED = 0
_MAX_POSITIVES = 16
_KEPT = 5  # a stream of hashes of its own


@dataclasses.dataclass
class NextPurchase(tfds.core.BuilderConfig):
    """Which products a basket holds, among popularity-sampled ones.

    Attributes:
      negatives_per_positive: Sampled products for each product bought.
    """

    negatives_per_positive: int = 1


@dataclasses.dataclass
class PromotionExposure(tfds.core.BuilderConfig):
    """Which of the products on promotion in the store and week of a visit are bought there.

    Attributes:
      negative_rate: The share of products not bought that is kept.
    """

    negative_rate: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError for a rate outside (0, 1]."""
        if not 0 < self.negative_rate <= 1:
            raise ValueError(f"negative_rate is {self.negative_rate}; it must be in (0, 1]")


class Builder(UserDatasetBuilder):
    """Households' purchases and visits; see README.md."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Run `{source.INSTALL}`, or put its *.parquet files here."
    BUILDER_CONFIGS = [  # noqa: RUF012
        NextPurchase(
            name="next_purchase",
            description="The products of a basket against as many popularity-sampled ones.",
        ),
        PromotionExposure(
            name="promotion_exposure",
            description="The products on promotion in the store and week of a visit: bought or "
            "not. 1 % of those not bought are kept.",
        ),
    ]

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Features by level."""
        promotion = tuple(source.PROMOTIONS) if self._of_promotions else ()
        return {
            "history": (*source.PRODUCT_FEATURES, "quantity"),
            "target": (*source.PRODUCT_FEATURES, "log_popularity", *promotion),
            "request": ("hour", "weekday", *source.HOUSEHOLD_FEATURES),
            "tasks": ("purchase",),
        }

    @property
    def _of_promotions(self) -> bool:
        return isinstance(self.builder_config, PromotionExposure)

    def user_data(self, dl_manager: tfds.download.DownloadManager) -> UserData:
        """Builds all households' records in memory."""
        folder = source.source_folder(self.manual_dir(dl_manager))
        purchases = source.read_purchases(folder)
        products = source.read_products(folder, purchases)
        households = source.read_households(folder, purchases)
        visits = group_visits(purchases)
        encoders: dict[str, Encoder] = {"quantity": source.QUANTITY}
        encoders |= products.vocabularies | households.vocabularies
        if self._of_promotions:
            encoders |= source.PROMOTIONS
            promotions = source.read_promotions(folder, purchases)
            rate = self.builder_config.negative_rate
            targets = promotion_targets(purchases, visits, promotions, rate)
            row = promotions.find(visits.store_week[targets.request], targets.item)
            promotion = {"display": promotions.display[row], "mailer": promotions.mailer[row]}
            notes = {"negative_rate": rate}
        else:
            negatives = self.builder_config.negatives_per_positive
            targets = next_purchase_targets(purchases, visits, negatives)
            promotion = {}
            notes = {"negatives_per_positive": negatives, "max_positives": _MAX_POSITIVES}
        logs = user_logs(purchases, products.table, households.table, visits, targets, promotion)
        sizes = {name: encoder.size for name, encoder in encoders.items()}
        return UserData(
            schema=self.schema(sizes | {"hour": 24, "weekday": 7}),
            time_origin=purchases.origin,
            validation_start=purchases.split_start("validation"),
            test_start=purchases.split_start("test"),
            num_users=len(logs),
            shards=[lambda: logs],
            features=Features(
                encoders=encoders,
                items=products.table,
                users=households.table,
                clock=source.CLOCK,
                definitions=source.DEFINITIONS,
            ),
            notes=notes,
        )


@dataclasses.dataclass(frozen=True)
class Visits:
    """Runs of purchases of one household at one time: each is a request; q visits.

    Attributes:
      user: Index of the household, [q].
      time: Seconds since the origin, [q].
      store_week: Where and in which week, [q].
      split: Index into `records.SPLITS`, [q].
      key: Identifies the visit, whatever else is in the data, [q].
      of_purchase: The visit of each purchase, [n].
    """

    user: np.ndarray
    time: np.ndarray
    store_week: np.ndarray
    split: np.ndarray
    key: np.ndarray
    of_purchase: np.ndarray


def group_visits(purchases: source.Purchases) -> Visits:
    """Groups purchases, which are sorted by household and time."""
    start = run_starts(purchases.user, purchases.time)
    sizes = np.diff(np.append(start, len(purchases.time)))
    user, time = purchases.user[start], purchases.time[start]
    return Visits(
        user=user,
        time=time,
        store_week=purchases.store_week[start],
        split=purchases.split[start],
        key=counter_hash(_SEED, purchases.household_id[user], time),
        of_purchase=np.repeat(np.arange(len(start)), sizes),
    )


def next_purchase_targets(
    purchases: source.Purchases, visits: Visits, negatives_per_positive: int
) -> rb.Targets:
    """A visit's products, and products drawn by their popularity in training weeks."""
    return rb.next_item_targets(
        visits.of_purchase,
        purchases.product,
        request_key=visits.key,
        item_key=purchases.product_id,
        train_count=purchases.train_count,
        max_positives=_MAX_POSITIVES,
        negatives_per_positive=negatives_per_positive,
        seed=_SEED,
    )


def promotion_targets(
    purchases: source.Purchases,
    visits: Visits,
    promotions: source.Promotions,
    negative_rate: float,
) -> rb.Targets:
    """Products on promotion where and when a visit was: all that were bought, some of the others.

    Whether a product that was not bought is kept depends on a hash of visit and product, so that
    about `negative_rate` of them are, in every visit alike.
    """
    num_products = len(purchases.product_id)
    bought = np.unique(visits.of_purchase * num_products + purchases.product)
    visit, product = np.divmod(bought, num_products)
    positive = bought[promotions.find(visits.store_week[visit], product) >= 0]
    kept = [np.empty(0, np.int64)]
    by_place = np.argsort(visits.store_week, kind="stable")
    for group in np.split(by_place, run_starts(visits.store_week[by_place])[1:]):
        product = promotions.products_of(visits.store_week[group[0]])
        drawn = uniform(_SEED, _KEPT, visits.key[group][:, None], purchases.product_id[product])
        row, column = np.nonzero(drawn < negative_rate)
        kept.append(group[row] * num_products + product[column])
    negative = np.setdiff1d(np.concatenate(kept), positive, assume_unique=True)
    return rb.arrange_targets(
        positive, negative, request_key=visits.key, item_key=purchases.product_id, seed=_SEED
    )


def user_logs(
    purchases: source.Purchases,
    products: FeatureTable,
    households: FeatureTable,
    visits: Visits,
    targets: rb.Targets,
    promotion: dict[str, np.ndarray],
) -> rb.UserLogs:
    """Households' purchases as logs, and the visits that have targets as requests."""
    visit = np.unique(targets.request)
    user, time = visits.user[visit], visits.time[visit]
    num_users = len(purchases.household_id)
    bought = products.of(purchases.product)
    return rb.UserLogs(
        user_id=np.arange(num_users),
        event_offset=offsets(purchases.user, num_users),
        event_time=purchases.time,
        history={n: bought[n] for n in source.PRODUCT_FEATURES} | {"quantity": purchases.quantity},
        request_offset=offsets(user, num_users),
        request_id=np.arange(len(visit)),
        request_time=time,
        request_split=visits.split[visit],
        history_end=rb.history_end(purchases.user, purchases.time, user, time),
        request=households.of(user) | source.CLOCK.encode(purchases.origin + time),
        target_offset=offsets(np.searchsorted(visit, targets.request), len(visit)),
        target=products.of(targets.item) | promotion,
        label=targets.label[:, None],
    )
