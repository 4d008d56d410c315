"""The function that the labels were drawn from, and how well it and simple references rank.

    python -m stca_jax.data.synthetic_interests.truth --config=default [--data_dir=DIR]

prints the AUC of the test requests at several history lengths. The columns: `truth` is the true
function of the window, `refitted` a logistic regression on its terms, fitted anew for each length
on the training requests; `counting`, `logistic` and `boosted` are the references of
`stca_jax.evaluation.references`, which see items and categories but nothing that is hidden. For
`latent`, `rank 8` … are the refitted truth that knows the first dimensions of the vectors only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Float, Float64

from stca_jax.data.preparation import prepare
from stca_jax.data.synthetic_interests import generator, latent
from stca_jax.evaluation import metrics, tables
from stca_jax.evaluation.references.logistic import fit_logistic
from stca_jax.evaluation.references.scoring import evaluate_references
from stca_jax.input.dataset import RequestDataset, RequestIndex
from stca_jax.input.records import SPLITS, UserRecord

CONFIGS = {**generator.CONFIGS, **latent.LATENT_CONFIGS}
_RANKS = (8, 16, 32, 48)


@dataclasses.dataclass(frozen=True)
class Truth:
    """A known function: the weighted sum of its terms.

    Attributes:
      names: What each term is of.
      weights: Of the terms in the logit.
      bias: Of the logit.
      lifts: The terms [t, terms] of a record's targets over its last events, so many or all.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    lifts: Callable[[UserRecord, int | None], Float64[np.ndarray, "t terms"]]

    def logit(
        self, record: UserRecord, max_history: int | None = None
    ) -> Float64[np.ndarray, " t"]:
        """The function of each target, over the window's events."""
        return self.lifts(record, max_history) @ self.weights + self.bias


def truth_of(dataset: RequestDataset, rank: int | None = None) -> Truth:
    """The function that a dataset's labels were drawn from.

    Args:
      dataset: One of synthetic_interests.
      rank: Of `latent`, know so many of the dimensions only.
    """
    notes = dataset.metadata["notes"]
    if "latent" in notes:
        config = latent.LatentConfig(**notes["latent"])
        items = latent.make_latent_catalogue(config)
        items = items if rank is None else items.projected(rank)
        return Truth(
            tuple(f"similarity {_period(days)}" for days in latent.TERMS),
            tuple(latent.TERMS.values()),
            latent.BIAS,
            lambda record, n: latent.latent_lifts(record, items, n),
        )
    catalogue = generator.make_catalogue(generator.GeneratorConfig(**notes["generator"]))
    return Truth(
        tuple(f"{term.field} {_period(term.decay_days)}" for term in generator.TERMS),
        tuple(term.weight for term in generator.TERMS),
        generator.BIAS,
        lambda record, n: generator.true_lifts(record, catalogue, n),
    )


def reference_rows(dataset: RequestDataset, lengths: Sequence[int]) -> list[tables.Row]:
    """AUC on the test requests of each reference, one row per length."""
    train, test = (dataset.index.of_split(split) for split in ("train", "test"))
    simple = evaluate_references(dataset, train, test, lengths)
    auc = {(row["model"], row["length"]): row["auc"] for row in simple}
    models = dict.fromkeys(row["model"] for row in reversed(simple))
    truth = truth_of(dataset)
    ranks = _RANKS if "latent" in dataset.metadata["notes"] else ()
    rows: list[tables.Row] = []
    for length in lengths:
        lifts, label = split_lifts(dataset, truth, "test", length)
        logit = (lifts @ truth.weights).astype(np.float32)
        row = {"length": length, "truth": metrics.auc(label, logit)}
        row["refitted"] = _refitted(dataset, truth, length)
        for rank in ranks:
            row[f"rank {rank}"] = _refitted(dataset, truth_of(dataset, rank), length)
        rows.append(row | {model: auc[model, length] for model in models})
    return rows


def _refitted(dataset: RequestDataset, truth: Truth, length: int) -> float:
    """Test AUC of a logistic regression on the terms of a function."""
    model = fit_logistic(*split_lifts(dataset, truth, "train", length))
    lifts, label = split_lifts(dataset, truth, "test", length)
    return metrics.auc(label, model.logit(lifts))


def _period(days: float) -> str:
    return "all" if np.isinf(days) else f"{days:g} d"


def split_lifts(
    dataset: RequestDataset, truth: Truth, split: str, max_history: int
) -> tuple[Float64[np.ndarray, "t terms"], Float[np.ndarray, " t"]]:
    """The terms of all targets of a split, by user, and their labels."""
    lifts, labels = [np.empty((0, len(truth.names)))], [np.empty(0)]
    for user in range(len(dataset)):
        record = dataset.record(user)
        is_in = record.request_split == SPLITS.index(split)
        targets = np.repeat(is_in, np.diff(record.target_offset))
        lifts.append(truth.lifts(record, max_history)[targets])
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
    truth = truth_of(dataset)
    records = list(records_of(dataset, requests))
    label = np.concatenate([record.label[:, 0] for record in records])
    num_targets = np.concatenate([np.diff(record.target_offset) for record in records])
    request_id = np.repeat(np.concatenate([r.request_id for r in records]), num_targets)
    user_id = np.concatenate([np.full(len(r.label), r.user_id) for r in records])
    rows: list[dict[str, Any]] = []
    for length in lengths:
        logit = [truth.logit(record, length) for record in records]
        values = metrics.ranking_metrics(
            label, np.concatenate(logit).astype(np.float32), user_id, request_id
        )
        for name in ("log_loss", "calibration", "normalized_entropy"):
            del values[name]
        rows.append({"model": "truth", "length": length, **values})
    return rows


def records_of(dataset: RequestDataset, requests: RequestIndex) -> Iterator[UserRecord]:
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
