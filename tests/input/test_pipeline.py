"""The sequence of batches: complete, exact, resumable, the same for any number of processes."""

import collections
import dataclasses
import itertools
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_dataset import SCHEMA, make_dataset, random_dataset

from stca_jax.batch import validate_batch
from stca_jax.errors import UserError
from stca_jax.input.length import BetaLength, FixedLength, UniformLength
from stca_jax.input.pipeline import count_batches, count_steps, epoch_fill, make_input
from stca_jax.input.planning import InputConfig, Planner, select_requests
from stca_jax.input.records import SPLITS
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.rankmixer import RankMixerConfig
from stca_jax.models.stca import StcaConfig

CONFIG = InputConfig(
    length=UniformLength(8, 64),
    row_length=128,
    targets_per_row=24,
    rows_per_batch=4,
    epochs=2,
    look_ahead=32,
    num_threads=0,
)
ROWS = pytest.mark.parametrize("rows", ["request", "user"])


def dataset_of(num_users=30, seed=0):
    return random_dataset(num_users, max_events=200, max_requests=8, max_targets=40, seed=seed)


def config_of(**changes):
    return dataclasses.replace(CONFIG, **changes)


def fields_of(batch):
    """All arrays of a batch by name."""
    arrays: dict[str, object] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        named = value.items() if isinstance(value, dict) else [("", value)]
        arrays |= {f"{field.name}.{name}": array for name, array in named}
    return arrays


def assert_same(actual, expected):
    actual, expected = fields_of(actual), fields_of(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def joined(batches):
    """The global batch of the batches of all processes."""
    parts = [fields_of(b) for b in batches]
    return {
        n: parts[0][n]
        if n in ("shared_history.", "history_unlabelled.")
        else np.concatenate([p[n] for p in parts])
        for n in parts[0]
    }


def valid_targets(batch):
    """The record's view of every target that stands in a batch: (request, target features …)."""
    for row, slot in np.argwhere(batch.target_mask):
        features = [batch.target[n][row, slot] for n in SCHEMA.target]
        yield (int(batch.request_id[row, slot]), *features, *batch.label[row, slot])


def all_targets(dataset, split):
    index = dataset.index
    for i in np.flatnonzero(index.split == SPLITS.index(split)):
        record, k = dataset.record(index.record[i]), index.position[i]
        for t in range(record.target_offset[k], record.target_offset[k + 1]):
            features = [record.target[n][t] for n in SCHEMA.target]
            yield (int(index.request_id[i]), *features, *record.label[t])


logs = st.lists(
    st.integers(0, 60).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(0, n), st.sampled_from([1, 2, 5, 30])), min_size=1, max_size=6
        ).map(lambda requests: (n, [e for e, _ in requests], [m for _, m in requests]))
    ),
    min_size=1,
    max_size=8,
)
lengths = st.sampled_from(
    [FixedLength(1), FixedLength(40), UniformLength(8, 32), BetaLength(8, 40, 16, 0.1)]
)


@settings(max_examples=40, deadline=None)
@given(
    logs,
    lengths,
    st.sampled_from(["request", "user"]),
    st.sampled_from([3, 24]),  # few shapes: validate_batch compiles for each
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(1, 20),
)
def test_every_target_exactly_once_an_epoch(
    users, length, rows, targets_per_row, rows_per_batch, shuffle, look_ahead
):
    dataset = make_dataset(users)
    expected = Counter(all_targets(dataset, "train"))
    config = config_of(
        length=length,
        rows=rows,
        row_length=40,
        targets_per_row=targets_per_row,
        rows_per_batch=rows_per_batch,
        shuffle=shuffle,
        look_ahead=look_ahead,
    )
    if not expected:
        with pytest.raises(ValueError, match="no request of split 'train'"):
            make_input(dataset, config)
        return
    elements = list(make_input(dataset, config))
    sizes = [count_batches(dataset, config, epoch) for epoch in (0, 1)]
    assert len(elements) == sum(sizes)
    for epoch in (elements[: sizes[0]], elements[sizes[0] :]):
        assert Counter(t for e in epoch for t in valid_targets(e.batch)) == expected
    for element in elements:
        validate_batch(element.batch, SCHEMA)
        mask = element.batch.target_mask
        assert (mask[:, :-1] >= mask[:, 1:]).all(), "padding slots come last"
        for edge in (element.batch.history_start, element.batch.history_end):
            assert not edge[~mask].any()
            assert (np.diff(edge, axis=1) >= 0)[mask[:, 1:]].all(), "ranges are in order"


