"""Test AUC of the true function and of counting, at several history lengths.

    python -m data.synthetic_interests.references --config=default [--data_dir=DIR]

The columns: `truth` is `true_logit` of the window, `refitted` a logistic regression on its terms,
fitted anew for each length on the training requests, `logistic` and `counting` the references of
`stca_jax.evaluation.references`, which see items and categories but no topics.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from jaxtyping import Float, Float64

from data.preparation import prepare
from data.synthetic_interests.generator import (
    CONFIGS,
    TERMS,
    GeneratorConfig,
    logit_of,
    make_catalogue,
    true_lifts,
)
from stca_jax.evaluation import metrics, references, tables
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import SPLITS


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
