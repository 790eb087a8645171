"""The numbers of a run over its steps, and how many of them a picture can show."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 1000  # of a curve in a picture

TRAINING_COLUMNS = ("loss", "lr", "rows_per_second")
EVALUATION_COLUMNS = ("auc", "log_loss", "accuracy", "best_auc", "best_accuracy")


@dataclass
class Series:
    """Columns of numbers by step; nan where a number is not known.

    Attributes:
        names: the columns.
        steps: ascending steps, each once.
        columns: the numbers of each column.
    """

    names: tuple[str, ...]
    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        # 8 bytes a number: a list would take 32, and runs of millions of lines keep all of them
        self.columns = {name: array("d") for name in self.names}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a step; later steps, and this one, are forgotten first.

        They are there if a run that was killed has done them, and has gone on from before them.
        """
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for column in self.columns.values():
                column.pop()
        self.steps.append(step)
        for name in self.names:
            value = values.get(name)
            self.columns[name].append(math.nan if value is None else float(value))


@dataclass
class History:
    """All log lines and evaluations of a run, by step."""

    training: Series = field(default_factory=lambda: Series(TRAINING_COLUMNS))
    evaluations: Series = field(default_factory=lambda: Series(EVALUATION_COLUMNS))

    def add_lines(self, lines: Iterable[Mapping[str, Any]], last_step: int) -> None:
        """Add the lines of a metrics file up to a step; lines with odd values are left out."""
        for line in lines:
            step, series = line["step"], self._series_of(line["kind"])
            if series is None or not isinstance(step, int) or not 0 < step <= last_step:
                continue
            if all(_is_number(line.get(name)) for name in series.names):
                series.add(step, line)

    def _series_of(self, kind: Any) -> Series | None:
        if kind == "train":
            return self.training
        return self.evaluations if kind == "evaluation" else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def thinned(
    steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[int], list[float]]:
    """At most `most` points of a curve: of each stretch of it the lowest and the highest one.

    Values that are not finite are left out. The first and the last of the others stay.

    Args:
        steps: ascending steps.
        values: the value at each step.
        most: points to keep, an even number from 4 on.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(points) > most:
        inner, num = points[1:-1], (most - 2) // 2
        cuts = [len(inner) * number // num for number in range(num + 1)]
        kept = [points[0]]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            numbers = range(begin, end)
            lowest = min(numbers, key=lambda number: inner[number][1])
            highest = max(numbers, key=lambda number: inner[number][1])
            kept += [inner[number] for number in sorted({lowest, highest})]
        points = [*kept, points[-1]]
    return [step for step, _ in points], [value for _, value in points]