@pytest.mark.parametrize(
    ("rows", "window"),
    [("user", "suffix"), *(("request", w) for w in ("suffix", "prefix", "random"))],
)
def test_ranges_hold_the_right_events_of_the_right_user(rows, window):
    dataset = dataset_of(60)
    config = config_of(rows=rows, window=window, epochs=1, targets_per_chunk=24)
    place = {int(r): i for i, r in enumerate(dataset.index.request_id)}
    seen = 0
    for batch, _, _ in make_input(dataset, config):
        assert batch.shared_history == (rows == "user")
        for row, slot in np.argwhere(batch.target_mask):
            i = place[int(batch.request_id[row, slot])]
            record, k = dataset.record(dataset.index.record[i]), dataset.index.position[i]
            tokens = slice(batch.history_start[row, slot], batch.history_end[row, slot])
            time = batch.history_time[row, tokens]
            end = record.history_end[k]
            first = {"suffix": end - len(time), "prefix": 0}.get(
                window, int(time[0]) // 10 - 1 if len(time) else 0
            )
            events = slice(first, first + len(time))
            assert 0 <= first <= end - len(time)
            assert len(time) == end or (8 <= len(time) <= 64 and len(time) % 8 == 0)
            np.testing.assert_array_equal(time, record.event_time[events])
            for name in SCHEMA.history:
                np.testing.assert_array_equal(
                    batch.history[name][row, tokens], record.history[name][events]
                )
            assert batch.request["device"][row, slot] == record.request["device"][k]
            assert batch.request_time[row, slot] == record.request_time[k]
            assert batch.user_id[row, slot] == record.user_id
            count = record.target_offset[k + 1] - record.target_offset[k]
            assert batch.num_request_targets[row, slot] == count
            seen += 1
    assert seen > 500


LAWS = {
    "beta-0.02": BetaLength(8, 256, 56, 0.02),
    "beta-0.25": BetaLength(8, 256, 56, 0.25),
    "beta-1": BetaLength(8, 256, 128, 1.0),
    "uniform": UniformLength(16, 256),
}


@pytest.fixture(scope="module")
def busy_users():
    """Users whose 24 requests, of 1 to 15 targets, all follow more events than any window has."""
    rng = np.random.default_rng(4)
    users = [
        (900, rng.integers(300, 900, 24).tolist(), rng.integers(1, 16, 24).tolist())
        for _ in range(300)
    ]
    dataset = make_dataset(users)
    dataset.index.split[:] = 0
    return dataset


def independent_draws(index, config):
    """Effective number of draws: requests of one group, up to a budget of targets, read one."""
    sizes, total = [], 0
    for i, targets in enumerate(index.num_targets):
        total += targets
        starts = config.rows == "request" or i == 0 or index.record[i] != index.record[i - 1]
        if starts or total > config.targets_per_chunk:
            sizes.append(0)
            total = targets
        sizes[-1] += 1
    return np.sum(sizes) ** 2 / np.sum(np.square(sizes))


