"""Scores targets with every reference: counting, logistic regression, gradient-boosted trees."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8

from stca_jax.evaluation import metrics
from stca_jax.evaluation.references import boosted
from stca_jax.evaluation.references.features import count_features, match_features, repeat_counts
from stca_jax.evaluation.references.history import UserTargets, read_targets
from stca_jax.evaluation.references.label_rates import (
    LabelRates,
    categorical_names,
    read_label_rates,
)
from stca_jax.evaluation.references.logistic import LogisticModel, fit_logistic
from stca_jax.evaluation.tables import Row
from stca_jax.files import replacing
from stca_jax.input.dataset import RequestDataset, RequestIndex
from stca_jax.schema import Schema

Model = LogisticModel | boosted.BoostedTrees
_LIKELIHOODS = ("log_loss", "calibration", "normalized_entropy")
# Label rates are of so many training targets: 12 bytes of memory for each, and for each field.
_MAX_RATE_TARGETS = 10_000_000
_CACHE_VERSION = 1  # raise it when features or fits change
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReferenceOptions:
    """How the references are fitted.

    Attributes:
      max_training_targets: Fit on so many training targets, whole requests drawn at random once;
        None takes all.
      boosting: Size of the trees and of the steps.
    """

    max_training_targets: int | None = 300_000
    boosting: boosted.BoostingOptions = boosted.BoostingOptions()


def evaluate_references(
    dataset: RequestDataset,
    training: RequestIndex,
    scored: RequestIndex,
    lengths: Sequence[int],
    options: ReferenceOptions = ReferenceOptions(),
    report: Callable[[str], None] = _log.warning,
) -> list[Row]:
    """Scores targets with every reference at each length.

    Fits are kept in the dataset's folder, for each length, task and setting, and used again.

    Args:
      dataset: A prepared dataset.
      training: Its training requests, to fit the references on, grouped by record.
      scored: The requests to score, grouped by record.
      lengths: Numbers of most recent events to look at.
      options: How the references are fitted.
      report: Called with a sentence on what the references are of, and for each one that cannot be
        fitted; the others are scored all the same.

    Returns:
      Rows with `model` ("counting", "logistic" or "boosted"), `length`, `task` if there are
      several, and the values of `metrics.ranking_metrics`. Counts are no logits, so "counting" has
      ranking metrics only.

    Raises:
      ValueError: if a length is below 1 or there is nothing to score.
    """
    kinds = ["logistic"]
    if boosted.is_installed():
        kinds.append("boosted")
    else:
        report(boosted.HOW_TO_INSTALL)
    sample = _sample(training, options.max_training_targets)
    report(
        f"{' and '.join(kinds)} are fitted on {sample.num_targets.sum():,} of "
        f"{training.num_targets.sum():,} training targets"
    )
    rows: list[Row] = []
    for task, name in enumerate(dataset.schema.tasks):
        named = {"task": name} if len(dataset.schema.tasks) > 1 else {}
        of_task = f" for {name}" if named else ""
        rates, models = None, {}
        try:
            rates = read_label_rates(dataset, _sample(training, _MAX_RATE_TARGETS), task)
        except ValueError as error:
            report(f"{' and '.join(kinds)} cannot be fitted{of_task}: {error}")
        if rates is not None:
            fits = _Fits(dataset, training, sample, task, rates, options)
            for length in lengths:
                for kind in kinds:
                    try:
                        models[kind, length] = fits.model(kind, length)
                    except Exception as error:  # a reference never keeps the model's row away
                        report(f"{kind} cannot be fitted at length {length:,}{of_task}: {error}")
        rows += [{**row, **named} for row in _score(dataset, scored, lengths, task, rates, models)]
    return rows


def features_of(
    kind: str, targets: UserTargets, rates: LabelRates, schema: Schema, lengths: Sequence[int]
) -> dict[int, Float32[np.ndarray, "t f"]]:
    """What a reference sees of the targets of one user at each length.

    Args:
      kind: "logistic": `count_features`, then the label rates. "boosted": `match_features`, the
        numbers and the ids of the target and of its request but for the item, the label rates.
      targets: The targets.
      rates: Of the training split.
      schema: Of the dataset.
      lengths: Numbers of most recent events to look at.
    """
    known = [rates.features(targets)]
    if kind == "logistic":
        counted = count_features(targets.view, lengths)
    else:
        counted = match_features(targets.view, lengths)
        names = [*_number_names(schema), *_id_names(schema)]
        known[:0] = [targets.columns[name].astype(np.float32)[:, None] for name in names]
    return {n: np.concatenate([values, *known], -1) for n, values in counted.items()}


def _id_names(schema: Schema) -> list[str]:
    return [name for name in categorical_names(schema) if name != schema.item]


def _number_names(schema: Schema) -> list[str]:
    names = dict.fromkeys((*schema.target, *schema.request))
    return [name for name in names if not schema.is_categorical(name)]


class _Fits:
    """Fitted references of one task, kept in the dataset's folder."""

    def __init__(
        self,
        dataset: RequestDataset,
        training: RequestIndex,
        sample: RequestIndex,
        task: int,
        rates: LabelRates,
        options: ReferenceOptions,
    ):
        self._dataset, self._sample, self._task = dataset, sample, task
        self._rates, self._options = rates, options
        self._identity = [
            _CACHE_VERSION,
            dataset.fingerprint,
            *(hashlib.sha256(r.request_id.tobytes()).hexdigest() for r in (training, sample)),
            task,
        ]

    def model(self, kind: str, length: int) -> Model:
        """The fit, read from the folder or made and written there."""
        identity = [*self._identity, kind, length]
        if kind == "boosted":
            identity += [dataclasses.asdict(self._options.boosting), boosted.version()]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = self._dataset.directory / "references" / f"{kind}-{length}-{digest}"
        if (text := _read(path)) is None:
            model = self._fit(kind, length)
            text = _to_text(model)
            _write(path, text)
        return _from_text(kind, text)

    def _fit(self, kind: str, length: int) -> Model:
        schema, size = self._dataset.schema, int(self._sample.num_targets.sum())
        features, label, user = np.empty((0, 0)), np.empty(size, np.int8), np.empty(size, np.int32)
        start = 0
        for targets in read_targets(self._dataset, self._sample):
            found = features_of(kind, targets, self._rates, schema, [length])[length]
            if not features.size:
                features = np.empty((size, found.shape[1]), np.float32)
            rows = slice(start, start + len(found))
            features[rows], label[rows] = found, targets.label[:, self._task]
            user[rows] = targets.user_id
            start += len(found)
        known = label >= 0
        features, label, user = features[known], label[known], user[known]
        if kind == "logistic":
            return fit_logistic(features, label)
        is_categorical = np.zeros(features.shape[1], bool)
        first = 7 * len(schema.match_fields) + 1 + len(_number_names(schema))
        is_categorical[first : first + len(_id_names(schema))] = True
        return boosted.fit_boosted(features, label, user, is_categorical, self._options.boosting)


