"""Test AUC of the true function and of counting, at several history lengths.

    python -m data.synthetic_interests.references --config=default [--data_dir=DIR]

The columns: `truth` is `true_logit` of the window, `refitted` a logistic regression on its terms,
fitted anew for each length on the training requests, `logistic` and `counting` the references of
`stca_jax.evaluation.references`, which see items and categories but no topics.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Float, Float64

from stca_jax.data.preparation import prepare
from stca_jax.data.synthetic_interests.generator import (
    CONFIGS,
    TERMS,
    GeneratorConfig,
    logit_of,
    make_catalogue,
    true_lifts,
    true_logit,
)
from stca_jax.evaluation import metrics, references, tables
from stca_jax.input.dataset import RequestDataset, RequestIndex
from stca_jax.input.records import SPLITS, UserRecord


def reference_rows(dataset: RequestDataset, lengths: Sequence[int]) -> list[tables.Row]:
    """AUC on the test requests of each reference, one row per length."""
    train, test = (
        list(references.labelled_views(dataset, dataset.index.of_split(split)))
        for split in ("train", "test")
    )
    simple = references.evaluate_references(train, test, lengths)
    auc = {(row["model"], row["length"]): row["auc"] for row in simple}
    rows: list[tables.Row] = []
    for length in lengths:
        model = references.fit_logistic(*split_lifts(dataset, "train", length))
        lifts, label = split_lifts(dataset, "test", length)
        rows.append(
            {
                "length": length,
                "truth": metrics.auc(label, logit_of(lifts)),
                "refitted": metrics.auc(label, model.logit(lifts)),
                "logistic": auc["logistic", length],
                "counting": auc["counting", length],
            }
        )
    return rows


def split_lifts(
    dataset: RequestDataset, split: str, max_history: int
) -> tuple[Float64[np.ndarray, "t terms"], Float[np.ndarray, " t"]]:
    """The lifts of all targets of a split, by user, and their labels."""
    config = GeneratorConfig(**dataset.metadata["notes"]["generator"])
    catalogue = make_catalogue(config)
    lifts, labels = [np.empty((0, len(TERMS)))], [np.empty(0)]
    for user in range(len(dataset)):
        record = dataset.record(user)
        is_in = record.request_split == SPLITS.index(split)
        targets = np.repeat(is_in, np.diff(record.target_offset))
        lifts.append(true_lifts(record, catalogue, max_history)[targets])
        labels.append(record.label[targets, 0])
    return np.concatenate(lifts), np.concatenate(labels)


def truth_rows(
    dataset: RequestDataset, requests: RequestIndex, lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """How well the labels' own function ranks, restricted to the last events of each length.

    Args:
      dataset: One of synthetic_interests.
      requests: Some of its requests, grouped by record.
      lengths: Numbers of most recent events.

    Returns:
      A row per length, without the metrics of likelihood: below the whole history the function
      ranks, but its sums shrink with the window.
    """
    config = GeneratorConfig(**dataset.metadata["notes"]["generator"])
    catalogue = make_catalogue(config)
    records = list(_records_of(dataset, requests))
    label = np.concatenate([record.label[:, 0] for record in records])
    num_targets = np.concatenate([np.diff(record.target_offset) for record in records])
    request_id = np.repeat(np.concatenate([r.request_id for r in records]), num_targets)
    user_id = np.concatenate([np.full(len(r.label), r.user_id) for r in records])
    rows: list[dict[str, Any]] = []
    for length in lengths:
        logit = [true_logit(record, catalogue, length) for record in records]
        values = metrics.ranking_metrics(
            label, np.concatenate(logit).astype(np.float32), user_id, request_id
        )
        for name in ("log_loss", "calibration", "normalized_entropy"):
            del values[name]
        rows.append({"model": "truth", "length": length, **values})
    return rows


def _records_of(dataset: RequestDataset, requests: RequestIndex) -> Iterator[UserRecord]:
    """The users' records, cut down to the requests."""
    starts = np.flatnonzero(np.diff(requests.record, prepend=-1))
    for start, end in itertools.pairwise([*starts, len(requests)]):
        record = dataset.record(int(requests.record[start]))
        chosen = requests.position[start:end]
        num_targets = np.diff(record.target_offset)
        is_chosen = np.zeros(len(num_targets), bool)
        is_chosen[chosen] = True
        targets = np.repeat(is_chosen, num_targets)
        yield dataclasses.replace(
            record,
            request_id=record.request_id[chosen],
            request_time=record.request_time[chosen],
            request_split=record.request_split[chosen],
            history_end=record.history_end[chosen],
            target_offset=np.append(0, np.cumsum(num_targets[chosen])),
            request={name: values[chosen] for name, values in record.request.items()},
            target={name: values[targets] for name, values in record.target.items()},
            label=record.label[targets],
        )


def _doubling_lengths(longest: int) -> list[int]:
    powers = itertools.takewhile(lambda n: n < longest, (2**k for k in itertools.count(4)))
    return [*powers, longest]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    options = flags.FLAGS
    dataset = RequestDataset(prepare(f"synthetic_interests/{options.config}", options.data_dir))
    lengths = [int(n) for n in options.lengths or ()]
    lengths = lengths or _doubling_lengths(CONFIGS[options.config].max_events)
    print(tables.format_table(reference_rows(dataset, lengths)))


if __name__ == "__main__":
    flags.DEFINE_enum("config", "default", list(CONFIGS), "Builder config.")
    flags.DEFINE_list("lengths", None, "History lengths; by default powers of two.")
    flags.DEFINE_string("data_dir", None, "Where prepared datasets lie; by default a cache folder.")
    app.run(main)
