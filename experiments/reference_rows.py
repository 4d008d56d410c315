"""What simple references reach on the requests that a run is scored on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from stca_jax.data.synthetic_interests.truth import truth_rows
from stca_jax.evaluation.evaluator import selection_limits
from stca_jax.evaluation.references.scoring import ReferenceOptions, evaluate_references
from stca_jax.evaluation.tables import Row
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import select_requests


def reference_rows(
    config: ExperimentConfig,
    dataset: RequestDataset,
    split: str,
    options: ReferenceOptions | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """All references at every length, on the targets that the model is scored on.

    Args:
      config: Of the run: the requests it trains on, and those that are scored.
      dataset: The run's.
      split: Whose requests are scored.
      options: How the references are fitted; None is the default.
      report: Called with what the references are of, and why one is missing.
    """
    settings = config.evaluation
    scored = select_requests(
        dataset.index,
        config.input.for_evaluation(
            split,
            max(settings.lengths),
            **selection_limits(settings),
        ),
    )
    training = select_requests(dataset.index, dataclasses.replace(config.input, split="train"))
    rows = evaluate_references(
        dataset,
        training,
        scored,
        settings.lengths,
        options=options or ReferenceOptions(),
        report=report,
    )
    rows.sort(key=lambda row: row["model"])
    if config.dataset.startswith("synthetic_interests"):
        rows += truth_rows(dataset, scored, settings.lengths)
    return rows
