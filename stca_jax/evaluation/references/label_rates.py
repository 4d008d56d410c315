"""How often targets of a user, an item or a side feature were positive before, in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Integer

from stca_jax.evaluation.references.history import UserTargets, read_targets
from stca_jax.input.dataset import RequestDataset, RequestIndex
from stca_jax.schema import Schema

USER = "user id"  # the name of the user's own rate
_PRIOR_TARGETS = 20.0  # weight of the overall rate in each rate, in targets
_DRAWN_SHARE = 0.9  # of requests with the same share of positives, where negatives are drawn


@dataclasses.dataclass(frozen=True)
class LabelHistory:
    """The training labels of one field's ids, ordered by id and time.

    Attributes:
      keys: id * 2^32 + time * 2 + label of each training target, sorted.
      positives: int32, how many of the first k have a positive label.
    """

    keys: Int64[np.ndarray, " n"]
    positives: Int32[np.ndarray, " n+1"]

    @classmethod
    def of(cls, keys: Int64[np.ndarray, " n"]) -> LabelHistory:
        """Sorts the keys in place."""
        keys.sort()
        positives = np.zeros(keys.size + 1, np.int32)
        np.cumsum(keys & 1, out=positives[1:])
        return cls(keys, positives)

    def before(
        self, ids: Int64[np.ndarray, " t"], time: Int64[np.ndarray, " t"]
    ) -> tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, " t"]]:
        """Number of the id's labels before a time, and how many of them are positive."""
        first = np.searchsorted(self.keys, ids << 32)
        last = np.searchsorted(self.keys, (ids << 32) + 2 * time)
        return last - first, self.positives[last] - self.positives[first]


@dataclasses.dataclass(frozen=True)
class LabelRates:
    """Rates of positive labels by the user and by each categorical feature of a target.

    A rate is of the training requests before the target's own. So a training target sees neither
    its own label nor those of its request or of later ones, and any other target sees all of the
    training split.

    Where negatives are drawn for positives, rates tell how they were drawn and there are none: in
    nearly all requests the same share of targets is positive, neither all nor none.

    Attributes:
      fields: The labels by field, the user first.
      overall: The rate of all training targets.
    """

    fields: Mapping[str, LabelHistory]
    overall: float

    def features(self, targets: UserTargets) -> Float32[np.ndarray, "t f"]:
        """The rate of each field, as log odds, and log1p of the number of labels it is of.

        Rates are shrunk towards the overall rate by 20 targets.
        """
        time = np.repeat(targets.view.request_time, np.diff(targets.view.target_offset))
        columns = [np.empty((len(targets.label), 0))]
        for name, ids in _ids_of(targets, self.fields):
            count, positive = self.fields[name].before(ids, time)
            rate = (positive + _PRIOR_TARGETS * self.overall) / (count + _PRIOR_TARGETS)
            columns.append(np.stack([np.log(rate) - np.log1p(-rate), np.log1p(count)], -1))
        return np.concatenate(columns, -1).astype(np.float32)


def read_label_rates(dataset: RequestDataset, training: RequestIndex, task: int) -> LabelRates:
    """Reads the labels of training requests; 12 bytes of memory for each target and field.

    Args:
      dataset: A prepared dataset.
      training: Training requests, grouped by record.
      task: Index of the label.

    Raises:
      ValueError: if the labels do not have both classes: there are no odds then.
    """
    names = (USER, *categorical_names(dataset.schema))
    size = int(training.num_targets.sum())
    keys = {name: np.empty(size, np.int64) for name in names}
    shares: list[Float64[np.ndarray, " q"]] = []
    start = num_positives = 0
    for targets in read_targets(dataset, training):
        known = targets.label[:, task] >= 0
        label = targets.label[known, task]
        time = np.repeat(targets.view.request_time, np.diff(targets.view.target_offset))[known]
        end = start + len(label)
        for name, ids in _ids_of(targets, names):
            keys[name][start:end] = (ids[known] << 32) + 2 * time + label
        offset = np.append(0, np.cumsum(known))[targets.view.target_offset]
        shares.append(_shares(label, offset))
        start, num_positives = end, num_positives + int(label.sum())
    size, keys = start, {name: values[:start] for name, values in keys.items()}
    if not 0 < num_positives < size:
        value = "negative" if num_positives == 0 else "positive"
        raise ValueError(f"all {size:,} training labels are {value}")
    if _are_drawn(np.concatenate(shares)):
        return LabelRates({}, num_positives / size)
    return LabelRates(
        {name: LabelHistory.of(values) for name, values in keys.items()}, num_positives / size
    )


def _shares(
    label: Integer[np.ndarray, " t"], offset: Integer[np.ndarray, " q+1"]
) -> Float64[np.ndarray, " q"]:
    """The share of positive labels of each request that has targets."""
    positives = np.diff(np.append(0, np.cumsum(label, dtype=np.int64))[offset])
    size = np.diff(offset)
    return positives[size > 0] / size[size > 0]


def _are_drawn(share: Float64[np.ndarray, " q"]) -> bool:
    """Whether negatives were drawn in proportion to positives."""
    values, number = np.unique(share, return_counts=True)
    most = number.argmax()
    return bool(0 < values[most] < 1 and number[most] >= _DRAWN_SHARE * len(share))


def categorical_names(schema: Schema) -> tuple[str, ...]:
    """Categorical features of a target and of its request, the target's first."""
    names = dict.fromkeys((*schema.target, *schema.request))
    return tuple(name for name in names if schema.is_categorical(name))


def _ids_of(
    targets: UserTargets, names: Iterable[str]
) -> Iterable[tuple[str, Int64[np.ndarray, " t"]]]:
    """The ids of each field, the user's for `USER`."""
    for name in names:
        if name == USER:
            yield name, np.full(len(targets.label), targets.user_id, np.int64)
        else:
            yield name, targets.columns[name].astype(np.int64)
