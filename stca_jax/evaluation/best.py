"""Which checkpoint is the best: one rule for the training and for the jobs that follow it.

    WORKDIR/best.json   [{"step": 500, "value": 0.71, "metric": "auc", "split": "validation",
                          "length": 1000, "min_history": 0, "max_requests": null,
                          "max_targets": 30000, "last_step": 1500}, …]

A value is compared with values of the same metric, requests and history length only, so there is
one mark for each: the training's own, at `evaluation.validation_length`, and a following job's, at
its longest length. Of several marks the one counts that has compared the newest checkpoint, of
those the longest length, and of those the largest sample: a job that follows to the end decides,
one that was interrupted does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stca_jax.files import write_json

BEST = "best.json"


class Criterion(NamedTuple):
    """What checkpoints are compared by.

    Attributes:
      metric: Column of the rows of metrics.
      split: Of the requests that were scored.
      length: History length they were scored at, in events.
      larger_is_better: Whether a larger value is better.
      min_history: Which requests of the split were scored, as in `InputConfig`.
      max_requests: Likewise.
      max_targets: Likewise.
    """

    metric: str
    split: str
    length: int
    larger_is_better: bool
    min_history: int = 0
    max_requests: int | None = None
    max_targets: int | None = None


def score(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Mean of a metric over the tasks that define it; None if none does.

    A task of one label only has no AUC, whatever the checkpoint.

    Args:
      rows: Of one checkpoint and length, one per task.
      metric: Column that counts.
    """
    values = [row[metric] for row in rows if row.get(metric) is not None]
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def read_best(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The mark that counts: "step", "value", "metric", "split", "length"; None if there is none."""
    marks = read_marks(workdir)
    return marks[0] if marks else None


def read_marks(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All marks, the one that counts first."""
    try:
        found = json.loads((pathlib.Path(workdir) / BEST).read_text())
    except FileNotFoundError:
        return []
    return [_of_first_version(found)] if isinstance(found, dict) else found


def read_mark(workdir: str | os.PathLike[str], criterion: Criterion) -> dict[str, Any] | None:
    """The mark of a criterion; None if it has marked no checkpoint."""
    return next((mark for mark in read_marks(workdir) if _is_of(criterion, mark)), None)


def _columns(criterion: Criterion) -> dict[str, Any]:
    """What a mark says of its criterion."""
    return {n: v for n, v in criterion._asdict().items() if n != "larger_is_better"}


def _is_of(criterion: Criterion, mark: Mapping[str, Any]) -> bool:
    """Of an older version's mark, limits of requests are not known, and taken for the same."""
    return all(mark.get(n, v) == v for n, v in _columns(criterion).items())


def _rank(mark: Mapping[str, Any]) -> tuple[float, ...]:
    """The mark that counts has the largest."""
    limits = (mark.get("max_targets"), mark.get("max_requests"))
    return mark["last_step"], mark["length"], *(limit or math.inf for limit in limits)


def marked_steps(workdir: str | os.PathLike[str]) -> set[int]:
    """Steps of all marks: retention keeps their checkpoints."""
    return {mark["step"] for mark in read_marks(workdir)}


def mark_best(
    workdir: str | os.PathLike[str], values: Mapping[int, float | None], criterion: Criterion
) -> int | None:
    """Marks the best of some checkpoints and of the one that the criterion marked before.

    Of equal ones the first stays. A value that is None or not finite beats none, and a marked
    checkpoint that is gone is beaten by any.

    Args:
      workdir: Of the run.
      values: By step, of checkpoints that exist or are being written.
      criterion: What the values are of.

    Returns:
      The step that is marked now, if one is.
    """
    directory = pathlib.Path(workdir)
    finite = {step: float(v) for step, v in values.items() if v is not None and math.isfinite(v)}
    with _alone(directory):
        marks = [m for m in read_marks(directory) if _exists(directory, m) and m["length"]]
        before = next((m for m in marks if _is_of(criterion, m)), None)
        candidates = finite | ({before["step"]: before["value"]} if before else {})
        if not candidates:
            return None
        sign = 1 if criterion.larger_is_better else -1
        step = max(candidates, key=lambda s: (sign * candidates[s], -s))
        last_step = max([*values, *([before["last_step"]] if before else [])])
        mark = {
            "step": step,
            "value": candidates[step],
            **_columns(criterion),
            "last_step": last_step,
        }
        if mark != before:
            marks = [mark, *(m for m in marks if m is not before)]
            marks.sort(key=_rank, reverse=True)
            write_json(directory / BEST, marks)
        return step


def _exists(workdir: pathlib.Path, mark: Mapping[str, Any]) -> bool:
    return (workdir / "checkpoints" / str(mark["step"])).exists()


def _of_first_version(mark: Mapping[str, Any]) -> dict[str, Any]:
    """It had one mark, {"step", "value", "metric"}, where a following job wrote "auc@LENGTH"."""
    metric, _, length = mark["metric"].partition("@")
    return {
        "step": mark["step"],
        "value": mark["value"],
        "metric": metric,
        "split": "validation",
        "length": int(length or 0),  # 0: not known, and compared with nothing
        "last_step": mark["step"],
    }


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps the training and the jobs that follow it from overwriting each other's marks."""
    with (workdir / f".{BEST}.lock").open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the chance is small
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
