"""Figures of the study's finished runs."""

from __future__ import annotations

from collections.abc import Sequence

from stca_jax.evaluation.report.charts import Chart, Line, mean_line
from stca_jax.evaluation.tables import Row
from stca_jax.length_study.points import Point


def charts(
    points: Sequence[Point],
    rows: Sequence[Row],
    summary: Sequence[Row],
    references: Sequence[Row],
) -> list[Chart]:
    """The figures for which there are finished runs.

    Args:
      points: All points.
      rows: From `result_rows`.
      summary: From `summary_rows`.
      references: Rows of the references on the test split.
    """
    tested = [row for row in rows if row["split"] == "test"]
    seeds = {row["point"]: sorted({r["seed"] for r in tested if r["point"] == row["point"]})
             for row in tested}  # fmt: skip

    def lines(names: Sequence[str], metric: str) -> list[Line]:
        tables = {
            name: [[r for r in tested if (r["point"], r["seed"]) == (name, k)] for k in seeds[name]]
            for name in names
        }
        return [mean_line(name, of_seeds, "length", metric) for name, of_seeds in tables.items()]

    def chart(name: str, title: str, y_label: str, drawn: list[Line]) -> Chart:
        x_label = "served history length (events)"
        return Chart(name, title, "", x_label, y_label, drawn, lengths=True)

    finished = {part: [p.name for p in points if part in p.parts and p.name in seeds]
                for part in ("length", "window")}  # fmt: skip
    stochastic = [row for row in summary if row["point"].startswith("beta-")]
    best = max(stochastic, key=lambda row: row["validation_auc"], default={"point": None})["point"]
    shown = [n for n in finished["length"] if not n.startswith("beta-") or n == best]
    made = []
    for metric, label in (("auc", "AUC"), ("log_loss", "Log loss")):
        drawn = lines(shown, metric)
        for model in dict.fromkeys(row["model"] for row in references):
            of_model = [row for row in references if row["model"] == model]
            drawn.append(mean_line(model, [of_model], "length", metric, reference=model))
        drawn = [line for line in drawn if line.x]
        made.append(chart(f"length_{metric}", f"{label} by training length", label, drawn))
        if above := _above_logistic(drawn):
            title = f"{label} less that of logistic regression"
            made.append(chart(f"length_{metric}_difference", title, f"{label} difference", above))
    if finished["window"]:
        drawn = lines(finished["window"], "auc")
        made.append(chart("window_auc", "AUC by training window", "AUC", drawn))
    if drawn := _cost_lines(finished["length"], summary):
        made.append(
            Chart(
                "length_cost",
                "Gain of full training kept, by cost",
                "",
                "training tokens (share of full length)",
                "share of the gain",
                drawn,
            )
        )
    return made


def _above_logistic(lines: Sequence[Line]) -> list[Line]:
    """Differences from the logistic reference, of all but counting; nothing without it."""
    base = {line.label: dict(zip(line.x, line.y, strict=True)) for line in lines}.get("logistic")
    if base is None:
        return []
    return [
        line._replace(y=[y - base[x] for x, y in zip(line.x, line.y, strict=True)])
        for line in lines
        if line.label != "counting"
    ]


def _cost_lines(names: Sequence[str], summary: Sequence[Row]) -> list[Line]:
    """Gain kept against the tokens of an epoch relative to full length, a line per sampler."""
    rows = {row["point"]: row for row in summary if row["point"] in names and row["gain_kept"]}
    most = max((row["unshared_tokens"] for row in rows.values()), default=0)
    drawn = []
    for sampler in ("fixed", "beta", "uniform"):
        own = [row for name, row in rows.items() if name.startswith(sampler)]
        own.sort(key=lambda row: row["unshared_tokens"])
        x = [row["unshared_tokens"] / most for row in own]
        error = [row["gain_kept_sd"] or 0.0 for row in own]
        drawn.append(Line(sampler, x, [row["gain_kept"] for row in own], None, error))
    return [line for line in drawn if line.x]
