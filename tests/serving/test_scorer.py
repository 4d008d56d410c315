"""Scores are those of the evaluation, whatever was appended, evicted, restarted or reloaded."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from conftest import evaluated

from stca_jax.errors import UserError
from stca_jax.export.replay import replay
from stca_jax.serving import Events, Scorer, ScoreRequest, ServingModel, SqliteHistories
from stca_jax.serving.folder import describe_file
from stca_jax.serving.paged_cache import bytes_of_user

ENOUGH = 64 << 20


def scorer_of(export, cache="keys_values", histories=None, **options):
    options = {"max_bytes": ENOUGH, "encoded": True, **options}
    return Scorer(ServingModel.load(export, cache=cache), histories, **options)


def differences(scorer, run, expected, between=lambda k: None):
    """Of each request; the last events before it are appended one by one."""
    found = []
    for k, replayed in enumerate(replay(run.dataset, expected)):
        user, new = replayed.request.user, replayed.new
        place = np.arange(len(new)) - len(new)
        scorer.append(user, new.select(place < -3))
        for i in (-3, -2, -1):
            scorer.append(user, new.select(place == i))
        between(k)
        logits = scorer.logits(replayed.request)
        found.append(np.abs(logits - expected[replayed.request_id]).max())
    assert len(found) == len(expected) > 50
    return np.array(found)


@pytest.mark.parametrize("cache", ["keys_values", "tokens"])
def test_replayed_requests_score_as_evaluated(export, everything_run, expected, cache):
    scorer = scorer_of(export, cache)
    assert everything_run.dataset.index.history_end.max() > 1_000  # of 600 that are read
    assert differences(scorer, everything_run, expected).max() < 1e-5
    assert scorer.counts.hits > scorer.counts.misses


def test_evictions_restarts_and_reloads_change_no_score(export, everything_run, expected, tmp_path):
    other = shutil.copytree(export, tmp_path / "other")
    room = 2 * bytes_of_user(ServingModel.load(export))
    scorer = scorer_of(export, histories=SqliteHistories(tmp_path / "u.sqlite"), max_bytes=room)

    def between(k):
        if k == 20:
            scorer.reload(other)
        if k == 40:  # what another process finds
            scorer.histories.close()
            scorer.histories = SqliteHistories(tmp_path / "u.sqlite")
            scorer.reload(export)

    assert differences(scorer, everything_run, expected, between).max() < 1e-5
    assert scorer.counts.evictions > 5
    assert scorer.cached[0] <= 3


def test_servers_that_share_a_store_see_each_others_writes(
    export, everything_run, expected, tmp_path
):
    """Whoever is asked, in whatever order they append: no score is of an old history."""
    scorers = [scorer_of(export, histories=SqliteHistories(tmp_path / "u.sqlite")) for _ in "ab"]
    first = list(replay(everything_run.dataset, expected))[:16]
    for k, replayed in enumerate(first):
        request = replayed.request
        for part in np.array_split(np.arange(len(replayed.new)), 3):
            scorers[(k + len(part)) % 2].append(request.user, replayed.new.select(part))
            for scorer in scorers:  # so that both have the user in the cache
                scorer.logits(request)
        for scorer in scorers:
            found = scorer.logits(request)
            np.testing.assert_allclose(found, expected[replayed.request_id], atol=1e-5)
    assert all(scorer.counts.hits > len(first) for scorer in scorers)
    replayed = max(first, key=lambda replayed: len(replayed.new))
    request = replayed.request
    assert scorers[0].forget(request.user)
    empty = {n: c[:0] for n, c in replayed.new.columns.items()}
    nothing = scorers[1].score_once(
        Events([], empty), request.targets, request.request, request.time
    )
    task = scorers[1].model.info.schema.tasks[0]
    again = scorers[1].score(request.user, request.targets, request.request, request.time)
    np.testing.assert_allclose(again[task], nothing[task], atol=1e-6)


def test_late_events_late_labels_and_events_sent_twice(export, everything_run, expected):
    """The same history comes about in any order of arrival."""
    scorer = scorer_of(export)
    rng = np.random.default_rng(0)
    checked = 0
    for replayed in replay(everything_run.dataset, expected):
        new, request = replayed.new, replayed.request
        if not 20 < len(new) < 600:
            continue
        # Equal times have an order of their own, so that a window's first events may be others.
        user = ScoreRequest(f"late {checked}", request.targets, request.request, request.time)
        order = rng.permutation(len(new))
        wrong = {n: c[order] for n, c in new.columns.items()}
        wrong["price"] = wrong["price"] + 1
        for part in np.array_split(np.arange(len(new)), 5):
            events = Events(new.time[order][part], {n: c[part] for n, c in wrong.items()},
                            [new.ids[i] for i in order[part]])  # fmt: skip
            assert scorer.append(user.user, events) == len(part)
            assert scorer.append(user.user, events) == 0
            scorer.logits(user)  # so that it is in the cache
        scorer.update(user.user, new)
        first = replayed.request_id
        seen = everything_run.dataset.index.history_end[
            everything_run.dataset.index.request_id == first
        ]
        if seen == len(new):
            found = scorer.logits(user)
            np.testing.assert_allclose(found, expected[first], atol=1e-5)
            checked += 1
        if checked == 3:
            return
    raise AssertionError("no such user")


def test_a_request_of_the_past_reads_no_later_event(export, everything_run, expected):
    scorer = scorer_of(export)
    replayed = list(replay(everything_run.dataset, expected))
    for r in replayed:
        scorer.append(r.request.user, r.new)
    for r in replayed[:10]:
        np.testing.assert_allclose(scorer.logits(r.request), expected[r.request_id], atol=1e-5)
    assert scorer.cached[0] <= 24


def test_score_once_score_many_and_threads_agree(export, everything_run, expected):
    scorer = scorer_of(export)
    replayed = {r.request.user: r for r in replay(everything_run.dataset, expected)}
    requests, events = [], {}
    for r in replay(everything_run.dataset, expected):
        scorer.append(r.request.user, r.new)
        events.setdefault(r.request.user, []).append(r.new)
    requests = [r.request for r in replayed.values()]
    bad = ScoreRequest("x", {"item": [1]}, {}, requests[0].time)
    *together, error = scorer.score_many([*requests, bad])
    assert isinstance(error, UserError)
    alone = {}

    def score(request):
        alone[request.user] = scorer.score(
            request.user, request.targets, request.request, request.time
        )

    threads = [threading.Thread(target=score, args=(r,)) for r in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, found in zip(requests, together, strict=True):
        assert found.keys() == {"click", "buy"}
        for task, values in found.items():
            np.testing.assert_allclose(values, alone[request.user][task], atol=1e-6)
        expected_logits = expected[replayed[request.user].request_id]
        np.testing.assert_allclose(
            found["click"], 1 / (1 + np.exp(-expected_logits[:, 0])), atol=1e-5
        )
    # Several users in one call, as an accelerator scores them.
    group = requests[:3]
    for request, logits in zip(group, scorer._score_group(group), strict=True):
        np.testing.assert_allclose(logits, scorer.logits(request), atol=1e-6)
    parts = events[requests[1].user]
    history = Events(
        np.concatenate([e.time for e in parts]),
        {n: np.concatenate([e.columns[n] for e in parts]) for n in parts[0].columns},
    )
    once = scorer.score_once(history, requests[1].targets, requests[1].request, requests[1].time)
    np.testing.assert_allclose(once["buy"], together[1]["buy"], atol=1e-6)


def test_nothing_of_a_forgotten_user_is_left(export, everything_run, expected):
    scorer = scorer_of(export)
    first = next(r for r in replay(everything_run.dataset, expected) if len(r.new) > 600)
    empty = scorer.logits(first.request)
    scorer.append(first.request.user, first.new)
    assert np.abs(scorer.logits(first.request) - empty).max() > 1e-3
    pages = list(scorer._pool.cache.find(first.request.user).pages)
    assert len(pages) == 2
    assert scorer.forget(first.request.user)
    for x in scorer._pool.cache._pool.values():
        assert not np.asarray(x)[:, pages].any()
    np.testing.assert_array_equal(scorer.logits(first.request), empty)
    assert not scorer.forget(first.request.user)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {"item": [1], "category": [1]}}, "target lacks 'score'"),
        ({"targets": {"item": [90], "category": [1], "score": [0]}}, "'item' has 90; .* 0 to 89"),
        ({"targets": {"item": [-1], "category": [1], "score": [0]}}, "'item' has -1"),
        ({"targets": {"item": [1.5], "category": [1], "score": [0]}}, "'item' has 1.5"),
        ({"targets": {"item": [1], "category": [1], "score": [np.nan]}}, "'score' has nan"),
        ({"targets": {"item": ["a"], "category": [1], "score": [0]}}, "'item' has values like 'a'"),
        ({"targets": {"item": [1, 2], "category": [1], "score": [0]}}, "category.* expected"),
        ({"targets": {"item": [], "category": [], "score": []}}, "0 targets; give 1 to 2,048"),
        ({"request": {"hour": 3}}, "request lacks 'age'"),
        ({"time": 5}, "time 5 is not within 1600000000"),
        ({"time": np.nan}, "time has nan"),
    ],
)
def test_a_bad_request_is_named(scorer, changes, message):
    good = {
        "targets": {"item": [1], "category": [1], "score": [0.5]},
        "request": {"hour": 3, "age": 0.1},
        "time": 1_600_000_100,
    }
    assert scorer.score("u", **good)["click"].shape == (1,)
    with pytest.raises(UserError, match=message):
        scorer.score("u", **{**good, **changes})


@pytest.fixture(scope="module")
def scorer(export):
    return scorer_of(export)


def test_a_bad_event_is_named_and_not_stored(scorer):
    good = {"item": [1, 2], "category": [1, 1], "price": [0, 0]}
    for name, value in (("item", [1, 90]), ("price", [0, np.inf]), ("category", ["a", "b"])):
        with pytest.raises(UserError, match=f"history '{name}' has"):
            scorer.append("bad", Events([1_600_000_000] * 2, {**good, name: value}))
    with pytest.raises(UserError, match="time 7 is not within"):
        scorer.append("bad", Events([7, 1_600_000_000], good))
    assert len(scorer.histories.read("bad", 10)) == 0


def test_a_bad_export_does_not_serve_and_leaves_the_old_one(export, scorer, tmp_path):
    version = scorer.model.info.version
    damaged = shutil.copytree(export, tmp_path / "damaged")
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64  # an exponent
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
        scorer.reload(damaged)
    # Whole, but of other weights than those of the golden requests.
    values = json.loads((damaged / "model.json").read_text())
    values["files"]["weights.safetensors"] = describe_file(weights)
    (damaged / "model.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not give the evaluation's logits here"):
        scorer.reload(damaged)
    (damaged / "golden.safetensors").unlink()
    with pytest.raises(UserError, match=r"golden\.safetensors is missing"):
        scorer.reload(damaged)
    with pytest.raises(UserError, match=r"is no exported model"):
        scorer.reload(tmp_path)
    assert scorer.model.info.version == version
    with pytest.raises(UserError, match="does not hold one user of 600 events"):
        scorer_of(export, max_bytes=1_000)
    with pytest.raises(UserError, match="cache is 'keys'; this model has keys_values, tokens"):
        ServingModel.load(export, cache="keys")


@pytest.mark.slow
def test_int8_differs_by_what_the_export_says(export, everything_run, expected):
    scorer = scorer_of(export, "int8")
    allowed = scorer.model.tolerance
    assert 1e-5 < allowed < 0.1
    assert 1e-6 < differences(scorer, everything_run, expected).max() < 2 * allowed
    exact = bytes_of_user(ServingModel.load(export))
    assert bytes_of_user(scorer.model) < exact / 4


ALONE = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ImportError(f"{name} is blocked")

    BLOCKED = ("flax", "optax", "orbax", "grain", "tensorflow_datasets", "array_record",
               "pyarrow", "absl", "tqdm", "duckdb", "tensorboard")
    sys.meta_path.insert(0, Blocked())
    import stca_jax.serving.server.front, stca_jax.serving.server.running
    from stca_jax.serving import Events, Scorer, ServingModel
    scorer = Scorer(ServingModel.load(sys.argv[1]), encoded=True, max_bytes=64 << 20)
    now = 1_600_000_100
    scorer.append("u", Events([now - 1], {"item": [1], "category": [1], "price": [0.5]}))
    targets = {"item": [1, 2], "category": [1, 2], "score": [0, 1]}
    print(scorer.score("u", targets, {"hour": 3, "age": 0.1}, now)["click"].shape)
"""


def test_loading_needs_nothing_of_training(export):
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), export],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "(2,)"


def test_evaluation_of_requests_is_that_of_all(everything_run, expected):
    """The oracle itself: requests' logits do not depend on what they are packed with."""
    some = evaluated(everything_run, max_requests=7)
    assert len(some) == 7
    for request, logits in some.items():
        np.testing.assert_allclose(logits, expected[request], atol=2e-6)
