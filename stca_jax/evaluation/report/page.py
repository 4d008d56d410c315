"""Writes the page: a single HTML file that loads nothing, and its charts as PNG beside it."""

from __future__ import annotations

import html
import os
import pathlib
import statistics
from collections.abc import Sequence

from stca_jax.errors import UserError
from stca_jax.evaluation.report.charts import Line, lines_by_length, quality_charts, training_charts
from stca_jax.evaluation.report.drawing import draw, figure_html
from stca_jax.evaluation.report.runs import METRICS, Run, best_selection, group_by_seed, median


def page_html(title: str, subtitle: str, body: str) -> str:
    """A page in this style around its body, which is HTML; it loads nothing."""
    return _PAGE.format(title=html.escape(title), datasets=html.escape(subtitle), body=body)


def write_report(runs: Sequence[Run], output: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes the page, and its charts as PNG into a directory beside it that has the same name.

    Args:
      runs: At least one.
      output: Ending in `.html`.

    Returns:
      All files written, the page first.

    Raises:
      UserError: the name ends otherwise, there is nothing to show, or matplotlib is not installed.
    """
    output = pathlib.Path(output)
    if output.suffix != ".html":
        raise UserError(f"{output} ends in {output.suffix!r}, expected .html: rename it")
    scored = (row for run in runs for row in run.rows if row["model"] == "stca")
    tasks = sorted({row.get("task") for row in scored}, key=str)
    if not tasks:
        names = ", ".join(run.name for run in runs)
        evaluate = "python -m stca_jax.experiments.evaluate"
        raise UserError(f"no evaluation of {names} yet: run {evaluate} first")
    charts = [chart for task in tasks for chart in quality_charts(runs, task)]
    charts += training_charts(runs)
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    written, figures = [output], []
    for chart in charts:
        figure = draw(chart)
        written.append(folder / f"{chart.name}.png")
        figure.savefig(written[-1], dpi=200, facecolor="white")
        figures.append(figure_html(chart, figure))
    output.write_text(_page(runs, tasks, figures), encoding="utf-8")
    return written


def _page(runs: Sequence[Run], tasks: Sequence[str | None], figures: Sequence[str]) -> str:
    title = ", ".join(run.name for run in runs)
    tables = [table for task in tasks for table in _quality_tables(runs, task)]
    sections = [
        "<h2>Summary</h2>",
        *(_summary_table(runs, task) for task in tasks),
        '<div class="charts">',
        *figures,
        "</div>",
        "<h2>Numbers</h2>",
        *tables,
        "<h2>Cost</h2>",
        _cost_table(runs),
        "<h2>Config</h2>",
        _config_table(runs),
    ]
    datasets = ", ".join(dict.fromkeys(str(run.config["dataset"]) for run in runs))
    return _PAGE.format(
        title=html.escape(title), datasets=html.escape(datasets), body="\n".join(sections)
    )


def _summary_table(runs: Sequence[Run], task: str | None) -> str:
    """A row per line of runs: what it reaches with all of the history, and what it took."""
    selection = best_selection(runs, task)
    references = [line for line in lines_by_length(runs, selection, task, "auc") if line.reference]
    headings = ["run", "history", *METRICS.values(), "best reference's AUC", "steps", "minutes"]
    cells = []
    for group in group_by_seed(runs):
        lines: dict[str, Line] = {}
        for metric in METRICS:
            for line in lines_by_length(group.runs, selection, task, metric):
                if not line.reference:
                    lines[metric] = line
        if not lines:
            cells.append([f"{group.name}, not scored", *[""] * (len(headings) - 1)])
            continue
        length = max(line.x[-1] for line in lines.values())
        found = {metric: dict(zip(v.x, _numbers(v), strict=True)) for metric, v in lines.items()}
        others = {
            line.y[line.x.index(length)]: line.label for line in references if length in line.x
        }
        best = max(others, default=None)
        steps, speed = statistics.fmean(map(_num_steps, group.runs)), group.steps_per_second()
        cells.append(
            [
                next(iter(lines.values())).label,
                _number(length, 0),
                *(found.get(metric, {}).get(length, "") for metric in METRICS),
                "" if best is None else f"{_number(best, 4)} ({others[best]})",
                _number(steps, 0),
                _number(speed and steps / speed / 60, 1),
            ]
        )
    of_task = f"{task}: " if task else ""
    caption = f"{of_task}{selection}, with the longest history that was scored"
    return _table(caption, headings, cells)


def _num_steps(run: Run) -> int:
    return max((line["step"] for line in run.lines), default=0)


def _quality_tables(runs: Sequence[Run], task: str | None) -> list[str]:
    """A table per metric: a row per line of its chart, a column per length."""
    selection = best_selection(runs, task)
    tables = []
    for metric, label in METRICS.items():
        lines = lines_by_length(runs, selection, task, metric)
        lengths = sorted({length for line in lines for length in line.x})
        cells = []
        for line in lines:
            at = dict(zip(line.x, _numbers(line), strict=True))
            cells.append([line.label, *(at.get(length, "") for length in lengths)])
        of_task = f", {task}" if task else ""
        headings = ["length", *(f"{length:,}" for length in lengths)]
        if cells:
            tables.append(_table(f"{label}{of_task}", headings, cells))
    return tables


def _cost_table(runs: Sequence[Run]) -> str:
    cells = []
    for run in runs:
        steps = _num_steps(run)
        speed, tokens = run.steps_per_second(), run.tokens_per_step()
        cells.append(
            [
                run.name,
                f"{steps:,}",
                _number(speed and steps / speed / 60, 1),
                _number(tokens and tokens * steps / 1e6, 1),
                _number(median(r.get("speed/tokens_per_second") for r in run.lines), 0),
                _number(median(r.get("train/token_fill") for r in run.lines), 3),
            ]
        )
    names = ["run", "steps", "minutes", "million tokens", "tokens / s", "row fill"]
    return _table("Training; times are at the median speed", names, cells)


def _config_table(runs: Sequence[Run]) -> str:
    """Values that differ come first."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))

    def values(name: str) -> list[str]:
        return [str(run.config.get(name, "")) for run in runs]

    names.sort(key=lambda name: len(set(values(name))) == 1)
    differ = sum(len(set(values(name))) > 1 for name in names)
    cells = [
        [name, *(values(name) if k < differ else values(name)[:1])] for k, name in enumerate(names)
    ]
    caption = "As resolved" if len(runs) == 1 else f"{differ} values differ; the others are shared"
    return _table(caption, ["value", *(run.name for run in runs)], cells, kind="config")


def _table(
    caption: str, headings: Sequence[str], cells: Sequence[Sequence[str]], kind: str = "numbers"
) -> str:
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
    body = []
    for first, *rest in cells:
        others = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{html.escape(first)}</th>{others}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _numbers(line: Line) -> list[str]:
    """Each y, with its standard deviation over seeds if there is one."""
    if line.error is None:
        return [_number(y, 4) for y in line.y]
    return [f"{y:.4f} ± {error:.4f}" for y, error in zip(line.y, line.error, strict=True)]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #121314; --muted: #5f6163;
  --rule: #dcdddf; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14171a; --ink: #e8eaec; --muted: #a3a7ab;
  --rule: #363b40; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 82rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ margin: 0; font-size: 1.5rem; line-height: 1.25; }}
h2 {{ margin: 2.5rem 0 .75rem; font-size: 1.15rem; }}
p, figcaption, caption {{ margin: .25rem 0 0; color: var(--muted); font-size: .875rem; }}
.charts {{ display: grid; gap: 2rem 1.5rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; break-inside: avoid; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-family: system-ui, sans-serif !important; }}
.scroll {{ overflow-x: auto; margin-bottom: 1.5rem; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }}
th {{ font-weight: 600; }}
tbody th {{ font-weight: 400; }}
tr {{ break-inside: avoid; }}
.numbers td, .numbers thead th + th {{ text-align: right; }}
.numbers th, .numbers td {{ overflow-wrap: normal; }}
.config {{ width: 100%; }}
@media print {{ :root {{ color-scheme: light; --paper: #fff; --ink: #000; --muted: #444;
  --rule: #ccc; }} body {{ max-width: none; padding: 0; font-size: 10pt; }}
  .charts {{ grid-template-columns: 1fr 1fr; gap: 1.25rem; }} .scroll {{ overflow: visible; }}
  h2 {{ break-after: avoid; }} }}
</style>
</head>
<body>
<header><h1>{title}</h1><p>{datasets}</p></header>
<main>
{body}
</main>
</body>
</html>
"""
