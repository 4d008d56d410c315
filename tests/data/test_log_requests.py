"""Requests whose id comes back later are cut: none spans a long gap or two splits."""

from __future__ import annotations

import collections

import log_oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.data import running
from stca_jax.data.interaction_log import source
from stca_jax.data.interaction_log.events import LogSource
from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.data.interaction_log.requests import LONGEST_GAP
from stca_jax.data.interaction_log.staging import Staging

T0 = 1_700_000_000


def stage(tmp_path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "labels": ("click",)}
    log = LogConfig(log=(str(tmp_path / "log.parquet"),), **(names | options))
    return Staging(LogSource.open(log), tmp_path / "mine" / "staging", running.run_here)


def found(staging):
    """Requests: user, time, and the items and labels of their targets."""
    requests = collections.Counter()
    for k, statistics in enumerate(staging.statistics):
        if statistics is None:
            continue
        shard = staging.shard(k)
        r = shard.requests
        item = shard.events["item"].to_numpy()
        for q in range(len(r.time)):
            rows = r.target_row[r.of_target == q]
            assert len(set(np.searchsorted(staging.times, shard.time[rows], side="right"))) == 1
            assert r.span[q] == shard.time[rows].max() - shard.time[rows].min()
            user = shard.user_ids[int(r.user[q])].as_py()
            targets = zip(item[rows].tolist(), shard.labels[rows, 0].tolist(), strict=True)
            requests[user, int(r.time[q]), tuple(sorted(targets))] += 1
    return requests


def rows_of_one_id(step, num=200):
    """User 3 keeps a request id for the whole log, every other row of which is its own."""
    return [
        {"user": 3 if k % 2 else k % 7, "item": k % 11, "time": T0 + step * k, "click": k // 2 % 2,
         "request": "again" if k % 2 else f"r{k}"}
        for k in range(num)
    ]  # fmt: skip


@pytest.mark.parametrize("step", [60, 3_600, LONGEST_GAP // 2, LONGEST_GAP // 2 + 1])
@pytest.mark.parametrize("by", ["request", "session"])
def test_no_request_spans_a_long_gap_or_two_splits(tmp_path, monkeypatch, step, by):
    monkeypatch.setattr(source, "_EVENTS_PER_SHARD", 60)
    rows = rows_of_one_id(step)
    named = by == "request"
    options = {"request_id": "request"} if named else {"session_gap": 2 * step}
    staging = stage(tmp_path, rows, allow_odd=1.0, **options)
    expected = log_oracle.expected_requests(
        rows, labels=("click",), starts=staging.times, request_id=named and "request",
        gap=0 if named else 2 * step,
    )  # fmt: skip
    expected = collections.Counter((u, t, targets) for u, t, _, targets in expected.elements())
    assert found(staging) == expected
    assert staging.total.num_requests == expected.total()
    assert staging.total.num_cut == (99 if named and 2 * step > LONGEST_GAP else 2)


def test_a_request_of_days_is_in_the_profile(tmp_path):
    staging = stage(tmp_path, rows_of_one_id(3_600), request_id="request", allow_odd=1.0)
    profile = staging.profile()
    assert f"the longest spans {staging.total.longest_span:,} seconds" in profile
    assert "warning: a request spans 6." in profile
    assert "--request_id" in profile


def test_a_restart_finds_the_same(tmp_path):
    rows = rows_of_one_id(3_600)
    before = stage(tmp_path, rows, request_id="request", allow_odd=1.0)
    source_, folder = before.source, tmp_path / "mine" / "staging"
    again = Staging(source_, folder, running.run_here)
    assert again.total == before.total
    assert again.profile() == before.profile()
