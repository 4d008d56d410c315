"""One page about one or more runs: quality by history length, by step and by training cost.

The page is a single HTML file that loads nothing. Its charts are drawn once, as SVG whose colours
follow the page (light, dark, paper), and as PNG beside it. Runs that differ in nothing but the seed
are one line, their mean, with bars of one standard deviation. Lines differ in colour, marker and
label; the colours are Okabe and Ito's, which the colour-blind tell apart.
"""

from __future__ import annotations

import collections
import dataclasses
import html
import io
import itertools
import json
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stca_jax.errors import UserError
from stca_jax.evaluation.best import read_best
from stca_jax.files import read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_MAX_LINES = len(_PALETTE)
# In the SVG these become the page's colours; in the PNG they are seen as they are, on white.
_INK, _MUTED, _RULE = "#121314", "#696a6b", "#dcdddf"
_CSS_COLORS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)"}
_REFERENCE_STYLES = {"counting": ":", "logistic": "--", "truth": "-."}
_METRICS = {
    "auc": "AUC",
    "gauc_user": "AUC within users",
    "log_loss": "log loss (nats)",
    "calibration": "predicted / observed",
}
_CALIBRATED = (0.98, 1.02)
_SEEDS = ("seed", "input.seed")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own font
    "svg.hashsalt": "stca_jax",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _RULE,
}


class Selection(NamedTuple):
    """Which requests a row is of.

    Attributes:
      split: "train", "validation" or "test".
      min_history: Least number of earlier events.
      max_requests: Size of the sample; None is all of them.
    """

    split: str
    min_history: int
    max_requests: int | None

    def __str__(self) -> str:
        number = "All" if self.max_requests is None else f"Up to {self.max_requests:,}"
        least = f" after at least {self.min_history:,} events" if self.min_history else ""
        return f"{number} requests of the {self.split} split{least}"


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
            if row["model"] == model and row.get("task") == task and _selection_of(row) == selection
        ]

    def steps_per_second(self) -> float | None:
        """Median speed of the training, pauses and compilation aside; None if it was not timed."""
        return _median(line.get("speed/steps_per_second") for line in self.lines)

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
        return _median(run.steps_per_second() for run in self.runs)


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
        rows += [row for row in read_json_lines(path) if row.keys() >= set(Selection._fields)]
    keys = (*Selection._fields, "model", "task", "step", "length")
    unique = {tuple(row.get(key) for key in keys): row for row in rows}
    best = read_best(workdir)
    return Run(name, config, list(unique.values()), lines, best["step"] if best else None)


