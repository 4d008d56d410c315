"""What of a log reaches the model is in the profile; where nothing does, preparing ends."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import running
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.staging import Staging
from stca_jax.errors import UserError

T0 = 1_700_000_000


def stage(tmp_path, ids=None, **options):
    table = {"user": [k % 6 for k in range(100)], "item": [100 + k % 20 for k in range(100)],
             "time": [T0 + 3_600 * k for k in range(100)], "click": [k % 2 for k in range(100)],
             "price": [f"${k % 7}.50" if k % 10 else None for k in range(100)]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    if ids is not None:
        pq.write_table(pa.table({"item": ids, "cat": [0] * len(ids)}), tmp_path / "items.parquet")
        options |= {"items": (str(tmp_path / "items.parquet"),), "item_features": ("cat",)}
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "labels": ("click",)}
    names |= {"min_count": 1}
    log = LogConfig(log=(str(tmp_path / "log.parquet"),), **(names | options))
    return Staging(LogSource.open(log), tmp_path / "mine" / "staging", running.run_here)


def test_numbers_written_as_text(tmp_path):
    with pytest.raises(UserError, match=r"price: 71 of 71 values .* are no numbers.*SQL"):
        stage(tmp_path, history_features=("price:numeric",))
    sql = "price=TRY_CAST(regexp_replace(price, '[^0-9.eE+-]', '', 'g') AS DOUBLE)"
    profile = stage(tmp_path, history_features=(sql,)).profile()
    assert "price: 0.5 to 6.5, mean" in profile
    assert "missing in 10.1%, unreadable in 0.0%" in profile


def test_no_item_with_an_id_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"item: none of 20 values occurs 5 times.*--min_count=1"):
        stage(tmp_path, min_count=5)
    assert "item: 20 of 20 values have ids of their own, in 100.0%" in stage(tmp_path).profile()


@pytest.mark.parametrize("ids", [[f"P{k}" for k in range(100, 120)], ["100.5", "101.5"]])
def test_a_table_without_the_logs_items(tmp_path, ids):
    with pytest.raises(UserError, match=r"0 of 20 items .* the log has 10\d, .*--item_id="):
        stage(tmp_path, ids)


def test_a_table_with_some_of_the_items(tmp_path):
    profile = stage(tmp_path, list(range(100, 105))).profile()
    assert "warning: 5 of 20 items of the log are in the table (25.0%)" in profile
