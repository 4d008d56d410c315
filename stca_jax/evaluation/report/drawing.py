"""Draws a chart, as a figure on white and as SVG whose colours follow the page.

Lines differ in colour, marker and label; the colours are Okabe and Ito's, which the colour-blind
tell apart.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stca_jax.errors import UserError
from stca_jax.evaluation.report.charts import Chart, Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
# In the SVG these become the page's colours; in the PNG they are seen as they are, on white.
_INK, _MUTED, _RULE = "#121314", "#696a6b", "#dcdddf"
_CSS_COLORS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)"}
_REFERENCE_STYLES = {
    "counting": ":", "logistic": "--", "boosted": (0, (4, 1, 1, 1, 1, 1)), "truth": "-."
}  # fmt: skip
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
            'the report needs matplotlib, which is not installed: pip install -e ".[report]"'
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
                "color": _PALETTE[runs % len(_PALETTE)],
                # With every round of colours the markers move on by one.
                "marker": _MARKERS[sum(divmod(runs, len(_PALETTE))) % len(_MARKERS)],
                "markevery": max(1, len(line.x) // 40),
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


def figure_html(chart: Chart, figure: Figure) -> str:
    """The figure as SVG with the chart's caption."""
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
