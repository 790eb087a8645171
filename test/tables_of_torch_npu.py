"""Tables with a column for each version of torch_npu: signatures_of_torch_npu.tsv, operators.tsv.

Columns go from the oldest version to the newest. A cell `=` has what the cell to its left has, so
that a line shows in which versions something changes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

SAME = "="
PREFIX = "torch_npu_"

Columns = dict[str, dict[str, str]]  # version: name: cell


def version_of(wheel: Path) -> str:
    """`2.7.1.post10` of a file named torch_npu-2.7.1.post10-cp311-...whl."""
    return wheel.name.split("-")[1]


def numbers_of(version: str) -> list[int]:
    """What versions are sorted by."""
    return [int(number) for number in re.findall(r"\d+", version)]


def read(path: Path) -> Columns:
    """The columns of a table, without `=`."""
    header, *lines = path.read_text().splitlines()
    columns: Columns = {name.removeprefix(PREFIX): {} for name in header.split("\t")[1:]}
    for line in lines:
        name, *cells = line.split("\t")
        before = ""
        for column, cell in zip(columns.values(), cells, strict=True):
            before = column[name] = before if cell == SAME else cell
    return columns


def text_of(columns: Columns, names: Sequence[str], absent: str) -> str:
    """The text of a table that has these names as lines; `absent` is written where one has none."""
    versions = sorted(columns, key=numbers_of)
    lines = ["\t".join(["name", *(PREFIX + version for version in versions)])]
    for name in names:
        cells = [columns[version].get(name, absent) for version in versions]
        shown = [
            SAME if one == other else one
            for one, other in zip(cells, [None, *cells[:-1]], strict=True)
        ]
        lines.append("\t".join([name, *shown]))
    return "\n".join(lines) + "\n"
