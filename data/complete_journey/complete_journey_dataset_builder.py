"""The 84.51° Complete Journey grocery data, as requests with histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from stca_jax.data import request_building as rb
from stca_jax.data.base import UserData, UserDatasetBuilder
from stca_jax.data.complete_journey import source
from stca_jax.data.negatives import make_sampler
from stca_jax.data.popularity import auc, count_targets
from stca_jax.input.arrays import offsets, run_starts
from stca_jax.input.encoding import Encoder
from stca_jax.input.features import Features, FeatureTable
from stca_jax.input.hashing import counter_hash, uniform
from stca_jax.input.records import SPLITS
from stca_jax.input.trends import (
    Trends,
    ValueEvents,
    count_seconds,
    parse_window,
    trend_names,
    user_trend,
)

_SEED = 0
_MAX_POSITIVES = 16
_KEPT = 5  # a stream of hashes of its own
_TRENDS: dict[str, Any] = {
    "item_trends": ("1d", "7d", "28d", "91d"),
    "trends_of": ("item", "type"),
    "user_trends": ("7d", "28d"),
}


@dataclasses.dataclass
class JourneyConfig(tfds.core.BuilderConfig):
    """What both tasks can have.

    Attributes:
      item_trends: Windows such as ("7d", "28d"): purchases of the product in that time before the
        visit, and its age.
      trends_of: What to count so: "item", and other features of products.
      user_trends: Windows: purchases of the household in that time before the visit.
    """

    item_trends: tuple[str, ...] = ()
    trends_of: tuple[str, ...] = ("item",)
    user_trends: tuple[str, ...] = ()

    @property
    def trend_names(self) -> tuple[str, ...]:
        """Features of targets."""
        return trend_names(self.trends_of, self.item_trends, ())

    @property
    def user_windows(self) -> dict[str, int]:
        """Seconds, by the name of the request's feature."""
        return {f"user_events_{text}": parse_window(text) for text in self.user_trends}


@dataclasses.dataclass
class NextPurchase(JourneyConfig):
    """Which products a basket holds, among sampled ones.

    Attributes:
      negatives: How products are sampled: by their popularity in a window before the visit, such as
        "7d", by that in "training", or "uniform" over those bought before.
      negatives_per_positive: Sampled products for each product bought.
    """

    negatives: str = "7d"
    negatives_per_positive: int = 1


@dataclasses.dataclass
class PromotionExposure(JourneyConfig):
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

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.0.0": "First version.",
        "2.0.0": "Negatives by popularity before the visit; summer time; the folder features/.",
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Run `{source.INSTALL}`, or put its *.parquet files here."
    BUILDER_CONFIGS = [  # noqa: RUF012
        NextPurchase(
            name="next_purchase",
            description="The products of a basket against as many sampled by popularity of late.",
        ),
        PromotionExposure(
            name="promotion_exposure",
            description="The products on promotion in the store and week of a visit: bought or "
            "not. 1 % of those not bought are kept.",
        ),
        NextPurchase(
            name="next_purchase_trends", description="next_purchase, with trends.", **_TRENDS
        ),
        PromotionExposure(
            name="promotion_exposure_trends",
            description="promotion_exposure, with trends.",
            **_TRENDS,
        ),
    ]

    @property
    def feature_names(self) -> Mapping[str, tuple[str, ...]]:
        """Features by level."""
        promotion = tuple(source.PROMOTIONS) if self._of_promotions else ()
        config = self._config
        return {
            "history": (*source.PRODUCT_FEATURES, "quantity"),
            "target": (*source.PRODUCT_FEATURES, "log_popularity", *promotion, *config.trend_names),
            "request": ("hour", "weekday", *source.HOUSEHOLD_FEATURES, *config.user_windows),
            "tasks": ("purchase",),
        }

    @property
    def _config(self) -> JourneyConfig:
        assert isinstance(self.builder_config, JourneyConfig)
        return self.builder_config

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
            config = self.builder_config
            targets = next_purchase_targets(purchases, visits, config)
            promotion = {}
            notes = {
                "negatives": config.negatives,
                "negatives_per_positive": config.negatives_per_positive,
                "max_positives": _MAX_POSITIVES,
            }
        notes["auc_of_popularity_alone"] = popularity_auc(purchases, visits, targets)
        trends = purchase_trends(purchases, products.table, self._config)
        if trends is not None:
            values = _trend_values(trends, products.table, targets.item)
            promotion |= trends.encode(values, purchases.origin + visits.time[targets.request])
        logs = user_logs(purchases, products.table, households.table, visits, targets, promotion)
        request = household_trends(purchases, logs, self._config)
        logs = dataclasses.replace(logs, request={**logs.request, **request})
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
                trends=trends and trends.tail(_trend_sizes(trends, products)),
                user_windows=self._config.user_windows,
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
    purchases: source.Purchases, visits: Visits, config: NextPurchase
) -> rb.Targets:
    """A visit's products, and products that are drawn."""
    time, product = source.by_time(purchases)
    sampler = make_sampler(
        config.negatives, purchases.train_count, time, product, purchases.origin + visits.time
    )
    return rb.next_item_targets(
        visits.of_purchase,
        purchases.product,
        request_key=visits.key,
        item_key=purchases.product_id,
        sampler=sampler,
        max_positives=_MAX_POSITIVES,
        negatives_per_positive=config.negatives_per_positive,
        seed=_SEED,
    )


def popularity_auc(
    purchases: source.Purchases, visits: Visits, targets: rb.Targets
) -> dict[str, float]:
    """How well purchases in training weeks alone tell the targets apart, by split."""
    counts = count_targets(
        visits.split[targets.request], targets.label[:, None], purchases.train_count[targets.item]
    )
    return {name: round(auc(counts, split=k, task=0), 4) for k, name in enumerate(SPLITS)}


def purchase_trends(
    purchases: source.Purchases, products: FeatureTable, config: JourneyConfig
) -> Trends | None:
    """Counts of all purchases; None if none are wanted."""
    if not config.item_trends:
        return None
    time = purchases.origin + purchases.time
    seconds, events = count_seconds(time)
    return Trends(
        windows={text: parse_window(text) for text in config.item_trends},
        tasks=(),
        label_delay=0,
        fields={
            field: ValueEvents.of(_values(products, field, purchases.product), time)
            for field in config.trends_of
        },
        time=seconds,
        events=events,
    )


def household_trends(
    purchases: source.Purchases, logs: rb.UserLogs, config: JourneyConfig
) -> dict[str, np.ndarray]:
    """Half the log of 1 + purchases of the household in windows before each visit."""
    user = np.repeat(np.arange(len(logs)), np.diff(logs.request_offset))
    found = {}
    for name, seconds in config.user_windows.items():
        start = logs.request_time - seconds
        before = rb.history_end(purchases.user, purchases.time, user, start)
        found[name] = user_trend(logs.history_end - before)
    return found


def _values(products: FeatureTable, field: str, product: np.ndarray) -> np.ndarray:
    """What purchases of products are counted by."""
    return product if field == "item" else products.columns[field][product]


def _trend_values(
    trends: Trends, products: FeatureTable, product: np.ndarray
) -> dict[str, np.ndarray]:
    return {field: _values(products, field, product) for field in trends.fields}


def _trend_sizes(trends: Trends, products: source.SideTable) -> dict[str, int]:
    items = {"item": len(products.table)}
    return {field: (items | products.sizes)[field] for field in trends.fields}


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