def _score(
    dataset: RequestDataset,
    scored: RequestIndex,
    lengths: Sequence[int],
    task: int,
    rates: LabelRates | None,
    models: Mapping[tuple[str, int], Model],
) -> list[Row]:
    """A row for counting at each length, and for each model."""
    scores: dict[tuple[str, int], list[np.ndarray]] = {}
    labels: list[Int8[np.ndarray, " t"]] = []
    users, requests = [], []
    for targets in read_targets(dataset, scored):
        labels.append(targets.label[:, task])
        users.append(np.full(len(targets.label), targets.user_id))
        requests.append(targets.request_id)
        for length, count in repeat_counts(targets.view, lengths).items():
            scores.setdefault(("counting", length), []).append(count)
        for kind in {kind for kind, _ in models}:
            assert rates is not None
            features = features_of(kind, targets, rates, dataset.schema, lengths)
            for length in lengths:
                if (kind, length) in models:
                    logit = models[kind, length].logit(features[length])
                    scores.setdefault((kind, length), []).append(logit)
    if not labels:
        raise ValueError("No requests, expected at least one: was the split empty?")
    label, user, request = (np.concatenate(values) for values in (labels, users, requests))
    known = label >= 0
    label, user, request = label[known], user[known], request[known]
    rows: list[Row] = []
    for (kind, length), parts in scores.items():
        values = metrics.ranking_metrics(label, np.concatenate(parts)[known], user, request)
        if kind == "counting":
            for name in _LIKELIHOODS:
                del values[name]
        rows.append({"model": kind, "length": length, **values})
    return rows


def _sample(requests: RequestIndex, max_targets: int | None) -> RequestIndex:
    """Whole requests with at most so many targets, but one at least; the same at each call."""
    if max_targets is None or requests.num_targets.sum() <= max_targets:
        return requests
    order = np.random.default_rng(0).permutation(len(requests))
    size = np.cumsum(requests.num_targets[order], dtype=np.int64)
    fitting = max(int(np.searchsorted(size, max_targets, side="right")), 1)
    return requests.select(np.sort(order[:fitting]))


def _to_text(model: Model) -> str:
    if isinstance(model, boosted.BoostedTrees):
        return model.text
    return json.dumps({name: np.asarray(v).tolist() for name, v in vars(model).items()})


def _from_text(kind: str, text: str) -> Model:
    if kind == "boosted":
        return boosted.BoostedTrees(text)
    values: dict[str, Any] = {n: np.asarray(v) for n, v in json.loads(text).items()}
    return LogisticModel(**values)


def _read(path: pathlib.Path) -> str | None:
    """What `_write` wrote, or None if it is not there or not whole."""
    try:
        digest, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if digest == hashlib.sha256(text.encode()).hexdigest() else None


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a text with its hash; a folder that cannot be written keeps nothing."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
