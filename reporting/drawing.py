"""Boxes with text and arrows between them, drawn into an SVG file by matplotlib.

Sizes are computed here from the letters, so that a layout needs neither matplotlib nor a font.
All lengths are points (1/72 inch), and y grows downwards.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import RankError, UserError
from common.versions import problem_of_import
from common.whole_files import check_place, target_of, write_whole

PADDING = 6.0  # between the edge of a box and what is in it
GAP = 8.0  # between boxes that lie in the same box
ARROW = 30.0  # length of an arrow, at least; it leaves room for a label
LINE_HEIGHT = 1.35  # of a line of text, as a multiple of its size

# Widths of letters as multiples of the text's size: at least those of DejaVu Sans, which are wider
# than those of the fonts that viewers take in its place.
_NARROW, _WIDE = frozenset(" ,.:;'|()[]ijlf/"), frozenset("mwMW@%+=<>×→·")
_WIDTHS = {"narrow": 0.4, "wide": 1.0, "capital": 0.8, "other": 0.65}
_BOLD = 1.13  # bold letters are wider by this factor
_FONTS = ["DejaVu Sans", "Verdana", "Arial"]

# fill and edge of each style of box
STYLES = {
    "bare": ("none", "none"),
    "frame": ("#f7f8fa", "#c3c9d2"),
    "mlp": ("#f7f8fa", "#c3c9d2"),
    "rank": ("#eceff4", "#aab3c0"),
    "input": ("#ffffff", "#6b7480"),
    "layer": ("#dbe9f9", "#3f73b5"),
    "table": ("#dff2e1", "#3d8b4b"),
    "part": ("#f4fbf4", "#7db888"),
    "exchange": ("#fdebd3", "#c77d1c"),
    "interaction": ("#eae1f6", "#7a54ad"),
    "loss": ("#fbe0e0", "#b9494b"),
}
_INK, _ARROW_INK = "#1c2330", "#4b5563"


@dataclass(frozen=True)
class Line:
    """A line of text.

    Attributes:
        words: the text.
        size: height of its letters with the space that they need.
        bold: whether its letters are bold.
    """

    words: str
    size: float = 9.0
    bold: bool = False

    @property
    def width(self) -> float:
        """At least the width that it is drawn with."""
        letters = sum(_WIDTHS[_kind(letter)] for letter in self.words)
        return math.ceil(self.size * letters * (_BOLD if self.bold else 1))

    @property
    def height(self) -> float:
        """The distance to the next line."""
        return round(self.size * LINE_HEIGHT)


def _kind(letter: str) -> str:
    if letter in _NARROW:
        return "narrow"
    if letter in _WIDE:
        return "wide"
    return "capital" if letter.isupper() else "other"


@dataclass(frozen=True)
class Box:
    """A rectangle with lines of text, and below these perhaps other boxes.

    Attributes:
        x: left edge, from the left edge of the box that it lies in.
        y: upper edge, from the upper edge of that box.
        width: size from left to right.
        height: size from top to bottom.
        lines: its text. Lines are centred, but those of a bare box begin at its left edge; without
            boxes below it the text is in the middle of the height.
        style: one of STYLES.
        inner: the boxes in it.
    """

    x: float
    y: float
    width: float
    height: float
    lines: tuple[Line, ...]
    style: str
    inner: tuple["Box", ...] = ()

    @property
    def text_height(self) -> float:
        """Height of all its lines."""
        return sum(line.height for line in self.lines)

    @property
    def text_top(self) -> float:
        """Upper edge of its first line, from its own upper edge."""
        return PADDING if self.inner else (self.height - self.text_height) / 2

    def at(self, x: float, y: float) -> "Box":
        """The same box in another place."""
        return replace(self, x=x, y=y)

    def all_boxes(self, x: float = 0.0, y: float = 0.0) -> Iterator["Box"]:
        """This box and all boxes in it, with places from a common corner.

        Args:
            x: left edge of what this box lies in.
            y: upper edge of what this box lies in.
        """
        here = self.at(x + self.x, y + self.y)
        yield here
        for box in self.inner:
            yield from box.all_boxes(here.x, here.y)


@dataclass(frozen=True)
class Arrow:
    """A straight arrow from (x, y) to (to_x, to_y)."""

    x: float
    y: float
    to_x: float
    to_y: float


@dataclass(frozen=True)
class Picture:
    """What is drawn: boxes, of which those further behind lie on top, and arrows."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]

    def all_boxes(self) -> list[Box]:
        """The boxes and all boxes in them, with places from the picture's upper left corner."""
        return [inner for box in self.boxes for inner in box.all_boxes()]


# ---------------------------------------------------------------- boxes as large as their content


def text_box(lines: Sequence[Line], style: str) -> Box:
    """A box that is as large as its text."""
    width = max(line.width for line in lines) + 2 * PADDING
    box = Box(0, 0, width, 0, tuple(lines), style)
    return replace(box, height=box.text_height + 2 * PADDING)


def grid_box(
    lines: Sequence[Line], cells: Sequence[Box], num_columns: int, style: str, gap: float = GAP
) -> Box:
    """A box with lines of text above rows of boxes.

    Args:
        lines: the text.
        cells: the boxes, from left to right and then from top to bottom; all have the same width.
        num_columns: boxes in a row.
        style: one of STYLES.
        gap: distance between rows.
    """
    (cell_width,) = {cell.width for cell in cells}
    content = num_columns * (cell_width + GAP) - GAP
    width = 2 * PADDING + max([content, *(line.width for line in lines)])
    left = (width - content) / 2
    y = 2 * PADDING + sum(line.height for line in lines)
    inner: list[Box] = []
    for begin in range(0, len(cells), num_columns):
        row = cells[begin : begin + num_columns]
        inner += [cell.at(left + k * (cell_width + GAP), y) for k, cell in enumerate(row)]
        y += max(cell.height for cell in row) + gap
    return Box(0, 0, width, y - gap + PADDING, tuple(lines), style, tuple(inner))


