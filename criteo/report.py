"""What preparation found in the data, as JSON and as a table, held against Criteo's own."""

from collections.abc import Sequence
from typing import Any

from criteo.columns import NAMES, NUM_FIELDS, NUM_SPARSE

KAGGLE_ROWS = 45_840_617
DAY_ROWS = (  # Criteo Terabyte Click Logs, day_0 to day_23: 4,373,472,329 rows
    195_841_983, 199_563_535, 196_792_019, 181_115_208, 152_115_810, 172_548_507,
    204_846_845, 200_801_003, 193_772_492, 198_424_372, 185_778_055, 153_588_700,
    169_003_364, 194_216_520, 194_081_279, 187_154_596, 177_984_934, 163_382_602,
    142_061_091, 156_534_237, 193_627_464, 192_215_183, 189_747_893, 178_274_637,
)  # fmt: skip
LOOKS_PUBLISHED = 0.6  # of the published rows in one file: no sample, so all files shall be whole


def make_report(
    totals: dict[str, Any], counts: Sequence[int], columns: list[list[str]], rows: dict[str, int]
) -> dict[str, Any]:
    """What was read and what was kept of it, as JSON takes it.

    Args:
        totals: sums over all pieces.
        counts: rows of each table.
        columns: name and type of each column on disk.
        rows: of each split.
    """
    lines, kept = totals["lines"], totals["rows"]
    good = lines - sum(totals["bad"].values())
    return {
        "lines": lines,
        "lines_per_file": totals["lines_per_file"],
        "bytes_of_text": totals["bytes"],
        "bad_lines": totals["bad"],
        "first_bad_line": totals["first_bad"],
        "label_rate": totals["clicks"] / max(good, 1),
        "missing_rate": {
            NAMES[field]: totals["missing"][field] / max(good, 1) for field in range(1, NUM_FIELDS)
        },
        "rows_kept": kept,
        "rows": rows,
        "label_rate_kept": totals["kept_clicks"] / max(kept, 1),
        "distinct_values": dict(zip(NAMES[-NUM_SPARSE:], counts, strict=True)),
        "columns": columns,
    }


def report_table(report: dict[str, Any]) -> str:
    """The report for people."""
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


def find_doubts(data_set: str, names: Sequence[str], lines: Sequence[int]) -> list[str]:
    """What looks wrong about files that look like Criteo's own: a sentence each.

    A set looks like Criteo's where one of its files has the published number of rows, or more than
    LOOKS_PUBLISHED of it. Smaller ones are samples, of which nothing can be said.

    Args:
        data_set: kaggle or terabyte.
        names: of the files, in order.
        lines: of each file.
    """
    published = (KAGGLE_ROWS,) if data_set == "kaggle" else DAY_ROWS
    pairs = list(zip(names, lines, published, strict=False))
    if not any(found > LOOKS_PUBLISHED * rows for _, found, rows in pairs):
        return []
    wrong = [
        f"{name} has {found:,} rows, Criteo's own has {rows:,}"
        + (": it may be truncated" if found < rows else "")
        for name, found, rows in pairs
        if found != rows
    ]
    if len(lines) != len(published):
        wrong.append(f"there are {len(lines)} files, Criteo's own are {len(published)}")
    return wrong
