"""The SQLite store against a plain list of events, and against kills."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from stca_jax.errors import UserError
from stca_jax.serving import Events, SqliteHistories


def events(times, prefix="", **columns):
    columns = {"item": [int(t) % 7 for t in times], **columns}
    return Events(times, columns, [f"{prefix}{k}" for k in range(len(times))] if prefix else None)


def as_rows(found):
    names = sorted(found.columns)
    columns = [found.time, found.sequence, *(found.columns[n] for n in names)]
    return [tuple(x.item() for x in row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_reads_what_a_sorted_list_holds(tmp_path, seed):
    """Batches of any size, in order or late, some sent twice."""
    rng = np.random.default_rng(seed)
    store = SqliteHistories(tmp_path / "users.sqlite")
    expected, known, now = [], {}, 0
    for _ in range(60):
        size = int(rng.choice([1, 3, 40, 700]))
        now += int(rng.integers(0, 50))
        late = rng.random() < 0.4
        times = rng.integers(0, now + 1, size) if late else now + np.sort(rng.integers(0, 9, size))
        names = [f"e{rng.integers(0, 3_000)}" for _ in range(size)]
        labels = rng.normal(size=size)
        batch = Events(times, {"item": rng.integers(0, 99, size), "label": labels}, names)
        sequence = store.append("u", batch).sequence
        for k, name in enumerate(names):
            is_new = name not in known
            assert (sequence[k] >= 0) == is_new
            if is_new:
                known[name] = sequence[k]
                row = batch.columns["item"][k], labels[k]
                expected.append((int(times[k]), int(sequence[k]), *(x.item() for x in row)))
        now = max(now, int(times.max()))
    expected.sort()
    assert as_rows(store.read("u", 10**6)) == expected
    for limit, before in ((1, None), (300, None), (50, now // 2), (10**6, now // 3), (5, 0)):
        wanted = [row for row in expected if before is None or row[0] < before][-limit:]
        assert as_rows(store.read("u", limit, before)) == wanted
    sequences = [row[1] for row in expected]
    assert len(set(sequences)) == len(sequences)  # each its own
    store.close()
    assert as_rows(SqliteHistories(tmp_path / "users.sqlite").read("u", 10**6)) == expected


def assert_revisions_follow_changes(stores):
    """Of two connections to one store."""
    first, second = stores
    assert first.revision("u") is None
    seen = [None]

    def check(change):
        assert change.before == seen[-1]
        assert change.after not in seen
        assert first.revision("u") == second.revision("u") == change.after
        seen.append(change.after)

    check(first.append("u", events([1], "a-")))
    check(second.append("u", events([2], "b-")))
    check(second.update("u", Events([0], {"item": [5]}, ["a-0"])))
    again = first.append("u", events([2], "b-"))
    assert again.sequence.tolist() == [-1]
    assert again.before == again.after == seen[-1]
    assert first.revision("another") is None
    assert second.delete("u")
    assert first.revision("u") is None
    change = first.append("u", events([1], "a-"))
    assert change.before is None
    assert change.after not in seen


def test_texts_of_any_length_and_missing_values_come_back(tmp_path):
    store = SqliteHistories(tmp_path / "users.sqlite")
    store.append("u", Events([1, 2], {"brand": ["a", None], "price": [1.5, None]}))
    store.append("u", Events([3], {"brand": ["ünïcödé " * 20], "price": [2]}))
    found = store.read("u", 10)
    assert found.columns["brand"].tolist() == ["a", "\0missing", "ünïcödé " * 20]
    np.testing.assert_array_equal(found.columns["price"], [1.5, np.nan, 2])


def test_an_update_rewrites_an_event_and_no_other(tmp_path):
    store = SqliteHistories(tmp_path / "users.sqlite")
    times = np.arange(1_000)
    store.append("u", events(times, "e", label=np.zeros(1_000)))
    change = store.update("u", Events([0], {"item": [5], "label": [1.0]}, ["e300"]))
    assert change.sequence.tolist() == [300]
    found = store.read("u", 1_000)
    assert np.flatnonzero(found.columns["label"]).tolist() == [300]
    assert found.time.tolist() == times.tolist()
    with pytest.raises(UserError, match="no event with id 'e1000'"):
        store.update("u", Events([0, 0], {"item": [5, 5], "label": [1, 1]}, ["e0", "e1000"]))
    assert store.read("u", 1).columns["label"][0] == 0


def test_every_change_makes_another_revision(tmp_path):
    stores = [SqliteHistories(tmp_path / "users.sqlite") for _ in range(2)]
    assert_revisions_follow_changes(stores)


def test_a_file_of_another_layout_is_named(tmp_path):
    path = tmp_path / "users.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE users (user TEXT PRIMARY KEY, next_sequence INTEGER)")
    with pytest.raises(UserError, match=r"users\.sqlite' cannot be opened: no such column: rev"):
        SqliteHistories(path)


def test_events_with_other_columns_are_refused_whole(tmp_path):
    store = SqliteHistories(tmp_path / "users.sqlite")
    store.append("u", events([1, 2], "a"))
    for wrong in (Events([3], {"itme": [1]}, ["b"]), Events([3], {"item": ["x"]}, ["b"])):
        with pytest.raises(UserError, match="item"):
            store.append("u", wrong)
    assert len(store.read("u", 10)) == 2
    assert store.append("u", events([3], "b")).sequence.tolist() == [2]  # the id was not kept


def test_nothing_of_a_deleted_user_is_left_in_the_files(tmp_path):
    path = tmp_path / "users.sqlite"
    store = SqliteHistories(path)
    for user in ("kept", "gone"):
        store.append(user, Events([1, 2], {"item": [f"secret of {user}"] * 2}, [f"{user}1", "x"]))
    assert store.delete("gone")
    assert not store.delete("gone")
    assert len(store.read("gone", 10)) == 0
    assert len(store.read("kept", 10)) == 2
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"gone" not in content
        assert "secret of gone".encode("utf-32-le") not in content


def test_threads_and_another_connection_append_to_one_user(tmp_path):
    stores = [SqliteHistories(tmp_path / "users.sqlite") for _ in range(2)]

    def append(k):
        for i in range(40):
            stores[k % 2].append("u", events([i], f"{k}-{i}-"))

    threads = [threading.Thread(target=append, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].read("u", 1_000)
    assert len(found) == 160
    assert sorted(found.sequence.tolist()) == list(range(160))


WRITER = """
    import sys
    from stca_jax.serving import Events, SqliteHistories
    store = SqliteHistories(sys.argv[1])
    k = int(sys.argv[2])
    while True:
        store.append("u", Events([k], {"item": [k % 7]}, [f"e{k}"]))
        print(k, flush=True)
        k += 1
