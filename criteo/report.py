"""The report of a preparation: counts of the text, as JSON and as a table; doubts about files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from operator import add
from pathlib import Path
from typing import Any

from common.errors import UserError
from criteo.columns import FIRST_SPARSE, NAMES, NUM_FIELDS, NUM_SPARSE

KAGGLE_ROWS = 45_840_617
DAY_ROWS = (  # Criteo Terabyte Click Logs, day_0 to day_23: 4,373,472,329 rows
    195_841_983, 199_563_535, 196_792_019, 181_115_208, 152_115_810, 172_548_507,
    204_846_845, 200_801_003, 193_772_492, 198_424_372, 185_778_055, 153_588_700,
    169_003_364, 194_216_520, 194_081_279, 187_154_596, 177_984_934, 163_382_602,
    142_061_091, 156_534_237, 193_627_464, 192_215_183, 189_747_893, 178_274_637,
)  # fmt: skip
# what reading a file that is no report raises
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
SAMPLE_SHARE = 0.6  # a file with at most this share of the published rows is taken for a sample


@dataclass(frozen=True)
class TextCounts:
    """Counts of lines of text, and of the rows that are kept of them.

    Attributes:
        lines: number of lines, bad ones included.
        text_bytes: bytes of these lines.
        clicks: good lines with label 1.
        rows: good lines that are kept.
        kept_clicks: kept lines with label 1.
        missing: (40,) good lines that lack a value, by column.
        largest: (14,) largest kept value of the label and the integers.
        bad: number of bad lines by kind.
        first_bad: file, number and fault of the first bad line; empty if there is none.
    """

    lines: int = 0
    text_bytes: int = 0
    clicks: int = 0
    rows: int = 0
    kept_clicks: int = 0
    missing: tuple[int, ...] = (0,) * NUM_FIELDS
    largest: tuple[int, ...] = (0,) * FIRST_SPARSE
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""

    @property
    def num_bad(self) -> int:
        """Bad lines of all kinds."""
        return sum(self.bad.values())

    def __add__(self, later: "TextCounts") -> "TextCounts":
        """The counts of these lines and of lines that follow them."""
        kinds = [*self.bad, *(kind for kind in later.bad if kind not in self.bad)]
        return TextCounts(
            lines=self.lines + later.lines,
            text_bytes=self.text_bytes + later.text_bytes,
            clicks=self.clicks + later.clicks,
            rows=self.rows + later.rows,
            kept_clicks=self.kept_clicks + later.kept_clicks,
            missing=tuple(map(add, self.missing, later.missing)),
            largest=tuple(map(max, self.largest, later.largest)),
            bad={kind: self.bad.get(kind, 0) + later.bad.get(kind, 0) for kind in kinds},
            first_bad=self.first_bad or later.first_bad,
        )

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_json(cls, attributes: dict[str, Any]) -> "TextCounts":
        """The counts that `to_json` returned, read back from JSON."""
        tuples = {name: tuple(attributes[name]) for name in ("missing", "largest")}
        return cls(**(attributes | tuples))


def make_report(
    text: TextCounts,
    lines_per_file: Sequence[int],
    counts: Sequence[int],
    columns: list[list[str]],
    rows: dict[str, int],
) -> dict[str, Any]:
    """The report: what the text held and which rows are kept, as JSON takes it.

    Args:
        text: the counts over all files.
        lines_per_file: lines of each file.
        counts: rows of each of the 26 tables.
        columns: name and type of each of the 40 columns on disk.
        rows: number of rows of each split.
    """
    good = text.lines - text.num_bad
    return {
        "lines": text.lines,
        "lines_per_file": list(lines_per_file),
        "bytes_of_text": text.text_bytes,
        "bad_lines": text.bad,
        "first_bad_line": text.first_bad,
        "label_rate": text.clicks / max(good, 1),
        "missing_rate": {
            NAMES[column]: text.missing[column] / max(good, 1) for column in range(1, NUM_FIELDS)
        },
        "rows_kept": text.rows,
        "rows": rows,
        "label_rate_kept": text.kept_clicks / max(text.rows, 1),
        "distinct_values": dict(zip(NAMES[-NUM_SPARSE:], counts, strict=True)),
        "columns": columns,
    }


def read_report_table(path: Path) -> str:
    """The report in a file as lines for people.

    Raises:
        UserError: the file is no report.
    """
    try:
        return report_table(json.loads(path.read_bytes()))
    except _DAMAGES as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is damaged ({fault}): delete it, training does not read it"
        ) from error


def find_report(path: Path) -> dict[str, Any]:
    """The report in a file, for those who can do without: empty if it is not there or damaged."""
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
        report_table(report)  # fails if a value is missing or wrong
    except (OSError, *_DAMAGES):
        return {}
    return report


def report_table(report: dict[str, Any]) -> str:
    """The report as lines for people: totals, then a line a column."""
    rows, types = report["rows"], dict(report["columns"])
    bytes_a_row = sum(int(kind[-1]) for kind in types.values())
    bad = ", ".join(f"{number:,} {kind}" for kind, number in report["bad_lines"].items())
    lines = [
        f"lines read   {report['lines']:>15,}  in {len(report['lines_per_file'])} files,"
        f" {report['bytes_of_text'] / 1e6:,.1f} MB of text",
        f"bad lines    {sum(report['bad_lines'].values()):>15,}  {bad}".rstrip(),
        f"rows kept    {report['rows_kept']:>15,}  {rows['train']:,} train, {rows['test']:,} test,"
        f" {rows['val']:,} validation; {bytes_a_row} bytes a row",
        f"label 1      {100 * report['label_rate']:>13.3f} %  of the lines,"
        f" {100 * report['label_rate_kept']:.3f} % of the rows kept",
        f"{'column':<8}{'type':>5}{'missing':>11}{'distinct':>15}",
    ]
    for name in NAMES[1:]:
        distinct = report["distinct_values"].get(name)
        lines.append(
            f"{name:<8}{types[name]:>5}{100 * report['missing_rate'][name]:>9.2f} %"
            + (f"{distinct:>15,}" if distinct is not None else "")
        )
    return "\n".join(lines)


def find_doubts(
    data_set: str,
    names: Sequence[str],
    lines: Sequence[int],
    published: Sequence[int] | None = None,
) -> list[str]:
    """Sentences about files that look like Criteo's own but are not complete.

    Files look like Criteo's own if one of them has more than SAMPLE_SHARE of the rows that Criteo
    published for it. Smaller files are samples, which are never doubted.

    Args:
        data_set: kaggle or terabyte.
        names: the files' names, in order.
        lines: number of lines of each file.
        published: rows that Criteo published for each file; None: those of `data_set`.
    """
    if published is None:
        published = (KAGGLE_ROWS,) if data_set == "kaggle" else DAY_ROWS
    files = list(zip(names, lines, published, strict=False))
    if not any(found > SAMPLE_SHARE * rows for _, found, rows in files):
        return []
    doubts = [
        f"{name} has {found:,} rows, Criteo's own has {rows:,}"
        + (": it may be truncated" if found < rows else "")
        for name, found, rows in files
        if found != rows
    ]
    if len(lines) != len(published):
        doubts.append(f"there are {len(lines)} files, Criteo's own are {len(published)}")
    return doubts