def planned_lengths(dataset, config):
    """Events that each request reads, by request id."""
    planner = Planner(dataset.index, config)
    units = planner.units(0)
    request_id = planner.index.request_id[units.piece_request]
    return dict(zip(request_id.tolist(), units.piece_stop - units.piece_start, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("rows", "window", "row_length", "budget"),
    [
        ("request", "suffix", 256, 1),
        ("request", "random", 512, 1),
        ("request", "prefix", 512, 1),
        ("user", "suffix", 256, 12),
        ("user", "suffix", 512, 48),
    ],
)
def test_requests_read_the_lengths_that_the_sampler_draws(
    busy_users, rows, window, row_length, budget, law, seed
):
    """Whatever shares tokens with whatever, and however often rows are too short for a group."""
    config = config_of(
        length=LAWS[law], rows=rows, window=window, row_length=row_length, targets_per_row=48,
        targets_per_chunk=budget, epochs=1, seed=seed,
    )  # fmt: skip
    found = np.sort([*planned_lengths(busy_users, config).values()])
    assert len(found) == len(busy_users.index)
    expected = np.sort(LAWS[law].lengths(np.arange(0.5, 20_000) / 20_000))
    grid = np.unique(expected)
    ours, theirs = (np.searchsorted(x, grid, "right") / len(x) for x in (found, expected))
    # A deviation beyond 2.2 / sqrt(draws) has a chance of 1 in 10,000.
    draws = independent_draws(busy_users.index, config)
    assert np.abs(ours - theirs).max() < 2.2 / np.sqrt(draws)


@ROWS
def test_batches_hold_the_planned_lengths(rows):
    dataset = dataset_of()
    config = config_of(rows=rows, epochs=1)
    found = {}
    for batch, _, _ in make_input(dataset, config):
        mask = batch.target_mask
        length = batch.history_end - batch.history_start
        found |= dict(zip(batch.request_id[mask].tolist(), length[mask].tolist(), strict=True))
    assert found == planned_lengths(dataset, config)


def test_users_share_tokens_and_store_no_uncovered_one():
    dataset = make_dataset([(400, [100, 102, 104, 300, 301], [3] * 5)])
    dataset.index.split[:] = 0
    config = config_of(rows="user", length=FixedLength(16), epochs=1, targets_per_chunk=15)
    (element,) = make_input(dataset, config)
    # Two chunks of overlapping windows, 16 + 2 + 2 and 16 + 1 tokens; the gap is not stored.
    assert element.fill.tokens == 20 + 17
    assert epoch_fill(dataset, dataclasses.replace(config, rows="request")).tokens == 5 * 16


@ROWS
@pytest.mark.parametrize("resume_count", [1, 2, 4])
def test_any_process_count_resumes_anywhere_with_the_same_global_sequence(rows, resume_count):
    dataset = dataset_of(24)
    config = config_of(rows=rows, look_ahead=8)
    expected = list(make_input(dataset, config))
    assert len(expected) > 8
    states = [make_input(dataset, config).get_state(), *(e.state for e in expected)]
    for step, state in enumerate(states):
        state = json.loads(json.dumps(state))
        assert state["step"] == step
        batches = []
        for p in range(resume_count):
            iterator = make_input(dataset, config, process_index=p, process_count=resume_count)
            iterator.set_state(state)
            batches.append([e.batch for e in iterator])
        assert {len(b) for b in batches} == {len(expected) - step}
        # The rest of the sequence from every third position, the next batch from all others.
        stop = None if step % 3 == 0 else 1
        for element, parts in zip(
            expected[step:], list(zip(*batches, strict=True))[:stop], strict=False
        ):
            whole = fields_of(element.batch)
            for name, array in joined(parts).items():
                np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_do_not_change_the_sequence(num_threads):
    dataset = dataset_of(24)
    expected = list(make_input(dataset, CONFIG))
    threaded = make_input(dataset, config_of(num_threads=num_threads))
    for before, after in zip(expected, threaded, strict=True):
        assert_same(after.batch, before.batch)
        assert after.state == before.state
        assert after.fill == before.fill
    # A position saved with no threads goes on with some, and back.
    threaded.set_state(expected[4].state)
    assert_same(next(threaded).batch, expected[5].batch)
    plain = make_input(dataset, CONFIG)
    plain.set_state(threaded.get_state())
    assert_same(next(plain).batch, expected[6].batch)
    threaded.close()


def test_close_ends_the_threads():
    before = set(threading.enumerate())  # of other tests, which may end meanwhile
    iterator = make_input(dataset_of(), config_of(num_threads=2, epochs=None))
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    deadline = time.monotonic() + 20
    # One that is only about to run cannot be joined.
    while (left := started & set(threading.enumerate())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_a_user_in_many_batches_is_decoded_once(monkeypatch):
    dataset = dataset_of()
    reads, record = [], dataset.record
    monkeypatch.setattr(dataset, "record", lambda i: reads.append(i) or record(i))
    assert len(list(make_input(dataset, config_of(epochs=2)))) > 2
    assert sorted(reads) == sorted(set(reads)) != []


def test_a_reader_thread_hands_its_error_to_the_caller():
    dataset = dataset_of()

    def broken(i):
        raise ValueError("users-0 is damaged")

    dataset.record = broken
    with pytest.raises(ValueError, match="users-0 is damaged"):
        next(make_input(dataset, config_of(num_threads=2)))


def test_epochs_and_seeds_shuffle_anew():
    dataset = dataset_of()
    elements = list(make_input(dataset, CONFIG))
    half = count_batches(dataset, CONFIG)
    assert [e.state["epoch"] for e in elements].count(0) == half - 1
    (other,) = [next(make_input(dataset, config_of(seed=1)))]
    orders = [e.batch.request_id[e.batch.target_mask] for e in (elements[0], elements[half], other)]
    for a, b in ((0, 1), (0, 2)):
        assert not np.array_equal(orders[a], orders[b])


def test_shuffled_order_has_no_trend():
    """A request's place is independent of its place in the dataset."""
    dataset = make_dataset([(40, [20] * 4, [1] * 4) for _ in range(500)])
    dataset.index.split[:] = 0
    config = config_of(length=FixedLength(8), row_length=32, targets_per_row=4, epochs=1)
    order = [e.batch.request_id[e.batch.target_mask] for e in make_input(dataset, config)]
    order = np.concatenate(order)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 5 / np.sqrt(len(order))


def test_unshuffled_order_is_the_dataset_within_the_look_ahead():
    dataset = make_dataset([(40, [20] * 4, [1] * 4) for _ in range(100)])
    dataset.index.split[:] = 0
    config = config_of(length=FixedLength(8), shuffle=False, look_ahead=20, epochs=1)
    batches = [e.batch for e in make_input(dataset, config)]
    order = np.concatenate([b.request_id[b.target_mask] for b in batches])
    assert len(order) == 400
    # A batch of 4 rows with 16 requests each may begin in one look-ahead and end in the next.
    assert np.abs(order - np.arange(400)).max() < 20 + 4 * 16


def test_fill_counts_what_stands_in_the_global_batch():
    dataset = dataset_of()
    for rows in ("request", "user"):
        config = config_of(rows=rows, epochs=1)
        fills = []
        for batch, fill, _ in make_input(dataset, config):
            assert fill.targets == batch.target_mask.sum()
            assert fill.rows == batch.target_mask.any(1).sum()
            assert fill.tokens == batch.history_end.max(1).sum()
            assert fill.max_tokens == batch.history_time.size
            assert fill.max_targets == batch.target_mask.size
            assert fill.metrics() == {
                "token_fill": fill.tokens / fill.max_tokens,
                "target_fill": fill.targets / fill.max_targets,
            }
            fills.append(fill)
        total = epoch_fill(dataset, config)
        for name in vars(total):
            assert getattr(total, name) == sum(getattr(f, name) for f in fills), name


def test_every_process_gets_near_equal_tokens_and_the_same_statistics():
    dataset = random_dataset(1000, max_events=200, max_requests=4, max_targets=2)
    config = config_of(rows_per_batch=32, targets_per_row=3, epochs=1, look_ahead=4096)
    processes = [make_input(dataset, config, process_index=p, process_count=4) for p in range(4)]
    worst = []
    for elements in zip(*processes, strict=True):
        assert len({e.fill for e in elements}) == 1
        tokens = [e.batch.history_end.max(1).sum() for e in elements]
        worst.append(max(tokens) / np.mean(tokens))
    assert len(worst) > 5
    assert max(worst[:-1]) < 1.03  # in the order of packing, 1.1 to 1.3


def test_shorter_draws_pack_into_fewer_rows():
    dataset = random_dataset(200, max_events=1000, max_requests=4, max_targets=4)
    config = config_of(row_length=1024, targets_per_row=256)

    def rows(length):
        return epoch_fill(dataset, dataclasses.replace(config, length=length)).rows

    full = rows(FixedLength(1000))
    assert rows(BetaLength(8, 1000, 200, 0.1)) < 0.5 * full
    assert rows(FixedLength(104)) < 0.45 * full


def test_pieces_of_a_split_request_share_its_length():
    dataset = make_dataset([(100, [100], [100])])
    dataset.index.split[:] = 0
    elements = list(make_input(dataset, config_of(epochs=1)))
    sizes = {
        int(n)
        for batch, _, _ in elements
        for n in (batch.history_end - batch.history_start)[batch.target_mask]
    }
    assert len(sizes) == 1
    assert all((b.num_request_targets[b.target_mask] == 100).all() for b, _, _ in elements)


def test_evaluation_is_one_ordered_pass_over_a_fixed_sample():
    dataset = dataset_of(60)

    def requests(length, **changes):
        config = CONFIG.for_evaluation("test", length, min_history=20, **changes)
        ids = [e.batch.request_id[e.batch.target_mask] for e in make_input(dataset, config)]
        return set(np.concatenate(ids).tolist())

    index = dataset.index
    test = (index.split == 2) & (index.history_end >= 20)
    assert requests(50) == set(index.request_id[test].tolist())
    sample = requests(50, max_requests=20)
    assert len(sample) == 20
    assert sample == requests(200, max_requests=20, seed=7)
    assert sample < requests(50, max_requests=30)
    assert CONFIG.for_evaluation("test", 200).row_length == 200
    assert CONFIG.for_evaluation("test", 50).row_length == CONFIG.row_length


def test_a_sample_of_a_users_requests_keeps_targets_and_histories_together():
    dataset = dataset_of(60)
    config = dataclasses.replace(
        CONFIG, max_requests=60, rows="user", targets_per_chunk=24, epochs=1
    )
    found = Counter(t for e in make_input(dataset, config) for t in valid_targets(e.batch))
    assert len({t[0] for t in found}) == 60
    assert found <= Counter(all_targets(dataset, "train"))
    sizes = Counter(t[0] for t in found.elements())
    index = dataset.index
    assert all(index.num_targets[index.request_id == r] == n for r, n in sizes.items())


@pytest.mark.slow
def test_packed_batches_have_the_loss_of_one_impression_per_row():
    dataset = dataset_of(8)
    ranker = Ranker(
        RankerConfig(
            sequence=StcaConfig(width=8, num_heads=2, initialization="independent"),
            backbone=RankMixerConfig(num_blocks=1),
        ),
        SCHEMA,
        rngs=nnx.Rngs(0),
    )
    score = nnx.jit(lambda model, batch: model(batch))

    def losses(**changes):
        """Cross-entropy of every target, by what identifies it."""
        config = config_of(length=FixedLength(40), shuffle=False, epochs=1, **changes)
        found = {}
        for batch, _, _ in make_input(dataset, config):
            logit = np.asarray(score(ranker, batch))[batch.target_mask]
            loss = np.logaddexp(0, logit) - batch.label[batch.target_mask] * logit
            found |= dict(zip(valid_targets(batch), loss, strict=True))
        return found

    expected = losses(row_length=40, targets_per_row=1, rows_per_batch=32)
    assert len(expected) > 100
    for rows in ("request", "user"):
        packed = losses(rows=rows)
        assert packed.keys() == expected.keys()
        for target, loss in expected.items():
            np.testing.assert_allclose(packed[target], loss, rtol=2e-5, atol=1e-6)


def test_a_curriculum_lengthens_histories_within_an_epoch():
    dataset = make_dataset([(1000, [1000] * 4, [1] * 4) for _ in range(200)])
    dataset.index.split[:] = 0
    config = config_of(
        length=BetaLength(8, 1000, 500, 1.0, curriculum=((0.0, 40.0), (1.0, 900.0))),
        row_length=1000,
        look_ahead=50,
        epochs=1,
    )
    sizes = np.concatenate(
        [
            (b.history_end - b.history_start)[b.target_mask]
            for b, _, _ in make_input(dataset, config)
        ]
    )
    early, late = sizes[:200].mean(), sizes[-200:].mean()
    assert early < 250
    assert late > 700


def test_a_changed_dataset_or_config_is_named():
    dataset = dataset_of()
    state = next(make_input(dataset, CONFIG)).state
    changed = dataset_of()
    changed.fingerprint = {"users-0": "f" * 64}
    with pytest.raises(ValueError, match="record file users-0 is"):
        make_input(changed, CONFIG).set_state(state)
    with pytest.raises(ValueError, match=r"another input config \(row_length: 128 -> 256"):
        make_input(dataset, config_of(row_length=256)).set_state(state)
    make_input(dataset, config_of(num_threads=1, prefetch=5, epochs=9)).set_state(state)


def test_a_position_without_fields_that_came_since_takes_their_defaults():
    dataset = dataset_of()
    elements = list(make_input(dataset, CONFIG))
    state = json.loads(json.dumps(elements[2].state))
    for name in ("max_targets", "min_history", "window"):
        del state["config"][name]
    iterator = make_input(dataset, CONFIG)
    iterator.set_state(state)
    assert_same(next(iterator).batch, elements[3].batch)
    with pytest.raises(UserError, match="min_history: 0 -> 5"):
        make_input(dataset, config_of(min_history=5)).set_state(state)


@pytest.mark.parametrize("max_targets", [1, 100, 500, 10**6])
def test_samples_are_as_large_as_their_targets_allow(max_targets):
    index = dataset_of(60).index
    chosen = select_requests(index, config_of(max_targets=max_targets))
    every = select_requests(index, CONFIG)
    larger = select_requests(index, config_of(max_targets=max_targets + 50))
    assert set(chosen.request_id) <= set(larger.request_id) <= set(every.request_id)
    total = chosen.num_targets.sum()
    assert total <= max_targets or len(chosen) == 1
    assert total > max_targets - 40 or len(chosen) == len(every)  # a request has up to 40


def test_steps_are_counted_without_planning_later_epochs(monkeypatch):
    dataset = dataset_of()
    first = count_batches(dataset, CONFIG)
    planned = []
    units = Planner.units
    monkeypatch.setattr(Planner, "units", lambda self, e: planned.append(e) or units(self, e))
    assert count_steps(dataset, CONFIG, num_epochs=3) == 3 * first
    assert count_steps(dataset, CONFIG, num_epochs=3, max_steps=first + 1) == first + 1
    assert set(planned) == {0}
    packed = []
    rows = Planner.rows
    monkeypatch.setattr(Planner, "rows", lambda self, *w: packed.append(w) or rows(self, *w))
    assert count_steps(dataset, CONFIG, num_epochs=3, max_steps=2) == 2
    assert len(packed) < Planner(dataset.index, CONFIG).num_windows(0)


def test_pieces_of_one_request_are_spread_over_the_epoch():
    dataset = make_dataset([(40, [40], [2_400])])
    dataset.index.split[:] = 0
    for rows in ("request", "user"):
        first = Planner(dataset.index, config_of(rows=rows)).units(0).piece_first_target
        units = Planner(dataset.index, config_of(rows=rows)).units(0)
        order = first[units.first_piece]
        assert sorted(order) == list(range(0, 2_400, 24))
        assert (np.diff(order) == 24).mean() < 0.2


@pytest.mark.parametrize("planner", [None, 1, 99])
def test_a_position_of_another_planner_is_refused(planner):
    iterator = make_input(dataset_of(), CONFIG)
    state = {k: v for k, v in next(iterator).state.items() if k != "planner"}
    if planner is not None:
        state["planner"] = planner
    message = rf"version {planner or 1} of the input planner.*train anew in another --workdir"
    with pytest.raises(UserError, match=message):
        iterator.set_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 0}, "row_length must be at least 1, got 0"),
        ({"length": FixedLength(129)}, "up to 129 events does not fit row_length 128: shorten"),
        ({"rows": "users"}, r"rows must be one of \('request', 'user'\), got 'users'"),
        ({"split": "dev"}, "split must be one of .* got 'dev'"),
        ({"window": "random", "rows": "user"}, "needs window='suffix', got 'random'; use rows="),
        ({"targets_per_chunk": 25}, "targets_per_chunk 25 exceeds targets_per_row 24"),
        ({"epochs": 0}, "epochs must be at least 1 or None, got 0"),
        ({"num_threads": -1}, "num_threads must be at least 0, got -1"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_bad_process_counts_say_what_is_wrong():
    dataset = dataset_of()
    with pytest.raises(ValueError, match=r"rows_per_batch=4 cannot be divided among 3 processes"):
        make_input(dataset, CONFIG, process_count=3)
    with pytest.raises(ValueError, match=r"process_index must be in \[0, 2\), got 2"):
        make_input(dataset, CONFIG, process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"min_history=999 or more .* longest history has"):
        make_input(dataset, config_of(min_history=999))


def test_processes_get_near_equal_tokens():
    """Together: a row cannot be cut, so that a batch's shares may differ by one."""
    dataset = dataset_of(400)
    config = config_of(rows_per_batch=16, length=FixedLength(128))
    shares = [make_input(dataset, config, process_index=p, process_count=2) for p in range(2)]
    batches = [[next(share).batch for share in shares] for _ in range(10)]
    tokens = np.array([[b.ranges.covered(b.row_length).sum() for b in pair] for pair in batches])
    assert abs(np.diff(tokens, axis=1)).sum() / tokens.sum() < 0.05


# What a checkpoint of the first commit with version 2 of the planner held, before `max_targets`.
OLD_POSITION = """{"epoch": 0, "window": 1, "row": 2, "step": 3, "planner": 2, "config": {
"length": "UniformLength(minimum=8, maximum=64)", "row_length": 128, "targets_per_row": 24,
"rows_per_batch": 4, "rows": "request", "targets_per_chunk": null, "window": "suffix",
"split": "train", "min_history": 0, "max_requests": null, "shuffle": true, "look_ahead": 32,
"seed": 0}, "fingerprint": {"users-0":
"0000000000000000000000000000000000000000000000000000000000000000"}}"""
OLD_NEXT_REQUESTS = {0, 54, 73, 120, 144}  # of the batch that followed


def test_a_position_of_an_older_version_goes_on_where_that_would_have():
    iterator = make_input(dataset_of(), CONFIG)
    iterator.set_state(json.loads(OLD_POSITION))
    batch = next(iterator).batch
    assert set(batch.request_id[batch.target_mask].tolist()) == OLD_NEXT_REQUESTS
    older = json.loads(OLD_POSITION)
    defaults = {f.name: f.default for f in dataclasses.fields(InputConfig)}
    absent = [k for k, v in older["config"].items() if v is not None and v == defaults[k]]
    assert absent
    for name in absent:  # as if they had come since
        del older["config"][name]
    make_input(dataset_of(), CONFIG).set_state(older)
    changed = make_input(dataset_of(), config_of(max_targets=50))
    with pytest.raises(UserError, match="max_targets: None -> 50"):
        changed.set_state(json.loads(OLD_POSITION))


def test_batches_mark_the_events_that_no_training_request_asks_for(tiny_dataset, tiny_config):
    index, item = tiny_dataset.index, tiny_dataset.schema.item
    user_of = dict(zip(index.request_id.tolist(), index.record.tolist(), strict=True))
    end = index.request_time[index.split != SPLITS.index("train")].min()
    asked = set()
    for i in range(len(tiny_dataset)):
        record = tiny_dataset.record(i)
        for k in np.flatnonzero(record.request_split == SPLITS.index("train")):
            targets = slice(*record.target_offset[k : k + 2])
            asked |= {(i, record.request_time[k], x) for x in record.target[item][targets]}
    seen = collections.Counter()
    batches = make_input(tiny_dataset, tiny_config.input, with_unlabelled=True)
    for batch, _, _ in itertools.islice(batches, 2):
        for row, slot in np.argwhere(batch.target_mask):
            user = user_of[int(batch.request_id[row, slot])]
            tokens = np.s_[row, batch.history_start[row, slot] : batch.history_end[row, slot]]
            times, items = batch.history_time[tokens], batch.history[item][tokens]
            expected = [
                (user, t, x) not in asked and t < end for t, x in zip(times, items, strict=True)
            ]
            assert batch.history_unlabelled[tokens].tolist() == expected
            seen.update(expected)
    assert seen[True] > seen[False] > 0
