"""The report of a preparation: numbers by hand, bad lines, doubts about Criteo's own files."""

import gzip
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from by_hand import assert_equals_by_hand, prepare, spec
from conftest import write_days

from criteo.columns import NAMES
from criteo.prepared import find_prepared
from criteo.report import DAY_ROWS, KAGGLE_ROWS, TextCounts, find_doubts, find_report, report_table
from preparation.publish import announce
from preparation.sizes import DEFAULT_SIZES

C = NAMES[14:]
SMALL = replace(DEFAULT_SIZES, piece_bytes=700)
BAD = {  # kind: lines of it
    "label not 0 or 1": ["2" + "\t1" * 39, "-1" + "\t1" * 39],
    "not a whole number": ["1\t-" + "\t1" * 38, "1\tx" + "\t1" * 38, "\t".join(NAMES)],
    "integer out of range": ["1\t" * 13 + "2147483648" + "\t1" * 26],
    "not hexadecimal": ["1\t" * 39 + "xyz"],
    "hexadecimal too long": ["1\t" * 14 + "123456789" + "\t1" * 25],
    "number of fields": ["", "1\t2", "\t" * 40],
}
NUM_BAD = sum(map(len, BAD.values()))


def made(folder, *flags, status=0):
    """(Result of a preparation in small pieces, its report)."""
    result = prepare(f"--data_path={folder}", *flags, sizes=SMALL)
    assert result.status == status, result.err
    path = folder / "terabyte_processed.prepared" / "report.json"
    return result, json.loads(path.read_text()) if path.exists() else None


