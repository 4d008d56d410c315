"""Exact ranking and calibration metrics over flat arrays of predictions.

Every metric takes one label and one score for each target, in any order, without padding. NumPy
only; a million predictions take tens of milliseconds, whatever the number of users or requests.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt64

from stca_jax.errors import UserError
from stca_jax.evaluation.ranks import GROUP_BITS, GroupedAuc, mean_auc, ordered_bits, sort_keys
from stca_jax.imports import find_path, import_object

Labels = Shaped[np.ndarray, " n"]
Scores = Float[np.ndarray, " n"]
Groups = Integer[np.ndarray, " n"]


def auc(label: Labels, score: Scores) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties counting half.

    Args:
      label: [n] of 0 or 1, any dtype.
      score: [n] floats, compared as float32; infinities are ranked, NaN is refused.

    Returns:
      The exact area, or NaN if all labels are equal.

    Raises:
      ValueError: on empty input, shapes that differ, NaN scores or labels other than 0 and 1.
    """
    return mean_auc(sort_keys(*_checked(label, score))).value


def auc_standard_error(label: Labels, score: Scores, group: Groups) -> float:
    """Standard error of `auc` over samples of groups, whose targets may depend on each other.

    DeLong's estimate (1988) with Obuchowski's sums over clusters (1997): with a group for each
    target it is DeLong's.

    Args:
      label: [n] of 0 or 1, any dtype.
      score: [n] floats, compared as float32.
      group: [n] integers, such as the user of each target.

    Returns:
      The error, or NaN if fewer than two groups have a positive, or a negative.

    Raises:
      ValueError: as for `grouped_auc`.
    """
    label, score = _checked(label, score)
    cluster = np.unique(_checked_groups(group, label), return_inverse=True)[1]
    _, value, size = np.unique(
        ordered_bits(score.astype(np.float32)), return_inverse=True, return_counts=True
    )
    positive = np.bincount(value, label, size.size)
    negative = size - positive
    twice_lower = 2 * np.cumsum(negative) - negative  # negatives below, ties counting half
    twice_higher = 2 * (label.sum() - np.cumsum(positive)) + positive

    num = [np.bincount(cluster, side) for side in (label, ~label)]
    total = [n.sum() for n in num]
    groups = [np.count_nonzero(n) for n in num]
    if min(groups) < 2:
        return float("nan")
    # Of each side: pairs that the targets of a group win, less what is expected of so many.
    pairs = [twice_lower[value] * label, twice_higher[value] * ~label]
    won = [np.bincount(cluster, p) / 2 / other for p, other in zip(pairs, total[::-1], strict=True)]
    area = won[0].sum() / total[0]
    excess = [(w - n * area) / t for w, n, t in zip(won, num, total, strict=True)]
    variance = sum(k / (k - 1) * e @ e for k, e in zip(groups, excess, strict=True))
    k = num[0].size
    return float(np.sqrt(variance + 2 * k / (k - 1) * (excess[0] @ excess[1])))


def grouped_auc(label: Labels, score: Scores, group: Groups) -> GroupedAuc:
    """AUC inside each group (a user, a request), averaged with the group's size as its weight.

    Groups whose labels are all equal have no AUC: they are left out and counted. Any number of
    groups costs one sort, or two if their ids span 2**31 or more.

    Args:
      label: [n] of 0 or 1, any dtype.
      score: [n] floats, compared as float32.
      group: [n] integers, in any order and of any values.

    Returns:
      The mean with the counts needed to judge it.

    Raises:
      ValueError: as for `auc`, or if `group` has another shape or is not of integers.
    """
    label, score = _checked(label, score)
    return mean_auc(sort_keys(label, score, _small_ids(_checked_groups(group, label))))


def log_loss(label: Labels, logit: Scores) -> float:
    """Mean binary cross-entropy in nats, from logits so that no probability saturates.

    Args:
      label: [n] of 0 or 1, any dtype.
      logit: [n] floats; the computation is in float64.

    Returns:
      The mean; infinite if an infinite logit is on the wrong side.

    Raises:
      ValueError: on empty input, shapes that differ, NaN logits or labels other than 0 and 1.
    """
    label, logit = _checked(label, logit)
    logit = logit.astype(np.float64)
    return float(np.logaddexp(0.0, np.where(label, -logit, logit)).mean())


