"""The match index against a pass over the events in float64."""

import numpy as np
import pytest

from stca_jax.serving.matches import MatchIndex

FIELDS, DECAYS = ("item", "brand"), (3_600.0, 86_400.0)


def direct(events, targets, now):
    """Count, age of the latest, decayed counts, by looking at every event."""
    table = np.zeros((len(targets), 2, 4))
    for m, target in enumerate(targets):
        for f in range(2):
            age = np.array([now - t for t, ids in events if ids[f] == target[f]], np.float64)
            table[m, f, 0] = len(age)
            table[m, f, 1] = age.min() if len(age) else np.inf
            for k, decay in enumerate(DECAYS):
                table[m, f, 2 + k] = np.exp(-age / decay).sum()
    return table


def found(index, targets, now):
    columns = {f: np.array([t[k] for t in targets], np.int32) for k, f in enumerate(FIELDS)}
    return index.look_up(columns, now)


@pytest.mark.parametrize("is_late", [False, True])
def test_added_and_removed_events_count_as_in_a_pass_over_all(is_late):
    rng = np.random.default_rng(0)
    index, events = MatchIndex(FIELDS, DECAYS), []
    targets = [(i, b) for i, b in zip(range(25), np.r_[:5, :20], strict=True)]
    time = 0
    for step in range(600):
        time += int(rng.choice([0, 0, 60, 90_000]))
        at = max(0, time - int(rng.integers(0, 200_000))) if is_late else time
        ids = int(rng.geometric(0.2)), int(rng.integers(0, 4))
        events.append((at, ids))
        index.add(ids, at)
        if len(events) > 150:  # as a full window does
            oldest = min(range(len(events)), key=lambda k: events[k][0])
            at, ids = events.pop(oldest)
            index.remove_oldest(ids, at)
        if step % 40 == 0:
            now = time + int(rng.integers(0, 100_000))
            expected = direct(events, targets, now)
            np.testing.assert_allclose(found(index, targets, now), expected, rtol=1e-6, atol=1e-7)
    again = MatchIndex(FIELDS, DECAYS)
    order = rng.permutation(len(events))
    columns = {f: np.array([events[i][1][k] for i in order]) for k, f in enumerate(FIELDS)}
    again.rebuild(columns, np.array([events[i][0] for i in order]))
    expected = direct(events, targets, time)
    np.testing.assert_allclose(found(again, targets, time), expected, rtol=1e-6, atol=1e-7)


def test_ids_that_are_gone_leave_no_room_taken():
    index = MatchIndex(FIELDS, DECAYS)
    for k in range(10_000):
        index.add((k, k % 3), k)
        if k >= 100:
            index.remove_oldest((k - 100, (k - 100) % 3), k - 100)
    assert index.num_bytes < 40_000