def write_report(runs: Sequence[Run], output: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes the page, and its charts as PNG into a directory beside it that has the same name.

    Args:
      runs: At least one; more than six share colours.
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
        raise UserError(f"no evaluation of {names} yet: run python -m experiments.evaluate first")
    charts = [chart for task in tasks for chart in _quality_charts(runs, task)]
    charts += _throughput_charts(runs)
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    written, figures = [output], []
    for chart in charts:
        figure = draw(chart)
        written.append(folder / f"{chart.name}.png")
        figure.savefig(written[-1], dpi=200, facecolor="white")
        figures.append(_figure_html(chart, figure))
    output.write_text(_page(runs, tasks, figures), encoding="utf-8")
    return written


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


def _quality_charts(runs: Sequence[Run], task: str | None) -> list[Chart]:
    suffix = f"_{task}" if task else ""
    of_task = f" ({task})" if task else ""
    by_length = best_selection(runs, task)
    charts = []
    for metric, label in _METRICS.items():
        lines = lines_by_length(runs, by_length, task, metric)
        if not lines:
            continue
        band = _CALIBRATED if metric == "calibration" else None
        note = " The band is 2 % on either side of calibrated." if band else ""
        charts.append(
            Chart(
                f"{metric}_by_length{suffix}",
                f"{label[0].upper()}{label[1:]} by history length{of_task}",
                f"{by_length}; one checkpoint of each run.{note}",
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
                    f"{by_step}.{note}",
                    unit,
                    "AUC",
                    lines,
                )
            )
    return charts


def _throughput_charts(runs: Sequence[Run]) -> list[Chart]:
    lines = []
    for run in runs[:_MAX_LINES]:
        points = [
            (line["step"], line["speed/tokens_per_second"])
            for line in run.lines
            if line.get("speed/tokens_per_second")
        ]
        if points:
            lines.append(Line(run.name, [p[0] for p in points], [p[1] for p in points]))
    caption = "The time of validation and of checkpoints is included."
    title, labels = "Training throughput", ("training step", "history tokens / s")
    chart = Chart("throughput", title, caption, *labels, lines, from_zero=True)
    return [chart] if lines else []


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
                steps.setdefault(_selection_of(row), set()).add(key)

    def rank(selection: Selection) -> tuple[int, ...]:
        found = steps[selection]
        num_runs = len({name for name, *_ in found})
        is_test = selection.split == "test"
        return (num_runs, *((len(found), is_test) if across_steps else (is_test, len(found))))

    return max(steps, key=rank)


def lines_by_length(
    runs: Sequence[Run], selection: Selection, task: str | None, metric: str
) -> list[Line]:
    """A metric at each length: of one checkpoint per run, seeds averaged, and of the references."""
    lines = []
    for group in group_by_seed(runs)[:_MAX_LINES]:
        tables = []
        for run in group.runs:
            step = shown_step(run, selection, task)
            tables.append([row for row in run.rows_of(selection, task) if row["step"] == step])
        label = group.name if len(tables) > 1 else f"{group.name}, step {step}"
        lines.append(mean_line(label, tables, "length", metric))
    for name in _REFERENCE_STYLES:
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
    """A metric after each step: of a single line of runs at each length, else at the longest."""
    lengths = sorted(
        {row["length"] for run in runs for row in run.rows_of(selection, task)}, reverse=True
    )
    lines = []
    groups = group_by_seed(runs)
    for group in groups[:_MAX_LINES]:
        speed = group.steps_per_second() if in_minutes else 1.0
        if not speed:
            continue
        tables = [run.rows_of(selection, task) for run in group.runs]
        own = [n for n in lengths if all(any(r["length"] == n for r in rows) for rows in tables)]
        for length in own[: 1 if len(groups) > 1 else _MAX_LINES]:
            label = f"{length:,} events"
            label = f"{group.name}, {label}" if len(groups) > 1 else label
            at_length = [[r for r in rows if r["length"] == length] for rows in tables]
            line = mean_line(label, at_length, "step", metric)
            scale = 1 / (speed * 60) if in_minutes else 1
            lines.append(line._replace(x=[x * scale for x in line.x]))
    return [line for line in lines if line.x]


def shown_step(run: Run, selection: Selection, task: str | None) -> int | None:
    """The checkpoint whose lengths are shown: the best if it was scored, else the last."""
    steps = {row["step"] for row in run.rows_of(selection, task)}
    return run.best_step if run.best_step in steps else max(steps, default=None)


def mean_line(
    label: str,
    tables: Sequence[Sequence[Row]],
    x: str,
    metric: str,
    reference: str | None = None,
) -> Line:
    """The mean of a metric over tables, wherever all of them have it.

    Args:
      label: For the legend.
      tables: Rows of each seed.
      x: Column of the horizontal axis.
      metric: Column of the vertical one.
      reference: See `Line`.
    """
    columns = [{r[x]: r[metric] for r in rows if r.get(metric) is not None} for rows in tables]
    shared = sorted(set.intersection(*map(set, columns)))
    values = [[column[at] for column in columns] for at in shared]
    error = [statistics.stdev(v) for v in values] if len(columns) > 1 else None
    return Line(label, shared, [statistics.fmean(v) for v in values], reference, error)


def draw(chart: Chart) -> Figure:
    """A chart on white, as it looks on paper.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError(
            "the report needs matplotlib, which is not installed: pip install 'stca-jax[report]'"
        ) from error
    columns = 2 if max(len(line.label) for line in chart.lines) <= 24 else 1
    legend_rows = -(-len(chart.lines) // columns)
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08)  # inches, for labels at the very ends
        figure = Figure(figsize=(4.6, 3.0 + 0.19 * legend_rows), layout=layout)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(chart.title, loc="left", color=_INK, fontweight="bold")
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if chart.band:
            axes.axhspan(*chart.band, color=_RULE, alpha=0.5, linewidth=0, zorder=0)
        _draw_lines(axes, chart.lines)
        if chart.lengths:
            lengths = sorted({x for line in chart.lines for x in line.x})
            axes.set_xscale("log")
            axes.set_xticks(_spread(lengths), [_short(x) for x in _spread(lengths)])
            axes.minorticks_off()
        else:
            axes.set_xlim(left=0)
        if chart.from_zero:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda y, _: _short(y))
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, handlelength=2.6)
    return figure


def _draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    runs = 0
    for line in lines:
        style: dict[str, Any]
        if line.reference:
            style = {"color": _MUTED, "linestyle": _REFERENCE_STYLES[line.reference]}
        else:
            style = {
                "color": _PALETTE[runs % _MAX_LINES],
                "marker": _MARKERS[runs % _MAX_LINES] if len(line.x) <= 40 else "",
                "markersize": 4.5,
            }
            runs += 1
        axes.errorbar(
            line.x, line.y, line.error, label=line.label, linewidth=1.7, capsize=2, **style
        )


def _spread(lengths: Sequence[float]) -> list[float]:
    """The lengths, less those whose labels would touch the label of a longer one."""
    kept: list[float] = []
    for length in reversed(lengths):
        if not kept or kept[-1] / length > (lengths[-1] / lengths[0]) ** (1 / 9):
            kept.append(length)
    return kept[::-1]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number < 10_000 else f"{number / 1000:.3g}k"


def _figure_html(chart: Chart, figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes one
    svg = f'<svg {box[0]} aria-hidden="true">' + svg[svg.index(">", box.end()) + 1 :]
    svg = svg.replace("xlink:href", "href")
    # Ids must differ between all the charts of a page.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{chart.name}-", svg)
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, variable)
    return (
        f'<figure role="group" aria-label="{html.escape(chart.title)}">{svg}'
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _page(runs: Sequence[Run], tasks: Sequence[str | None], figures: Sequence[str]) -> str:
    title = ", ".join(run.name for run in runs)
    tables = [table for task in tasks for table in _quality_tables(runs, task)]
    sections = [
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


def _quality_tables(runs: Sequence[Run], task: str | None) -> list[str]:
    """A table per metric: a row per line of its chart, a column per length."""
    selection = best_selection(runs, task)
    tables = []
    for metric, label in _METRICS.items():
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
        steps = max((line["step"] for line in run.lines), default=0)
        speed, tokens = run.steps_per_second(), run.tokens_per_step()
        cells.append(
            [
                run.name,
                f"{steps:,}",
                _number(speed and steps / speed / 60, 1),
                _number(tokens and tokens * steps / 1e6, 1),
                _number(_median(r.get("speed/tokens_per_second") for r in run.lines), 0),
                _number(_median(r.get("train/token_fill") for r in run.lines), 3),
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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _selection_of(row: Row) -> Selection:
    return Selection(*(row[name] for name in Selection._fields))


def _validation_rows(lines: Sequence[Row], config: Mapping[str, Any]) -> list[Row]:
    """The training's own validation, as rows of an evaluation.

    Its length is that of the line: a resumed run may have changed the config's.
    """
    rows: dict[tuple[int, str | None], dict[str, Any]] = {}
    for line in lines:
        for name, value in line.items():
            prefix, *task = name.split("/")
            metric = task.pop() if task else ""
            if prefix != "validation" or metric not in _METRICS:
                continue
            row = rows.setdefault(
                (line["step"], task[0] if task else None),
                {
                    "model": "stca",
                    "split": "validation",
                    "min_history": config["evaluation.min_history"],
                    "max_requests": config["evaluation.validation_requests"],
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