def calibration(label: Labels, logit: Scores) -> float:
    """Sum of predicted probabilities over the number of positives: 1 is calibrated, above is high.

    Args:
      label: [n] of 0 or 1, any dtype.
      logit: [n] floats; the computation is in float64.

    Returns:
      The ratio, or NaN without positives.

    Raises:
      ValueError: on empty input, shapes that differ, NaN logits or labels other than 0 and 1.
    """
    label, logit = _checked(label, logit)
    # exp(-softplus(-z)) is the sigmoid, without the overflow of exp(-z) at very negative logits.
    predicted = np.exp(-np.logaddexp(0.0, -(logit.astype(np.float64)))).sum()
    return float(predicted / label.sum()) if label.any() else float("nan")


def normalized_entropy(label: Labels, logit: Scores) -> float:
    """Log loss over that of always predicting the base rate: below 1 is better than the base rate.

    Args:
      label: [n] of 0 or 1, any dtype.
      logit: [n] floats; the computation is in float64.

    Returns:
      The ratio, or NaN if all labels are equal, when the base rate has no entropy.

    Raises:
      ValueError: on empty input, shapes that differ, NaN logits or labels other than 0 and 1.
    """
    loss = log_loss(label, logit)
    rate = np.asarray(label).astype(np.float64).mean()
    if rate in (0.0, 1.0):
        return float("nan")
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


class ScoredTargets(NamedTuple):
    """One set of predictions: what a metric is a function of.

    Attributes:
      label: [n] of 0 or 1, any dtype.
      logit: [n] floats.
      user_id: [n] integers.
      request_id: [n] integers that differ between the requests of all users.
    """

    label: Labels
    logit: Scores
    user_id: Groups
    request_id: Groups


# The columns of a result table; those of one's own come after them, see `own_metrics`.
Metric = Callable[[ScoredTargets], float | GroupedAuc]
METRICS: dict[str, Metric] = {
    "auc": lambda t: auc(t.label, t.logit),
    "auc_se": lambda t: auc_standard_error(t.label, t.logit, t.user_id),
    "gauc_user": lambda t: grouped_auc(t.label, t.logit, t.user_id),
    "gauc_request": lambda t: grouped_auc(t.label, t.logit, t.request_id),
    "log_loss": lambda t: log_loss(t.label, t.logit),
    "calibration": lambda t: calibration(t.label, t.logit),
    "normalized_entropy": lambda t: normalized_entropy(t.label, t.logit),
}
# Of the metrics, those that a better model has less of, and those that rank no models at all.
SMALLER_IS_BETTER = frozenset({"log_loss", "normalized_entropy"})
NOT_COMPARABLE = frozenset({"auc_se", "calibration"})
# What a row of metrics counts besides.
COUNTS = (
    "num_targets",
    "num_positives",
    "num_users",
    "num_requests",
    "one_class_users",
    "one_class_requests",
)


def own_metrics(paths: Sequence[str]) -> dict[str, Metric]:
    """Functions of `ScoredTargets`, by name, that import paths or registered names stand for.

    Raises:
      UserError: there is no such function, or its name is taken.
    """
    found: dict[str, Metric] = {}
    for path in paths:
        metric = import_object(path)
        name = (find_path(path) or path).rpartition(":")[2]
        if not callable(metric):
            raise UserError(f"{path} is no function")
        if name in METRICS or name in COUNTS or name in found:
            raise UserError(f"{path}: there is a metric {name!r} already; give it another name")
        found[name] = metric
    return found