"""


def test_no_acknowledged_event_is_lost_by_a_kill(tmp_path):
    path, first = tmp_path / "users.sqlite", 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), path, str(first)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        acknowledged = [int(process.stdout.readline()) for _ in range(300)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += map(int, process.stdout.read().split())
        process.wait()
        found = SqliteHistories(path).read("u", 10**6)
        times = found.time.tolist()
        assert times == list(range(len(times)))  # each once, in order
        assert len(times) - 1 - acknowledged[-1] in (0, 1)  # one may be stored and not yet said
        first = len(times) - 2  # sent again


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "users.sqlite"
    store = SqliteHistories(path)
    store.append("u", events(range(300), "a"))
    store._db.execute(
        f"PRAGMA max_page_count={store._db.execute('PRAGMA page_count').fetchone()[0]}"
    )
    with pytest.raises(OSError, match=f"{path}.*full"):
        store.append("u", events(range(300, 20_000), "b"))
    assert len(store.read("u", 10**6)) == 300
    store._db.execute("PRAGMA max_page_count=1000000")
    assert (store.append("u", events([300], "b")).sequence >= 0).all()


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "users.sqlite"
    path.write_text("not a database, but long enough to have a header" * 20)
    with pytest.raises(UserError, match=r"users\.sqlite.*not a database"):
        SqliteHistories(path)
    assert sqlite3.sqlite_version_info >= (3, 8)
