"""What simple references reach on the requests that a run is scored on."""

from __future__ import annotations

import dataclasses

from stca_jax.data.synthetic_interests.references import truth_rows
from stca_jax.evaluation.evaluator import Row
from stca_jax.evaluation.references import evaluate_references, labelled_views
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import select_requests

_TRAINING_REQUESTS = 12_000


def reference_rows(config: ExperimentConfig, dataset: RequestDataset, split: str) -> list[Row]:
    """All references at every length, on the targets that the model is scored on."""
    settings = config.evaluation
    scored = select_requests(
        dataset.index,
        config.input.for_evaluation(
            split,
            max(settings.lengths),
            min_history=settings.min_history,
            max_requests=settings.max_requests,
        ),
    )
    train = select_requests(
        dataset.index,
        dataclasses.replace(config.input, split="train", max_requests=_TRAINING_REQUESTS),
    )
    rows: list[Row] = []
    for k, task in enumerate(dataset.schema.tasks):
        named = {"task": task} if len(dataset.schema.tasks) > 1 else {}
        for row in evaluate_references(
            labelled_views(dataset, train, task=k),
            labelled_views(dataset, scored, task=k),
            settings.lengths,
        ):
            rows.append({**row, **named})
    rows.sort(key=lambda row: row["model"])
    if config.dataset.startswith("synthetic_interests"):
        rows += truth_rows(dataset, scored, settings.lengths)
    return rows
