"""Test AUC of the true function and of counting, at several history lengths.

    python -m data.synthetic_interests.references --config=default

The columns: `truth` is `true_logit` of the window, `refitted` a logistic regression on its terms,
fitted anew for each length on the training requests, `logistic` and `counting` the references of
`stca_jax.evaluation.references`, which see items and categories but no topics.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from absl import app, flags

from data.synthetic_interests.generator import (
    CONFIGS,
    Catalogue,
    generate_users,
    make_catalogue,
    true_lifts,
    true_logit,
)
from stca_jax.evaluation import metrics, references, tables
from stca_jax.input.records import SPLITS, UserRecord

_CONFIG = flags.DEFINE_enum("config", "default", list(CONFIGS), "Builder config.")
_LENGTHS = flags.DEFINE_list("lengths", None, "History lengths; by default powers of two.")


def reference_rows(
    records: Sequence[UserRecord], catalogue: Catalogue, lengths: Sequence[int]
) -> list[tables.Row]:
    """AUC on the test requests of each reference, one row per length."""
    train, test = (_targets_of(records, split) for split in ("train", "test"))
    label = [np.concatenate([r.label[:, 0] for r in records])[rows] for rows in (train, test)]
    rows = references.evaluate_references(
        list(_views(records, "train")), list(_views(records, "test")), lengths
    )
    simple = {(row["model"], row["length"]): row["auc"] for row in rows}
    table: list[tables.Row] = []
    for length in lengths:
        lifts = np.concatenate([true_lifts(r, catalogue, length) for r in records])
        logit = np.concatenate([true_logit(r, catalogue, length) for r in records])
        refitted = references.fit_logistic(lifts[train], label[0]).logit(lifts[test])
        table.append(
            {
                "length": length,
                "truth": metrics.auc(label[1], logit[test]),
                "refitted": metrics.auc(label[1], refitted),
                "logistic": simple["logistic", length],
                "counting": simple["counting", length],
            }
        )
    return table


def _targets_of(records: Sequence[UserRecord], split: str) -> np.ndarray:
    """Which targets of all records belong to requests of the split."""
    return np.concatenate([_in_split(r, split) for r in records])


def _in_split(record: UserRecord, split: str) -> np.ndarray:
    is_in = record.request_split == SPLITS.index(split)
    return np.repeat(is_in, np.diff(record.target_offset))


def _views(records: Sequence[UserRecord], split: str) -> Iterator[references.LabelledView]:
    """The users' requests of a split, as the references read them."""
    for record in records:
        requests = record.request_split == SPLITS.index(split)
        if requests.any():
            targets = _in_split(record, split)
            num_targets = np.diff(record.target_offset)[requests]
            yield (
                references.HistoryView(
                    event_ids=record.history,
                    event_time=record.event_time.astype(np.int64),
                    history_end=record.history_end[requests],
                    request_time=record.request_time[requests].astype(np.int64),
                    target_offset=np.append(0, np.cumsum(num_targets)),
                    target_ids={n: v[targets] for n, v in record.target.items()},
                ),
                record.label[targets, 0],
            )


def _doubling_lengths(longest: int) -> list[int]:
    powers = itertools.takewhile(lambda n: n < longest, (2**k for k in itertools.count(4)))
    return [*powers, longest]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    config = CONFIGS[_CONFIG.value]
    lengths = [int(n) for n in _LENGTHS.value or ()] or _doubling_lengths(config.max_events)
    records = list(generate_users(config))
    print(tables.format_table(reference_rows(records, make_catalogue(config), lengths)))


if __name__ == "__main__":
    app.run(main)
