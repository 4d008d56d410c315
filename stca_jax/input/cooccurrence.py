"""Which ids occur together in histories, factorised: what embedding tables can start from.

A request has a few labels and thousands of events; what is similar to what is in the events.

    events of a user   a a b | c d | b e        pairs: of one moment, or of neighbours
    counts             n_ab = 2, n_cd = 1, …    of all users, in training time
    weights            max(0, log(n_ab n / (n_a n_b^.75 …)))   (pointwise mutual information)
    rows               U sqrt(S) of its singular value decomposition, of unit length

Of the singular values is kept what stands out of the noise, s -> sqrt(s^2 - e^2), which is optimal
for white noise whose largest is e (Gavish and Donoho, arXiv 1405.7511); the noise is taken to be
what `width` dimensions leave.

**No label enters.**  An event that is a target of a training request (same user, time and item) is
left out of every count, and so is everything from the first validation request on.  The loss of a
request therefore never sees statistics of its own targets, nor of any other's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
from jaxtyping import Float, Int

from stca_jax.files import replacing
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import unlabelled_events

_MOST_ROWS = 2**18  # the most frequent ids of a larger vocabulary; the others have none
_MOST_ENTRIES = 2**25  # of a count matrix; beyond it, the rarest pairs are dropped
_PAIRS_AT_ONCE = 2**22
_NEAREST, _OF_ONE_MOMENT = 5, 24  # how many events apart a pair may be
_SMOOTHING = 0.75  # of the second id's frequency, as in word2vec's negatives
_VERSION = 2  # of what is computed: a change makes earlier caches void

_log = logging.getLogger(__name__)


def cooccurrence_rows(
    dataset: RequestDataset, widths: Mapping[str, int], seed: int
) -> dict[str, Float[np.ndarray, "V width"]]:
    """Rows of unit length for ids that occur with others; zero for the rest.

    Computed once in one pass over the records, in memory that is bounded whatever the vocabulary,
    and kept beside the dataset.

    Args:
      dataset: A prepared dataset.
      widths: Of the categorical history features that get rows; columns beyond the rank are zero.
      seed: Of the decomposition's start vector; equal seeds give equal rows.
    """
    key = json.dumps([_VERSION, dataset.fingerprint, dict(widths), seed], sort_keys=True)
    name = f"cooccurrence_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    path = dataset.directory / name
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in widths}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    rows = _factorise_dataset(dataset, widths, seed)
    try:
        with replacing(path) as output:
            np.savez(output, **rows)  # type: ignore[arg-type]
    except OSError as error:
        _log.warning("%s cannot be kept: %s", path, error)
    return rows


def _factorise_dataset(
    dataset: RequestDataset, widths: Mapping[str, int], seed: int
) -> dict[str, Float[np.ndarray, "V width"]]:
    end_time = dataset.index.training_end

    def events() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        for i in range(len(dataset)):
            record = dataset.record(i)
            kept = unlabelled_events(record, dataset.schema.item, end_time)
            yield record.event_time[kept], {name: record.history[name][kept] for name in widths}

    sizes = {name: dataset.schema.vocabularies[name] for name in widths}
    frequent = _most_frequent(events(), sizes) if max(sizes.values()) > _MOST_ROWS else {}
    counts = _Counts({name: len(frequent.get(name, range(sizes[name]))) for name in widths})
    for time, columns in events():
        for name, ids in frequent.items():
            place = np.searchsorted(ids, columns[name]).clip(max=len(ids) - 1)
            columns[name] = np.where(ids[place] == columns[name], place, -1)
        counts.add(time, columns)
    rows = {n: factorise(matrix, widths[n], seed) for n, matrix in counts.finish().items()}
    for name, ids in frequent.items():
        whole = np.zeros((sizes[name], widths[name]), np.float32)
        whole[ids] = rows[name]
        rows[name] = whole
    return rows


def _most_frequent(
    events: Iterator[tuple[np.ndarray, dict[str, np.ndarray]]], sizes: Mapping[str, int]
) -> dict[str, Int[np.ndarray, " ids"]]:
    """The most frequent ids of vocabularies that have too many, ascending."""
    counts = {n: np.zeros(size, np.int32) for n, size in sizes.items() if size > _MOST_ROWS}
    for _, columns in events:
        for name, count in counts.items():
            ids, times = np.unique(columns[name], return_counts=True)
            count[ids] += times
    return {
        n: np.sort(np.argsort(-count, kind="stable")[:_MOST_ROWS]) for n, count in counts.items()
    }


class _Counts:
    """How often two ids occur together, feature by feature, in bounded memory."""

    def __init__(self, sizes: Mapping[str, int]):
        """Args: numbers of ids by feature; what is added below zero is not counted."""
        self.of_one_moment = {n: sp.csr_matrix((k, k), dtype=np.float32) for n, k in sizes.items()}
        self.of_neighbours = dict(self.of_one_moment)
        self.waiting: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
        self.num_waiting = self.num_events = self.num_together = 0

    def add(self, time: Int[np.ndarray, " n"], columns: Mapping[str, np.ndarray]) -> None:
        """Counts the pairs of one user."""
        same = time[1:] == time[:-1]
        self.num_events += len(time)
        self.num_together += int((np.append(same, False) | np.append(False, same)).sum())
        for first, second, is_near, at_once in _pairs(time):
            for name, ids in columns.items():
                known = (ids[first] >= 0) & (ids[second] >= 0)
                pair = np.stack([ids[first], ids[second], is_near, at_once])[:, known]
                self.waiting[name].append(pair.astype(np.int32))
            self.num_waiting += len(first)
        if self.num_waiting > _PAIRS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        for name, waiting in self.waiting.items():
            if waiting:
                first, second, is_near, at_once = np.concatenate(waiting, 1)
                for matrices, used in (
                    (self.of_neighbours, is_near), (self.of_one_moment, at_once)
                ):  # fmt: skip
                    shape = matrices[name].shape
                    pairs = first[used > 0], second[used > 0]
                    ones = np.ones(len(pairs[0]), np.float32)
                    total = matrices[name] + sp.csr_matrix((ones, pairs), shape=shape)
                    matrices[name] = _without_rarest(total)
            waiting.clear()
        self.num_waiting = 0

    def finish(self) -> dict[str, sp.csr_matrix]:
        """Symmetric counts: of one moment if most events share theirs, of neighbours if not."""
        self._flush()
        in_baskets = 2 * self.num_together > self.num_events
        chosen = self.of_one_moment if in_baskets else self.of_neighbours
        whole = {}
        for name, matrix in chosen.items():
            both = (matrix + matrix.T).tocoo()
            off = both.row != both.col
            pairs = both.row[off], both.col[off]
            whole[name] = sp.csr_matrix((both.data[off], pairs), shape=matrix.shape)
        return whole


def _pairs(time: Int[np.ndarray, " n"]) -> Iterator[tuple[np.ndarray, ...]]:
    """Positions of two events, whether they are neighbours, and whether of one moment."""
    positions = np.arange(len(time))
    for apart in range(1, min(_OF_ONE_MOMENT, len(time) - 1) + 1):
        at_once = time[apart:] == time[:-apart]
        is_near = np.full(len(at_once), apart <= _NEAREST)
        used = at_once | is_near
        yield positions[:-apart][used], positions[apart:][used], is_near[used], at_once[used]


def _without_rarest(counts: sp.csr_matrix) -> sp.csr_matrix:
    while counts.nnz > _MOST_ENTRIES:
        counts.data[counts.data == counts.data.min()] = 0
        counts.eliminate_zeros()
    return counts


def factorise(counts: sp.csr_matrix, width: int, seed: int) -> Float[np.ndarray, "V width"]:
    """Rows of unit length from symmetric counts; zero for ids without a pair.

    Args:
      counts: How often two ids occur together, [V, V].
      width: Of the rows; what the rank does not fill is zero.
      seed: Of the start vector.
    """
    size = counts.shape[0]
    rows = np.zeros((size, width), np.float32)
    pairs = counts.tocoo()
    frequency = np.bincount(pairs.row, pairs.data, size)
    total = frequency.sum()
    rank = min(width, size - 2)
    if rank < 1 or not total:
        return rows
    context = frequency**_SMOOTHING
    context *= total / context.sum()
    information = np.log(pairs.data * total / (frequency[pairs.row] * context[pairs.col]))
    positive = information > 0
    weights = sp.csr_matrix(
        (information[positive], (pairs.row[positive], pairs.col[positive])), shape=counts.shape
    )
    if not weights.nnz:
        return rows
    start = np.random.default_rng(seed).uniform(-1, 1, size)
    left, strength, _ = scipy.sparse.linalg.svds(weights, k=rank, v0=start)
    order = np.argsort(-strength)
    scaled = left[:, order] * np.sqrt(_without_noise(strength[order], weights))
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    is_known = (norm > 1e-6) & (frequency[:, None] > 0)
    rows[:, :rank] = np.where(is_known, scaled / np.where(is_known, norm, 1), 0)
    return rows


def _without_noise(
    strength: Float[np.ndarray, " k"], weights: sp.csr_matrix
) -> Float[np.ndarray, " k"]:
    """What of the largest singular values of a symmetric matrix stands out of the rest."""
    rest = max(weights.data @ weights.data - strength @ strength, 0.0)
    num_ids = np.count_nonzero(np.diff(weights.indptr))
    largest_of_noise = 2 * np.sqrt(rest / num_ids)
    return np.sqrt(np.maximum(strength**2 - largest_of_noise**2, 0))
