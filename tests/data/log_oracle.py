"""What a prepared log must hold, by plain loops over its rows; and what it does hold."""

from __future__ import annotations

import collections
import json
import pathlib

from stca_jax.input.dataset import RequestDataset
from stca_jax.input.features import Features


def expected_requests(rows, *, request_id=None, gap=0, labels=(), in_history=lambda row: True,
                      starts=()):  # fmt: skip
    """Requests of rows (dicts with user, item, time): user, time, history, targets, as values.

    Args:
      rows: Of the log.
      request_id: The column that names requests; without it, gaps in time separate them.
      gap: Seconds, at most, between targets of a request.
      labels: Columns; rows in which the first is None are no targets.
      in_history: Which rows are.
      starts: Of validation and test, as `split_starts` reads them.

    Returns:
      A counter of (user, time, history, targets); history is a tuple of sorted (time, item), and
      targets a tuple of sorted (item, *labels).
    """
    rows = [dict(t) for t in {tuple(sorted(r.items())) for r in rows}]  # equal rows are one
    by_user = collections.defaultdict(list)
    for row in rows:
        by_user[row["user"]].append(row)
    found = collections.Counter()
    for user, log in by_user.items():
        log.sort(key=lambda r: r["time"])
        shown = [r for r in log if not labels or r[labels[0]] is not None]
        groups = collections.defaultdict(list)
        last, piece = {}, collections.Counter()
        for row in shown:  # a name that comes back late, or in another split, is a new request
            name, split = request_id and row[request_id], sum(row["time"] >= s for s in starts)
            before, split_before = last.get(name, (row["time"], split))
            longest = max(gap, 6 * 3_600) if request_id else gap
            piece[name] += row["time"] - before > longest or split != split_before
            last[name] = row["time"], split
            groups[name, piece[name]].append(row)
        for group in groups.values():
            time = min(r["time"] for r in group)
            history = sorted((r["time"], r["item"]) for r in log
                             if r["time"] < time and in_history(r))  # fmt: skip
            targets = [(r["item"], *(r[n] for n in labels)) for r in group]
            found[user, time, tuple(history), tuple(sorted(targets))] += 1
    return found


def prepared_requests(folder: pathlib.Path):
    """The same, read from the record files; without users, whose ids records do not keep."""
    dataset = RequestDataset(folder)
    ids = feature_ids(folder, "item")
    value = {encoded: item for item, encoded in ids.items()}
    assert len(value) == len(ids)  # a test's items all have ids of their own
    origin = dataset.metadata["time_origin"]
    found = collections.Counter()
    for u in range(len(dataset)):
        record = dataset.record(u)
        for k, (time, end) in enumerate(zip(record.request_time, record.history_end, strict=True)):
            history = zip(record.event_time[:end] + origin, record.history["item"][:end],
                          strict=True)  # fmt: skip
            t = slice(*record.target_offset[k : k + 2])
            targets = [
                (value[item], *map(int, label))
                for item, label in zip(record.target["item"][t], record.label[t], strict=True)
            ]
            history = sorted((int(time), value[item]) for time, item in history)
            found[int(time) + origin, tuple(history), tuple(sorted(targets))] += 1
    return found


def feature_ids(folder: pathlib.Path, name: str):
    """The id of each item, or of each value of another feature that has an id of its own."""
    features = Features.read(folder / "features")
    if name == "item":
        return dict(
            zip(features.items.ids.tolist(), features.items.columns[name].tolist(), strict=True)
        )
    return {value: k for k, value in enumerate(features.encoders[name].known.tolist())}


def split_starts(folder: pathlib.Path):
    """Where validation and test begin, as `expected_requests` takes them."""
    metadata = RequestDataset(folder).metadata
    return [metadata["time_origin"] + metadata[n] for n in ("validation_start", "test_start")]


def without_user(requests):
    """Drops the user from what `expected_requests` gives."""
    found = collections.Counter()
    for (_, *rest), count in requests.items():
        found[tuple(rest)] += count
    return found


def digests(folder: pathlib.Path):
    """SHA-256 of each record file."""
    files = json.loads((folder / "metadata.json").read_text())["record_files"]
    return {name: description["sha256"] for name, description in files.items()}
