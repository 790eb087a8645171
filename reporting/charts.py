"""Charts as SVG that stands inside a page: its fonts, and its colours in light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# matplotlib needs colours; in the page they become CSS variables, which dark mode changes
_COLOURS = {
    "#010203": "currentColor",
    "#040506": "var(--line)",
    "#070809": "var(--one)",
    "#0a0b0c": "var(--two)",
    "#0d0e0f": "var(--muted)",
}
INK, LINE, ONE, TWO, MUTED = _COLOURS
STEP = "step"  # the label of an axis of whole numbers
WIDTH, HEIGHT = 5.2, 3.0  # inches of 72 px; a phone shows them about 1:1
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dlrm",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.xmargin": 0.01,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.figsize": (WIDTH, HEIGHT),
    "savefig.transparent": True,
    "text.usetex": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        xs, ys: its points.
        colour: ONE, TWO or MUTED.
        name: what a legend says; empty: it is in none.
        style: of the line, as matplotlib has it.
        has_marks: mark each point.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = ONE
    name: str = ""
    style: str = "-"
    has_marks: bool = False


def line_chart(
    name: str,
    labels: tuple[str, str],
    curves: Sequence[Curve],
    mark: tuple[float, float, str] | None = None,
    limits: str = "",
) -> str:
    """Lines over an axis.

    Args:
        name: what the chart shows, for those who cannot see it; no other has the same on the page.
        labels: of both axes.
        curves: the lines, those in front last.
        mark: a point (x, y) to mark, and its words for the legend.
        limits: `square`: both axes show [0, 1]; `zero`: the values' axis begins at 0; empty: the
            values decide.
    """

    def draw(axes: Any) -> None:
        for curve in curves:
            marker = "o" if curve.has_marks or len(curve.xs) == 1 else None
            axes.plot(
                *(curve.xs, curve.ys, curve.style),
                color=curve.colour,
                label=curve.name or None,
                marker=marker,
                markersize=3.5,
            )
        if mark is not None:
            x, y, words = mark
            axes.plot([x], [y], "o", color=TWO, markersize=7, fillstyle="none", label=words)
        if limits == "square":
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        elif limits == "zero":
            axes.set(ylim=(0, 1.1 * max(max(curve.ys) for curve in curves) or 1))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(labelcolor=INK)

    return _as_svg(name, labels, draw)


def bar_chart(
    name: str, labels: tuple[str, str], edges: Sequence[float], bars: Sequence[tuple[str, Any]]
) -> str:
    """Two histograms over the same bins, as outlines.

    Args:
        name: as in line_chart.
        labels: of both axes.
        edges: the ends of all bins.
        bars: (name, height of each bin) of each histogram; two at most.
    """

    def draw(axes: Any) -> None:
        for colour, (legend, heights) in zip((ONE, TWO), bars, strict=False):
            axes.stairs(heights, edges, color=colour, label=legend, linewidth=1.6)
            axes.stairs(heights, edges, color=colour, fill=True, alpha=0.25)
        most = max(max(heights, default=0) for _, heights in bars)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.3 * most or 1))  # with room for the legend
        axes.legend(labelcolor=INK)

    return _as_svg(name, labels, draw)


def _as_svg(name: str, labels: tuple[str, str], draw: Callable[[Any], None]) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    file = io.StringIO()
    with style.context(["default", _SETTINGS]):  # not those of the user's matplotlibrc
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(length=0)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        _make_numbers_readable(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return inlined(file.getvalue(), name)


def _make_numbers_readable(axes: Any) -> None:
    """Steps are whole numbers, and thousands have commas; small numbers have equal digits."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if axes.get_xlabel() == STEP:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if max(-low, high) >= 5000:
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def inlined(svg: str, name: str) -> str:
    """An SVG file of matplotlib as an element of a page that holds others of the same kind.

    Args:
        svg: the file's text.
        name: the words for those who cannot see it; ids are made different by it.
    """
    prefix = re.sub(r"\W+", "-", name.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib's SVG has a viewBox"
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(name)}">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)([\w-]+)', rf"\g<1>{prefix}-\g<2>", svg)
    svg = re.sub(r"font: (?:\d+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, css in _COLOURS.items():
        svg = svg.replace(colour, css)
    return re.sub(r"\s*\n\s*", "\n", svg)