def check_choice(metric: str, *, larger_is_better: bool, own: Sequence[str] = ()) -> None:
    """Checks that checkpoints can be chosen by a metric.

    Args:
      metric: Its name.
      larger_is_better: Whether the largest value is the best.
      own: Import paths of further metrics.

    Raises:
      ValueError: it is unknown, orders no models, as counts and calibration, or the other way.
    """
    known = [name for name in METRICS if name not in NOT_COMPARABLE] + [*own_metrics(own)]
    if metric not in known:
        why = "is best near 1, not at either end" if metric == "calibration" else "ranks no models"
        is_column = metric in METRICS or metric in COUNTS
        raise ValueError(
            f"metric is {metric!r}, which {why if is_column else 'is no metric'}; it must be one "
            f"of {', '.join(known)}"
        )
    if larger_is_better and metric in SMALLER_IS_BETTER:
        raise ValueError(f"a smaller {metric} is better: set larger_is_better=false beside it")


def ranking_metrics(
    label: Labels,
    logit: Scores,
    user_id: Groups,
    request_id: Groups,
    *,
    own: Sequence[str] = (),
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, float]:
    """All metrics of one set of predictions, as one row of a result table.

    Ranking uses the float32 logit: probabilities near 0 or 1 round to ties that the model did not
    make.

    Args:
      label: [n] of 0 or 1, any dtype.
      logit: [n] floats.
      user_id: [n] integers.
      request_id: [n] integers that differ between the requests of all users.
      own: import paths of further metrics.
      on_failure: called with the name and the error of each metric that fails, which is then left
        out of the row; None raises the error.

    Returns:
      The values of `METRICS` and of one's own, in their order; then the counts `num_targets`,
      `num_positives`, and of users and of requests `num_users`, `num_requests`, with
      `one_class_users` and `one_class_requests` which grouped AUCs leave out.

    Raises:
      ValueError: as for `auc` and `grouped_auc`, without `on_failure`.
    """
    values: dict[str, float] = {}
    counts = {"num_targets": np.size(label), "num_positives": int(np.count_nonzero(label))}
    targets = ScoredTargets(label, logit, user_id, request_id)
    for name, metric in (METRICS | own_metrics(own)).items():
        try:
            value = metric(targets)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            continue
        if isinstance(value, GroupedAuc):
            groups = name.removeprefix("gauc_") + "s"
            counts |= {
                f"num_{groups}": value.num_groups,
                f"one_class_{groups}": value.num_one_class_groups,
            }
            value = value.value
        values[name] = value
    return {**values, **counts}


def _checked(label: Labels, score: Scores) -> tuple[Bool[np.ndarray, " n"], Scores]:
    """Returns the label as booleans and the score as an array, or raises ValueError."""
    label, score = np.asarray(label), np.asarray(score)
    if label.ndim != 1 or label.shape != score.shape:
        raise ValueError(
            f"label has shape {list(label.shape)} and score {list(score.shape)}, expected both "
            "[n]: flatten them and drop padding with the same mask."
        )
    if label.size == 0:
        raise ValueError("No targets, expected at least one: was everything masked as padding?")
    positive = label == 1
    if not (positive | (label == 0)).all():
        other = label[~(positive | (label == 0))][0]
        raise ValueError(f"A label is {other}, expected 0 or 1: binarise the labels first.")
    if np.isnan(score).any():
        raise ValueError(
            f"{np.isnan(score).sum()} of {score.size} scores are NaN, expected numbers: the model "
            "diverged, or padded targets were kept."
        )
    return positive, score


def _checked_groups(group: Groups, label: Bool[np.ndarray, " n"]) -> Groups:
    """Returns the groups as an array, or raises ValueError."""
    group = np.asarray(group)
    if group.shape != label.shape or group.dtype.kind not in "iu":
        raise ValueError(
            f"group is {group.dtype}{list(group.shape)}, expected integers of shape "
            f"{list(label.shape)}: pass the integer id of each target's user or request."
        )
    return group


def _small_ids(group: Groups) -> UInt64[np.ndarray, " n"]:
    """Returns integers whose low bits, as many as a sort key has for the group, tell groups apart.

    Ids less than 2**31 apart differ in their low 31 bits, whatever their sign; others are numbered.
    """
    if int(group.max()) - int(group.min()) >> GROUP_BITS:
        group = np.unique(group, return_inverse=True)[1]
    return group.astype(np.uint64)
