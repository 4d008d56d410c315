"""What working directories tell of their runs: config, evaluations, metrics of the training."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from stca_jax.errors import UserError
from stca_jax.evaluation.best import read_best
from stca_jax.evaluation.tables import Row
from stca_jax.files import read_json_lines

METRICS = {
    "auc": "AUC",
    "gauc_user": "AUC within users",
    "log_loss": "log loss (nats)",
    "calibration": "predicted / observed",
}
_SEEDS = ("seed", "input.seed")


class Selection(NamedTuple):
    """Which requests a row is of.

    Attributes:
      split: "train", "validation" or "test".
      min_history: Least number of earlier events.
      max_requests: Size of the sample; None is all of them.
      max_targets: Targets that it has at most, as a training's own validation; None is any number.
    """

    split: str
    min_history: int
    max_requests: int | None
    max_targets: int | None = None

    def __str__(self) -> str:
        limits = [
            f"up to {limit:,} {of}"
            for limit, of in ((self.max_targets, "targets of"), (self.max_requests, ""))
            if limit is not None
        ]
        number = " ".join(limits).strip().capitalize() or "All"
        least = f" after at least {self.min_history:,} events" if self.min_history else ""
        return f"{number} requests of the {self.split} split{least}"


_REQUIRED = ("split", "min_history", "max_requests")  # of a row; the rest came later


@dataclasses.dataclass(frozen=True)
class Run:
    """What a working directory tells of its run.

    Attributes:
      name: Shown in the charts.
      config: Values by dotted name.
      rows: Of evaluations, each with the fields of `Selection` and "model" and "length".
      lines: Of the training's metrics file.
      best_step: Step of the marked checkpoint.
    """

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    lines: Sequence[Row]
    best_step: int | None

    def rows_of(self, selection: Selection, task: str | None, model: str = "stca") -> list[Row]:
        """Rows of one model, one task and some requests."""
        return [
            row
            for row in self.rows
            if row["model"] == model and row.get("task") == task and selection_of(row) == selection
        ]

    def steps_per_second(self) -> float | None:
        """Median speed of the training, pauses and compilation aside; None if it was not timed."""
        return median(line.get("speed/steps_per_second") for line in self.lines)

    def tokens_per_step(self) -> float | None:
        """Mean number of history tokens of a batch."""
        fills = [line["train/token_fill"] for line in self.lines if "train/token_fill" in line]
        slots = self.config["input.row_length"] * self.config["input.rows_per_batch"]
        return statistics.fmean(fills) * slots if fills else None


class Group(NamedTuple):
    """Runs that differ in nothing but the seed.

    Attributes:
      name: Shown in the charts.
      runs: At least one.
    """

    name: str
    runs: Sequence[Run]

    def steps_per_second(self) -> float | None:
        """Median over the runs."""
        return median(run.steps_per_second() for run in self.runs)


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Runs of one config but for its seeds, in the order in which each first appears."""
    groups: dict[tuple[str, int], list[Run]] = {}
    seen: collections.Counter[str] = collections.Counter()
    for run in runs:
        rest = {name: value for name, value in run.config.items() if name not in _SEEDS}
        # The same seeds again are another run, on other hardware perhaps, and no sample.
        repetition = seen[json.dumps(dict(run.config))]
        seen[json.dumps(dict(run.config))] += 1
        groups.setdefault((json.dumps(rest), repetition), []).append(run)
    return [Group(_common_name([run.name for run in group]), group) for group in groups.values()]


def _common_name(names: Sequence[str]) -> str:
    """The leading parts that the names share, and how many there are."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split("/") for name in names), strict=False)
    shared = itertools.takewhile(lambda part: len(set(part)) == 1, parts)
    return ", ".join(filter(None, ["/".join(part[0] for part in shared), f"{len(names)} seeds"]))


def load_run(workdir: str | os.PathLike[str], name: str) -> Run:
    """Reads the config, all evaluations and the metrics of a working directory.

    Without an evaluation job the training's own validation stands in, at its single length.

    Raises:
      UserError: it holds no run, or a line that is not JSON.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run (no config.json); train into it first")
    config = dict(_flatten(json.loads((workdir / "config.json").read_text())))
    lines = read_json_lines(workdir / "metrics.jsonl")
    rows = _validation_rows(lines, config)
    for path in sorted((workdir / "evaluation").glob("*.jsonl")):
        rows += [row for row in read_json_lines(path) if row.keys() >= set(_REQUIRED)]
    keys = (*Selection._fields, "model", "task", "step", "length")
    unique = {tuple(row.get(key) for key in keys): row for row in rows}
    best = read_best(workdir)
    return Run(name, config, list(unique.values()), lines, best["step"] if best else None)


def best_selection(
    runs: Sequence[Run], task: str | None, *, across_steps: bool = False
) -> Selection:
    """The requests to show: those that most runs were scored on.

    Args:
      runs: At least one of them has rows.
      task: Of the rows.
      across_steps: Among equals prefer what has the most steps, else prefer the test split.
    """
    steps: dict[Selection, set[tuple[str, Any, int]]] = {}
    for run in runs:
        for row in run.rows:
            if row["model"] == "stca" and row.get("task") == task:
                key = (run.name, row["step"], row["length"])
                steps.setdefault(selection_of(row), set()).add(key)

    def rank(selection: Selection) -> tuple[int, ...]:
        found = steps[selection]
        num_runs = len({name for name, *_ in found})
        is_test = selection.split == "test"
        num_steps = len({(name, step) for name, step, _ in found})  # whatever the lengths
        by_step = (num_steps, len(found), is_test)
        return (num_runs, *(by_step if across_steps else (is_test, len(found))))

    return max(steps, key=rank)


def shown_step(run: Run, selection: Selection, task: str | None) -> int | None:
    """The checkpoint whose lengths are shown: the best if it was scored, else the last."""
    steps = {row["step"] for row in run.rows_of(selection, task)}
    return run.best_step if run.best_step in steps else max(steps, default=None)


def median(values: Iterable[float | None]) -> float | None:
    """Of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def selection_of(row: Row) -> Selection:
    """Which requests a row is of."""
    return Selection(**{name: row[name] for name in Selection._fields if name in row})


def _validation_rows(lines: Sequence[Row], config: Mapping[str, Any]) -> list[Row]:
    """The training's own validation, as rows of an evaluation.

    Its length is that of the line: a resumed run may have changed the config's.
    """
    rows: dict[tuple[int, str | None], dict[str, Any]] = {}
    for line in lines:
        for name, value in line.items():
            prefix, *task = name.split("/")
            metric = task.pop() if task else ""
            if prefix != "validation" or metric not in METRICS:
                continue
            row = rows.setdefault(
                (line["step"], task[0] if task else None),
                {
                    "model": "stca",
                    "split": "validation",
                    "min_history": config["evaluation.min_history"],
                    "max_requests": config["evaluation.validation_requests"],
                    "max_targets": config["evaluation.validation_targets"],
                    "step": line["step"],
                    "length": int(
                        line.get("/".join([prefix, *task, "length"]))
                        or config["evaluation.validation_length"]
                    ),
                    **({"task": task[0]} if task else {}),
                },
            )
            row[metric] = value
    return list(rows.values())


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key != "type":
                yield from _flatten(inner, f"{name}.{key}" if name else key)
            elif "." in name:  # the class of a part that can be of several
                yield name, inner
    else:
        yield name, value