def of_equal_width(boxes: Sequence[Box]) -> list[Box]:
    """The boxes, each as wide as the widest; boxes in them, one below the other, grow along."""
    width = max(box.width for box in boxes)
    return [
        replace(
            box,
            width=width,
            inner=tuple(
                replace(inner, x=PADDING, width=width - 2 * PADDING) for inner in box.inner
            ),
        )
        for box in boxes
    ]


@dataclass(frozen=True)
class Column:
    """Boxes one below the other, and the arrows that go up from each.

    Attributes:
        boxes: from top to bottom.
        labels: what stands beside the arrow that goes up from each box; None: there is no arrow.
    """

    boxes: tuple[Box, ...]
    labels: tuple[str | None, ...]

    @property
    def width(self) -> float:
        """Size from left to right; labels stand to the right of the middle."""
        beside = [2 * label.width for label in map(_label, self.labels) if label is not None]
        return max([box.width for box in self.boxes] + beside)

    @property
    def height(self) -> float:
        """Size from top to bottom, arrows included."""
        return sum(box.height for box in self.boxes) + self._num_arrows * ARROW

    @property
    def _num_arrows(self) -> int:
        return len(self.labels) - self.labels.count(None)

    def placed(self, middle: float, y: float, height: float = 0.0) -> Picture:
        """The boxes, labels and arrows, with the first upper edge or arrowhead at y.

        Args:
            middle: x of the middle of all boxes.
            y: where it begins.
            height: what it is to fill by longer arrows, if that is more than its own height.
        """
        boxes: list[Box] = []
        arrows: list[Arrow] = []
        longer = max(height - self.height, 0) / max(self._num_arrows, 1)
        begin = y
        for box, words in zip(self.boxes, self.labels, strict=True):
            label = _label(words)
            if label is not None:
                end = y + ARROW + longer
                arrows.append(Arrow(middle, end, middle, y))
                if words:
                    boxes.append(label.at(middle, (y + end - label.height) / 2))
                y = end
            boxes.append(box.at(middle - box.width / 2, y))
            y += box.height
        return Picture(self.width, y - begin, tuple(boxes), tuple(arrows))


def _label(words: str | None) -> Box | None:
    return None if words is None else text_box([Line(words, 8)], "bare")


# ---------------------------------------------------------------- the file


def check_drawable(flag: str, path: Path) -> None:
    """Raise a UserError now if the picture could not be drawn, not after data has been prepared.

    Args:
        flag: the flag that asks for the picture.
        path: where it is to be written.
    """
    if problem := problem_of_import("matplotlib", _import_matplotlib):
        raise UserError(f"{flag}: {problem}")
    check_place(f"{flag}: {path.absolute()}", path, "start in another folder")


def _import_matplotlib() -> None:
    """Import all that the file needs of it."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.patches
    import matplotlib.style  # noqa: F401


def save_svg(flag: str, picture: Picture, path: Path) -> None:
    """Write the picture as SVG whose text stays text; equal pictures become equal bytes.

    Args:
        flag: the flag that asks for it.
        picture: the picture.
        path: the file; it appears whole or not at all. If it is a link, its target is written.

    Raises:
        RankError: it cannot be written; a file that was there before is kept.
    """
    from matplotlib import style  # takes a second, so only runs that draw import it

    settings: Any = {
        "font.family": ["sans-serif"],
        "font.sans-serif": _FONTS,
        "svg.fonttype": "none",
    }

    def write(file: BinaryIO) -> None:
        with style.context(["default", settings]):  # not those of the user's matplotlibrc
            _draw(picture).savefig(file, format="svg", metadata={"Date": None, "Creator": None})

    try:
        write_whole([(target_of(path), write)])
    except OSError as error:
        raise RankError(
            f"{flag}: {path.absolute()} cannot be written ({error.strerror or error}):"
            " make room there or start in another folder"
        ) from error


def _draw(picture: Picture) -> Any:
    """matplotlib's figure of the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(picture.width / 72, picture.height / 72), dpi=72, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_axis_off()
    for box in picture.all_boxes():
        _draw_box(axes, box)
    for arrow in picture.arrows:
        _draw_arrow(axes, arrow)
    return figure


def _draw_box(axes: Any, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, edge = STYLES[box.style]
    if box.style != "bare":
        shape = "round,pad=0,rounding_size=3"
        rectangle = FancyBboxPatch(
            (box.x, box.y), box.width, box.height, boxstyle=shape, fc=fill, ec=edge, lw=0.8
        )
        axes.add_patch(rectangle).set_clip_on(False)
    y = box.y + box.text_top
    is_bare = box.style == "bare"
    x = box.x + (PADDING if is_bare else box.width / 2)
    for line in box.lines:
        axes.text(
            x,
            y + line.height / 2 + 0.36 * line.size,  # the base line; capitals are 0.72 high
            line.words,
            ha="left" if is_bare else "center",
            va="baseline",
            fontsize=line.size,
            fontweight="bold" if line.bold else "normal",
            color=_INK,
        )
        y += line.height


def _draw_arrow(axes: Any, arrow: Arrow) -> None:
    from matplotlib.patches import FancyArrowPatch

    begin, end = (arrow.x, arrow.y), (arrow.to_x, arrow.to_y)
    patch = FancyArrowPatch(
        begin, end, arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, lw=1, color=_ARROW_INK
    )
    axes.add_patch(patch).set_clip_on(False)
