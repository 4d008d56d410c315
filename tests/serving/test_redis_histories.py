"""The Redis store: the same answers as the SQLite store, from a real server that is killed."""

import shutil
import subprocess
import time

import numpy as np
import pytest
import redis
from test_sqlite_histories import assert_revisions_follow_changes

from stca_jax.errors import UserError
from stca_jax.serving import Events, SqliteHistories
from stca_jax.serving.redis_histories import RedisHistories


class RedisServer:
    """redis-server on a socket of its own, durable by its append-only file."""

    def __init__(self, folder):
        assert shutil.which("redis-server"), "apt-get install redis-server"
        self.folder = folder
        self.url = f"unix://{folder}/redis.sock"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", f"{self.folder}/redis.sock",
             "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always",
             "--save", "", "--daemonize", "no"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(600):
            try:
                return redis.Redis.from_url(self.url).ping()
            except redis.RedisError:
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # A short path: sockets have at most 107 characters.
    running = RedisServer(tmp_path_factory.mktemp("r"))
    yield running
    running.kill()


@pytest.fixture
def store(server):
    redis.Redis.from_url(server.url).flushall()
    return RedisHistories(server.url)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.time, expected.time)
    np.testing.assert_array_equal(found.sequence, expected.sequence)
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)


def batches(seed, count):
    """Events in order and late, some sent twice, some without ids."""
    rng = np.random.default_rng(seed)
    now = 10
    for _ in range(count):
        size = int(rng.choice([1, 3, 300]))
        now += int(rng.integers(0, 50))
        times = rng.integers(0, now, size) if rng.random() < 0.4 else np.sort(now + np.arange(size))
        ids = [f"e{rng.integers(0, 2_000)}" for _ in range(size)] if rng.random() < 0.8 else None
        texts = np.append(rng.choice(["a", "ü", None], size - 1), "b")
        columns = {"item": rng.integers(0, 2**60, size), "x": rng.normal(size=size), "t": texts}
        yield Events(times, columns, ids)


@pytest.mark.parametrize("seed", range(2))
def test_reads_what_the_sqlite_store_reads(store, seed):
    reference = SqliteHistories()
    for batch in batches(seed, 15):
        np.testing.assert_array_equal(
            store.append("u", batch).sequence, reference.append("u", batch).sequence
        )
    latest = int(reference.read("u", 1).time[0])
    for limit, before in ((10**6, None), (1, None), (500, latest // 2), (70, latest), (5, 0)):
        expected = reference.read("u", limit, before)
        found = store.read("u", limit, before)
        if len(expected):
            assert_same(found, expected)
        assert len(found) == len(expected)
    assert len(store.read("somebody else", 10)) == 0


def test_an_update_rewrites_an_event_and_no_other(store):
    times = np.arange(100)
    columns = {"item": times, "label": np.zeros(100)}
    store.append("u", Events(times, columns, [f"e{k}" for k in times]))
    changed = Events([0], {"item": [5], "label": [1.0]}, ["e30"])
    assert store.update("u", changed).sequence.tolist() == [30]
    found = store.read("u", 100)
    assert np.flatnonzero(found.columns["label"]).tolist() == [30]
    assert found.time.tolist() == times.tolist()
    before = found.columns["label"].tolist()
    with pytest.raises(UserError, match="no event with id 'z'"):
        store.update("u", Events([0, 0], {"item": [1, 1], "label": [2, 2]}, ["e1", "z"]))
    assert store.read("u", 100).columns["label"].tolist() == before


def test_every_change_makes_another_revision(server, store):
    assert_revisions_follow_changes([store, RedisHistories(server.url)])


def test_other_columns_are_refused_and_change_nothing(store):
    store.append("u", Events([1], {"item": [1], "brand": ["x"]}))
    for columns in ({"item": [1]}, {"item": ["one"], "brand": ["x"]}):
        with pytest.raises(UserError, match=r"earlier ones brand \(text\), item \(number\)"):
            store.append("u", Events([2], columns))
    assert len(store.read("u", 10)) == 1


def test_a_deleted_user_leaves_no_key(store, server):
    for user in ("u", "{u}", "v"):
        store.append(user, Events([1], {"item": [1]}, ["a"]))
    assert store.delete("u")
    assert not store.delete("u")
    keys = redis.Redis.from_url(server.url).keys("*")
    assert {key.split(b":")[1] for key in keys} == {b"{v}", b"{%7Bu%7D}"}


def test_nothing_acknowledged_is_lost_when_redis_is_killed(tmp_path):
    server = RedisServer(tmp_path)
    store = RedisHistories(server.url)
    try:
        for batch in batches(0, 5):
            store.append("u", batch)
        expected = store.read("u", 10**6)
        server.kill()
        with pytest.raises(OSError, match=r"redis\.sock"):
            store.append("u", Events([1], {"item": [1]}))
        server.start()
        assert_same(store.read("u", 10**6), expected)  # the store connects again
    finally:
        server.kill()


def test_a_missing_server_is_said_without_the_password():
    with pytest.raises(UserError, match=r"127.0.0.1:1 cannot be opened") as error:
        RedisHistories("redis://:hush@127.0.0.1:1")
    assert "hush" not in str(error.value)
    with pytest.raises(UserError, match="cannot be opened"):
        RedisHistories("http://127.0.0.1")
