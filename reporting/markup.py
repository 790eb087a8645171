"""Pieces of the report's HTML; whatever comes from a run is escaped here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of a class."""
    return f'<p class="{kind}">{escape(text)}</p>'


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; empty if there is nothing."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def grid(parts: Iterable[str], kind: str) -> str:
    """Parts side by side where there is room."""
    body = "\n".join(part for part in parts if part)
    return f'<div class="{kind}">\n{body}\n</div>' if body else ""


def tile(name: str, value: str, more: str = "") -> str:
    """A number of the headline."""
    below = f'<div class="more">{escape(more)}</div>' if more else ""
    return f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}{below}</dd></div>'


def tiles(parts: Iterable[str]) -> str:
    """The headline."""
    return '<dl class="tiles">\n{}\n</dl>'.format("\n".join(parts))


def figure(title: str, svg: str, caption: str = "") -> str:
    """A chart with its title."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>\n{svg}\n{below}</figure>"


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    """Names and values; empty if there are none."""
    if not facts:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return (
        f'<div class="card"><table class="facts"><caption>{escape(title)}</caption>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def number_table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], shares: Sequence[float] = ()
) -> str:
    """A table whose first column is text, and the others numbers.

    Args:
        title: what stands above it.
        head: the names of the columns.
        rows: the text of the cells.
        shares: a bar of such a share of a last column's width in each row; empty: no such column.
    """
    last = '<th class="share"></th>' if shares else ""
    first = f'<th scope="col">{escape(head[0])}</th>'
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in head[1:])
    lines = []
    for number, (name, *cells) in enumerate(rows):
        values = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        width = f"{100 * shares[number]:.1f}%" if shares else ""
        bar = (
            f'<td class="share"><span class="bar" style="width:{width}"></span></td>'
            if shares
            else ""
        )
        lines.append(f"<tr><td>{escape(name)}</td>{values}{bar}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="card"><table><caption>{escape(title)}</caption>\n'
        f"<thead><tr>{first}{heads}{last}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def number_text(value: float, digits: int = 4) -> str:
    """A number with so many digits after the point; `none` for nan."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "none"


def bytes_text(num_bytes: float) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.2f} kB"


def time_text(seconds: float) -> str:
    """A duration."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"