def pack(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def by_hand(days, dropped=(), modulo=2**32):
    """The report of days (lists of fields) of which the rows `dropped` are not kept."""
    rows = [row for day in days for row in day]
    kept = [row for number, row in enumerate(rows) if number not in dropped]
    return {
        "lines": len(rows),
        "lines_per_file": [len(day) for day in days],
        "bytes_of_text": sum(len("\t".join(row)) + 1 for row in rows),
        "bad_lines": {},
        "first_bad_line": "",
        "label_rate": np.mean([row[0] == "1" for row in rows]),
        "missing_rate": {
            name: np.mean([row[k] == "" for row in rows]) for k, name in enumerate(NAMES) if k
        },
        "rows_kept": len(kept),
        "label_rate_kept": np.mean([row[0] == "1" for row in kept]),
        "distinct_values": {
            name: len({int(row[14 + k] or "0", 16) % modulo for row in kept})
            for k, name in enumerate(C)
        },
    }


def assert_report(found, want):
    for name, value in want.items():
        assert found[name] == pytest.approx(value), name


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("packed", [(), (0, 2)])
@pytest.mark.parametrize("modulo", [2**32, 3])
def test_the_report_is_what_is_counted_by_hand(tmp_path, packed, modulo):
    """In many pieces; the report and meta.json agree, and the table is printed."""
    days = write_days(tmp_path, 3, 23, seed=4)
    days[1] = days[1][:9]
    (tmp_path / "day_1").write_text("".join("\t".join(row) + "\n" for row in days[1]))
    for day in packed:
        pack(tmp_path / f"day_{day}")
    result, report = made(tmp_path, f"--max-ind-range={modulo}")
    assert result.err == ""
    assert_report(report, by_hand(days, modulo=modulo))
    assert report["rows"] == {"train": 32, "test": 12, "val": 11}
    assert report["columns"] == [[name, "|u1"] for name in NAMES]
    assert set(report) == {*by_hand(days), "rows", "columns"}
    meta = json.loads((tmp_path / "terabyte_processed.prepared" / "meta.json").read_text())
    assert meta["counts"] == list(report["distinct_values"].values())
    assert report["columns"] == meta["columns"] and report["rows"] == meta["rows"]
    assert report_table(report) in result.out
    assert str(tmp_path / "terabyte_processed.prepared" / "report.json") in result.out


def test_rates_of_lines_and_of_the_rows_that_are_kept(tmp_path):
    """Sub-sampling changes what is kept and its categories, not what was read."""
    days = write_days(tmp_path, 2, 60, seed=2)
    _, report = made(tmp_path, "--data-sub-sample-rate=0.7", "--numpy-rand-seed=8")
    draws = np.random.RandomState(8).uniform(size=120)
    labels = [row[0] for day in days for row in day]
    dropped = [k for k in range(120) if labels[k] == "0" and draws[k] < 0.7]
    assert 20 < len(dropped) < 60 and sum(report["rows"].values()) == 120 - len(dropped)
    assert_report(report, by_hand(days, dropped))


def test_flat_files_have_their_report_beside_them(tmp_path):
    days = write_days(tmp_path, 2, 20)
    result, _ = made(tmp_path, "--mlperf-bin-loader", "--data-randomize=none")
    path = tmp_path / "terabyte_processed_report.json"
    report = json.loads(path.read_text())
    assert_report(report, by_hand(days))
    assert {kind for _, kind in report["columns"]} == {"<i4"}
    assert report_table(report) in result.out and str(path) in result.out


REPORT = {
    "lines": 4_373_472_329,
    "lines_per_file": [1] * 24,
    "bytes_of_text": 1_000_000_500_000,
    "bad_lines": {"not hexadecimal": 1200, "number of fields": 3},
    "first_bad_line": "day_0, line 7: ...",
    "label_rate": 0.0332,
    "missing_rate": dict.fromkeys(NAMES[1:], 0.4567),
    "rows_kept": 4_000_000_000,
    "rows": {"train": 3_900_000_000, "test": 50_000_000, "val": 50_000_000},
    "label_rate_kept": 0.05,
    "distinct_values": dict.fromkeys(C, 10_000_000),
    "columns": [["I1", "<i4"], *([name, "|u1"] for name in NAMES if name != "I1")],
}


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[" * 200_000, "3", "[]", "{}", json.dumps({"rows": 3}), b"\xff"],
    ids=range(8),
)
def test_a_damaged_report_of_prepared_data_is_one_line(tmp_path, text):
    write_days(tmp_path, 2, 9)
    path = tmp_path / "terabyte_processed.prepared" / "report.json"
    assert prepare(f"--data_path={tmp_path}").status == 0
    whole = json.loads(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_damaged(prepare(f"--data_path={tmp_path}"), path)
    for key in ("lines", "lines_per_file", "rows", "columns", "missing_rate", "distinct_values"):
        for value in (None, 10**400, "text", [], {}):
            path.write_text(json.dumps(whole | {key: value}))
            result = prepare(f"--data_path={tmp_path}")
            if result.status:
                assert_damaged(result, path)
    path.unlink()
    assert prepare(f"--data_path={tmp_path}").status == 0


def assert_damaged(result, path):
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"{path} is damaged (" in result.err and "delete it" in result.err


@pytest.mark.parametrize("text", [None, "", "[]", '{"lines": 3}', "[" * 9999])
def test_those_who_can_do_without_a_report_get_an_empty_one(text, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert find_report(tmp_path / "report.json") == {}


def test_the_table_by_hand():
    """Large numbers, as Criteo's are, keep their columns; each column has a line."""
    table = report_table(REPORT).splitlines()
    assert table[:4] == [
        "lines read     4,373,472,329  in 24 files, 1,000,000.5 MB of text",
        "bad lines              1,203  1,200 not hexadecimal, 3 number of fields",
        "rows kept      4,000,000,000  3,900,000,000 train, 50,000,000 test, 50,000,000 validation;"
        " 43 bytes a row",
        "label 1              3.320 %  of the lines, 5.000 % of the rows kept",
    ]
    assert [line.split()[0] for line in table[5:]] == list(NAMES[1:])
    assert table[5].split()[1:] == ["<i4", "45.67", "%"]
    assert table[-1].split()[1:] == ["|u1", "45.67", "%", "10,000,000"]
    widths = {len(line) for line in table[4:]}
    assert max(widths) <= 100 and len(widths) == 2, "integers have no distinct values"
    good = report_table(REPORT | {"bad_lines": {}})
    assert good.splitlines()[1].split() == ["bad", "lines", "0"]


def test_counts_add_up_and_are_read_back_from_json():
    one = TextCounts(2, 100, 1, 2, 1, (1,) * 40, (5,) * 14, {"a": 1}, "line 7")
    other = TextCounts(3, 50, 2, 1, 0, (2,) * 40, (3,) * 14, {"b": 1, "a": 2}, "line 1")
    both = TextCounts(5, 150, 3, 3, 1, (3,) * 40, (5,) * 14, {"a": 3, "b": 1}, "line 7")
    assert one + other == both and TextCounts() + one == one and both.num_bad == 4
    assert TextCounts.from_json(json.loads(json.dumps(both.to_json()))) == both


# ---------------------------------------------------------------- bad lines


def write_with_bad_lines(folder):
    """Days with each line of BAD somewhere; returns the days without, and [(day, line from 1)]."""
    draw = random.Random(0)
    days = write_days(folder, 3, 40)
    files = [["\t".join(row) for row in day] for day in days]
    bad = [line for lines in BAD.values() for line in lines]
    for line in bad:
        file = draw.choice(files)
        file.insert(draw.randint(0, len(file)), line)
    for day, lines in enumerate(files):
        (folder / f"day_{day}").write_text("".join(f"{line}\n" for line in lines))
    return days, [
        (day, number)
        for day, lines in enumerate(files)
        for number, line in enumerate(lines, 1)
        if line in bad
    ]


@pytest.mark.parametrize("flags", [[], ["--memory-map", "--dataset-multiprocessing"]])
def test_bad_lines_are_skipped_and_counted_by_kind(tmp_path, flags):
    """As many as are allowed; rows, ids and rates are those of the good lines alone."""
    days, places = write_with_bad_lines(tmp_path)
    result, _ = made(tmp_path, f"--max-bad-lines={NUM_BAD - 1}", *flags, status=2)
    assert result.err.count("\n") == 1
    assert f"--max-bad-lines={NUM_BAD - 1}" in result.err and f"{tmp_path}/day_" in result.err
    assert not (tmp_path / "terabyte_processed.prepared").exists()
    result, report = made(tmp_path, f"--max-bad-lines={NUM_BAD}", *flags)
    assert report["bad_lines"] == {kind: len(lines) for kind, lines in BAD.items()}
    want = by_hand(days)
    lines = Counter(day for day, _ in places)
    want["lines"] += NUM_BAD
    want["lines_per_file"] = [40 + lines[day] for day in range(3)]
    want["bytes_of_text"] += sum(len(line) + 1 for lines in BAD.values() for line in lines)
    del want["bad_lines"], want["first_bad_line"]
    assert_report(report, want)
    if not flags:
        assert_equals_by_hand(find_prepared(spec(f"--data_path={tmp_path}")), days)
    day, line = places[0]
    assert report["first_bad_line"].startswith(f"{tmp_path}/day_{day}, line {line}: ")
    assert result.err.count("\n") == 1 and result.err.startswith("warning: ")
    assert f"{NUM_BAD}" in result.err and report["first_bad_line"] in result.err
    assert all(f"{len(lines)} {kind}" in result.out for kind, lines in BAD.items())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", [1, 29])
def test_without_the_flag_the_first_bad_line_ends_the_run(tmp_path, packed, number):
    """It is named by its number in the file, wherever pieces begin; a header is guessed."""
    path = tmp_path / "day_1"
    write_days(tmp_path, 2, 40)
    lines = path.read_text().splitlines()
    lines[number - 1] = BAD["not hexadecimal"][0]
    path.write_text("\n".join(lines) + "\n")
    if packed:
        pack(path)
    result, _ = made(tmp_path, status=2)
    assert result.err.count("\n") == 1
    where = f"{path}{'.gz' * packed}, line {number}: column 40: got 'xyz'"
    assert where in result.err and "--max-bad-lines" in result.err
    assert ("header" in result.err) == (number == 1)


def test_kaggles_bad_lines_count_where_the_file_is_cut(tmp_path):
    """Parts are cut by lines; a piece that ends within a part changes nothing."""
    days = write_days(tmp_path, 1, 40, seed=6)
    lines = ["\t".join(row) for row in days[0]]
    for position in (3, 17, 39):
        lines.insert(position, "bad")
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "day_0").unlink()
    reports = []
    for sizes in (SMALL, DEFAULT_SIZES):
        stem = tmp_path / f"made{sizes.piece_bytes}"
        flags = [f"--data_path={tmp_path}", f"--processed-data-file={stem}", "--max-bad-lines=3"]
        assert prepare(*flags, sizes=sizes).status == 0
        folder = tmp_path / f"{stem.name}.prepared"
        reports.append(json.loads((folder / "report.json").read_text()))
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["rows_per_part"] == [6, 6, 5, 6, 6, 6, 5]
    assert reports[0] == reports[1] and reports[0]["bad_lines"] == {"number of fields": 3}


# ---------------------------------------------------------------- doubts

PUBLISHED = (100, 120, 90)


def doubts(*lines):
    return find_doubts("terabyte", [f"day_{k}" for k in range(len(lines))], lines, PUBLISHED)


def test_the_published_rows_are_those_of_24_days():
    assert len(DAY_ROWS) == 24 and sum(DAY_ROWS) == 4_373_472_329
    assert KAGGLE_ROWS == 45_840_617


@pytest.mark.parametrize("day, rows", [(0, 99), (1, 20), (2, 0), (2, 91)])
def test_a_file_that_differs_is_named(day, rows):
    lines = list(PUBLISHED)
    lines[day] = rows
    (doubt,) = doubts(*lines)
    assert doubt.startswith(f"day_{day} has {rows} rows") and f"{PUBLISHED[day]}" in doubt
    assert ("truncated" in doubt) == (rows < PUBLISHED[day])


@pytest.mark.parametrize("lines", [(100, 120), (100,), (100, 120, 90, 90)])
def test_another_number_of_files_is_said(lines):
    (doubt,) = doubts(*lines)
    assert f"{len(lines)} files" in doubt and "3" in doubt


def test_all_that_is_wrong_is_said():
    assert [doubt.split()[0] for doubt in doubts(99, 120, 80)] == ["day_0", "day_2"]
    truncated, missing = doubts(100, 110)
    assert "day_1" in truncated and "2 files" in missing


@pytest.mark.parametrize(
    "lines",
    [PUBLISHED, (60, 72, 54), (10, 10), (1,), (0, 0, 0), (5, 5, 5, 5), (60, 60, 54, 1000)],
)
def test_whole_sets_and_samples_are_not_doubted(lines):
    assert doubts(*lines) == []


def test_kaggles_file_is_doubted_if_it_is_nearly_whole():
    (doubt,) = find_doubts("kaggle", ["train.txt"], [40_000_000])
    assert "40,000,000" in doubt and "45,840,617" in doubt
    assert find_doubts("kaggle", ["train.txt"], [1_000_000]) == []
    assert find_doubts("kaggle", ["train.txt"], [KAGGLE_ROWS]) == []


def test_doubts_are_warnings(tmp_path, capsys):
    """A line for each, after the line that scripts parse."""
    lines = [*DAY_ROWS[:-1], 1]
    days = spec(f"--raw-data-file={tmp_path}/day", "--data-set=terabyte")
    names = [f"{tmp_path}/day_{k}" for k in range(24)]
    announce(days, names, REPORT | {"lines_per_file": lines}, seconds=2)
    out, err = capsys.readouterr()
    assert out == (
        "Prepared 4000000000 rows (3900000000 train, 50000000 test, 50000000 validation)"
        f" in 2.0 s, 2000000000 rows/s: {tmp_path}\n"
    )
    doubt, bad = err.splitlines()
    assert doubt.startswith(f"warning: {tmp_path}/day_23 has 1 rows")
    assert bad == "warning: bad lines skipped: 1203; the first: day_0, line 7: ..."
