"""Lines and charts of runs: quality by history length, by step and by cost; throughput.

Runs that differ in nothing but the seed are one line, their mean, with bars of one standard
deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from stca_jax.evaluation.report.runs import (
    METRICS,
    Run,
    Selection,
    best_selection,
    group_by_seed,
    shown_step,
)
from stca_jax.evaluation.tables import Row

REFERENCES = ("counting", "logistic", "truth")
_CALIBRATED = (0.98, 1.02)


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      label: For the legend.
      x: Ascending.
      y: As many.
      reference: Name of the reference that it shows, which is drawn in grey; None for a run.
      error: Standard deviation over seeds of each y; None for a single run.
    """

    label: str
    x: list[float]
    y: list[float]
    reference: str | None = None
    error: list[float] | None = None


class Chart(NamedTuple):
    """What is drawn.

    Attributes:
      name: Of the file.
      title: Above it.
      caption: Below it, on the page.
      x_label: With its unit.
      y_label: With its unit.
      lines: In the order of the legend.
      lengths: The horizontal axis is the history length, on a logarithmic scale.
      band: Shaded range of y.
      from_zero: The vertical axis begins at 0.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: list[Line]
    lengths: bool = False
    band: tuple[float, float] | None = None
    from_zero: bool = False


def quality_charts(runs: Sequence[Run], task: str | None) -> list[Chart]:
    """Charts of the metrics by history length, by training step and by training cost."""
    suffix = f"_{task}" if task else ""
    of_task = f" ({task})" if task else ""
    by_length = best_selection(runs, task)
    charts = []
    for metric, label in METRICS.items():
        lines = lines_by_length(runs, by_length, task, metric)
        if not lines:
            continue
        band = _CALIBRATED if metric == "calibration" else None
        note = " The band is 2 % on either side of calibrated." if band else ""
        charts.append(
            Chart(
                f"{metric}_by_length{suffix}",
                f"{label[0].upper()}{label[1:]} by history length{of_task}",
                f"{by_length}; one checkpoint of each run.{note}{_unscored(runs, by_length, task)}",
                "history length (events)",
                label,
                lines,
                lengths=True,
                band=band,
            )
        )
    by_step = best_selection(runs, task, across_steps=True)
    for name, what, unit in (
        ("step", "training step", "training step"),
        ("cost", "training cost", "training time (minutes)"),
    ):
        lines = lines_by_step(runs, by_step, task, "auc", in_minutes=name == "cost")
        note = " Time is steps over the run's median speed." if name == "cost" else ""
        if lines:
            charts.append(
                Chart(
                    f"auc_by_{name}{suffix}",
                    f"AUC by {what}{of_task}",
                    f"{by_step}.{note}{_unscored(runs, by_step, task)}",
                    unit,
                    "AUC",
                    lines,
                )
            )
    return charts


def _unscored(runs: Sequence[Run], selection: Selection, task: str | None) -> str:
    """Names the runs that a chart lacks."""
    names = [run.name for run in runs if not run.rows_of(selection, task)]
    return f" Not scored on these: {', '.join(names)}." if names else ""


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Charts of what the training itself reported."""
    lines = []
    for run in runs:
        points = [
            (line["step"], line["speed/tokens_per_second"])
            for line in run.lines
            if line.get("speed/tokens_per_second")
        ]
        if points:
            lines.append(Line(run.name, [p[0] for p in points], [p[1] for p in points]))
    losses = [line for run in runs if (line := _training_loss(run)).x]
    of_loss = Chart("training_loss", "Training loss", "Means of the logged steps.",
                    "training step", "loss (nats)", losses)  # fmt: skip
    caption = "The time of validation and of checkpoints is included."
    title, labels = "Training throughput", ("training step", "history tokens / s")
    chart = Chart("throughput", title, caption, *labels, lines, from_zero=True)
    return [made for made in (of_loss, chart) if made.lines]


def _training_loss(run: Run) -> Line:
    points = [(r["step"], r["train/loss"]) for r in run.lines if r.get("train/loss") is not None]
    return Line(run.name, [x for x, _ in points], [y for _, y in points])


def lines_by_length(
    runs: Sequence[Run], selection: Selection, task: str | None, metric: str
) -> list[Line]:
    """A metric at each length: of one checkpoint per run, seeds averaged, and of the references."""
    lines = []
    for group in group_by_seed(runs):
        tables = []
        for run in group.runs:
            step = shown_step(run, selection, task)
            tables.append([row for row in run.rows_of(selection, task) if row["step"] == step])
        label = group.name if len(tables) > 1 else f"{group.name}, step {step}"
        lines.append(mean_line(label, tables, "length", metric))
    for name in REFERENCES:
        found = {
            row["length"]: row for run in runs for row in run.rows_of(selection, task, model=name)
        }
        lines.append(mean_line(name, [list(found.values())], "length", metric, reference=name))
    return [line for line in lines if line.x]


def lines_by_step(
    runs: Sequence[Run],
    selection: Selection,
    task: str | None,
    metric: str,
    *,
    in_minutes: bool,
) -> list[Line]:
    """A metric after each step: of a single line of runs at each length, else at the longest.

    Every step that a run was scored at is a point, also where other seeds have not got there.
    """
    lengths = sorted(
        {row["length"] for run in runs for row in run.rows_of(selection, task)}, reverse=True
    )
    lines = []
    groups = group_by_seed(runs)
    for group in groups:
        speed = group.steps_per_second() if in_minutes else 1.0
        if not speed:
            continue
        tables = [run.rows_of(selection, task) for run in group.runs]
        own = [n for n in lengths if all(any(r["length"] == n for r in rows) for rows in tables)]
        for length in own[:1] if len(groups) > 1 else own:
            label = f"{length:,} events"
            label = f"{group.name}, {label}" if len(groups) > 1 else label
            at_length = [[r for r in rows if r["length"] == length] for rows in tables]
            line = mean_line(label, at_length, "step", metric, of_all=False)
            scale = 1 / (speed * 60) if in_minutes else 1
            lines.append(line._replace(x=[x * scale for x in line.x]))
    return [line for line in lines if line.x]


def mean_line(
    label: str,
    tables: Sequence[Sequence[Row]],
    x: str,
    metric: str,
    reference: str | None = None,
    *,
    of_all: bool = True,
) -> Line:
    """The mean of a metric over tables.

    Args:
      label: For the legend.
      tables: Rows of each seed.
      x: Column of the horizontal axis.
      metric: Column of the vertical one.
      reference: See `Line`.
      of_all: Only where all tables have it; else wherever one has.
    """
    columns = [{r[x]: r[metric] for r in rows if r.get(metric) is not None} for rows in tables]
    combine = set.intersection if of_all else set.union
    places = sorted(combine(*map(set, columns)))
    values = [[column[at] for column in columns if at in column] for at in places]
    error = None
    if len(columns) > 1:
        error = [statistics.stdev(v) if len(v) > 1 else math.nan for v in values]
    return Line(label, places, [statistics.fmean(v) for v in values], reference, error)
