"""Tables, figures and the page of a comparison's finished runs."""

from __future__ import annotations

import html
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stca_jax.comparison.costs import TARGETS, Costs
from stca_jax.comparison.entries import Entry
from stca_jax.evaluation.report.charts import Chart, Line, mean_line
from stca_jax.evaluation.report.drawing import draw, figure_html
from stca_jax.evaluation.report.page import page_html
from stca_jax.evaluation.tables import Row, write_table

_WORDS = {"full": "with our additions", "plain": "without our additions"}
_SHOWN = ("auc", "log_loss", "calibration")


def summary_rows(
    entries: Sequence[Entry],
    rows: Sequence[Row],
    costs: Mapping[str, Costs],
    searched: Sequence[Row],
    metric: str,
) -> list[Row]:
    """A row for each entry: quality on the test split at the longest history, cost and settings.

    Args:
      entries: All entries.
      rows: Of finished runs, from `stca_jax.length_study.results.result_rows`.
      costs: By entry.
      searched: Rows of the search.
      metric: Whose value on validation chose the settings.
    """
    summary: list[Row] = []
    for entry in entries:
        own = [row for row in rows if row["point"] == entry.name]
        tested = [row for row in own if row["split"] == "test"]
        if not tested:
            continue
        longest = max(row["length"] for row in tested)
        at_full = [row for row in tested if row["length"] == longest]
        validation = [row[metric] for row in own if row["split"] == "validation"]
        chosen = [row["settings"] for row in searched
                  if row["entry"] == entry.name and row["chosen"]]  # fmt: skip
        of_entry, steps = costs[entry.name], at_full[0]["steps"]
        seconds = _mean([row["train_seconds"] for row in at_full])
        summary.append(
            {
                "module": entry.module,
                "variant": entry.variant,
                "seeds": len(at_full),
                f"validation_{metric}": _mean(validation),
                **{k: v for n in _SHOWN for k, v in _spread(n, [r[n] for r in at_full]).items()},
                "steps": steps,
                "targets": round(steps * of_entry.targets_per_step),
                "tokens": round(steps * of_entry.tokens_per_step),
                "gigaflop": round(steps * of_entry.flops_per_step / 1e9, 1),
                # A run too short to be timed: as long as its steps took when they were measured.
                "train_seconds": seconds or round(steps * of_entry.seconds_per_step, 1),
                "tokens_per_second": round(of_entry.tokens_per_second),
                "step_mb": of_entry.step_bytes and round(of_entry.step_bytes / 2**20, 1),
                **{f"ms_{m}_targets": round(1e3 * of_entry.latency[str(m)], 2) for m in TARGETS},
                "parameters": of_entry.parameters,
                "settings": "; ".join(chosen),
            }
        )
    return summary


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {name: _mean(known), f"{name}_sd": deviation}


def charts(
    entries: Sequence[Entry], rows: Sequence[Row], summary: Sequence[Row], references: Sequence[Row]
) -> list[Chart]:
    """Quality against length, training cost and latency; a variant each."""
    made = []
    for variant in dict.fromkeys(entry.variant for entry in entries):
        words = _WORDS.get(variant, variant.replace("_", " "))
        names = {e.name: e.module for e in entries if e.variant == variant}
        tested = [r for r in rows if r["split"] == "test" and r["point"] in names]
        if not tested:
            continue
        for metric, label in (("auc", "AUC"), ("log_loss", "Log loss")):
            lines = [
                mean_line(module, tables, "length", metric)
                for name, module in names.items()
                if (tables := _by_seed([r for r in tested if r["point"] == name]))
            ]
            for model in dict.fromkeys(row["model"] for row in references):
                table = [row for row in references if row["model"] == model]
                lines.append(mean_line(model, [table], "length", metric, reference=model))
            x_label = "served history length (events)"
            made.append(
                Chart(f"{metric}_{variant}", f"{label} by length, {words}", "", x_label, label,
                      [line for line in lines if line.x], lengths=True)
            )  # fmt: skip
        own = [row for row in summary if row["variant"] == variant]
        for name, column, x_label in (
            ("training", "train_seconds", "training (seconds)"),
            ("latency", "ms_100_targets", "forward pass, 100 targets (ms)"),
        ):
            points = [Line(r["module"], [r[column]], [r["auc"]]) for r in own if r[column]]
            if points:
                title = f"AUC in full by {name}, {words}"
                made.append(Chart(f"{name}_{variant}", title, "", x_label, "AUC", points))
    return made


def _by_seed(rows: Sequence[Row]) -> list[list[Row]]:
    seeds = sorted({row["seed"] for row in rows})
    return [[row for row in rows if row["seed"] == seed] for seed in seeds]


def write_page(
    workdir: pathlib.Path, dataset: str, made: Sequence[Chart], tables: Mapping[str, Sequence[Row]]
) -> None:
    """Writes comparison.html, which loads nothing, and the charts as PNG beside it."""
    figures = []
    for chart in made:
        figure = draw(chart)
        figure.savefig(workdir / f"{chart.name}.png", dpi=160, facecolor="white")
        figures.append(figure_html(chart, figure))
    body = ['<div class="charts">', *figures, "</div>"]
    for caption, rows in tables.items():
        if rows:
            body.append(_table_html(caption, rows))
    page = page_html("Sequence modules compared", dataset, "\n".join(body))
    (workdir / "comparison.html").write_text(page, encoding="utf-8")


def _table_html(caption: str, rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    cells = ["".join(f"<td>{html.escape(text)}</td>" for text in line) for line in lines]
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return (
        f'<div class="scroll" tabindex="0"><table class="numbers">'
        f"<caption>{html.escape(caption)}</caption>{body}</table></div>"
    )


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def write_tables(
    workdir: pathlib.Path, rows: Sequence[Row], summary: Sequence[Row], searched: Sequence[Row]
) -> None:
    """Writes results.csv, summary.csv and search.csv."""
    for name, table in (("results", rows), ("summary", summary), ("search", searched)):
        write_table(workdir / f"{name}.csv", table)
