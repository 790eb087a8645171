"""What preparation says it found: numbers by hand, bad lines, doubts about Criteo's own files."""

import gzip
import json
import os
import random
from collections import Counter

import numpy as np
import pytest
from conftest import train, write_days

from criteo import report
from criteo.columns import NAMES
from criteo.prepared import SPLITS
from criteo.report import DAY_ROWS, KAGGLE_ROWS, find_doubts, report_table
from data_utils import main
from preparation import parsed_piece

BAD = {  # kind: lines of it
    "label not 0 or 1": ["2" + "\t1" * 39, "-1" + "\t1" * 39],
    "not a whole number": ["1\t-" + "\t1" * 38, "1\tx" + "\t1" * 38, "\t".join(NAMES)],
    "integer out of range": ["1\t" * 13 + "2147483648" + "\t1" * 26],
    "not hexadecimal": ["1\t" * 39 + "xyz"],
    "hexadecimal too long": ["1\t" * 14 + "123456789" + "\t1" * 25],
    "number of fields": ["", "1\t2", "\t" * 40],
}


def prepare(folder, *flags):
    return train(f"--data_path={folder}", *flags, program=main)


def report_of(folder, name="terabyte_processed"):
    return json.loads((folder / f"{name}.prepared" / "report.json").read_text())


def files_of(folder):
    prepared = folder / "terabyte_processed.prepared"
    return {split: (prepared / f"{split}.bin").read_bytes() for split in SPLITS}


def by_hand(days, dropped=()):
    """What the report says of days (lists of fields) of which the rows `dropped` are not kept."""
    rows = [row for day in days for row in day]
    kept = [row for number, row in enumerate(rows) if number not in dropped]
    distinct = {name: len({row[14 + k] or "0" * 8 for row in kept}) for k, name in enumerate(C)}
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
        "distinct_values": distinct,
    }


C = NAMES[14:]


def assert_report(found, want):
    for name, value in want.items():
        assert found[name] == pytest.approx(value), name


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("piece_bytes", [700, 32 << 20])
@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_the_report_is_what_is_counted_by_hand(tmp_path, monkeypatch, piece_bytes, form):
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", piece_bytes)
    days = write_days(tmp_path, 3, 23, seed=4)
    (tmp_path / "day_1").write_text("".join("\t".join(row) + "\n" for row in days[1][:9]))
    days[1] = days[1][:9]
    if form == "gzip":
        for day in range(3):
            packed = gzip.compress((tmp_path / f"day_{day}").read_bytes())
            (tmp_path / f"day_{day}.gz").write_bytes(packed)
            os.remove(tmp_path / f"day_{day}")
    result = prepare(tmp_path)
    assert result.status == 0 and result.err == ""
    report = report_of(tmp_path)
    assert_report(report, by_hand(days))
    assert report["rows"] == {"train": 32, "test": 12, "val": 11}
    assert [kind for _, kind in report["columns"]] == ["|u1"] * 40
    assert [name for name, _ in report["columns"]] == list(NAMES)
    assert set(report) == {*by_hand(days), "rows", "columns"}
    assert report_table(report) in result.out
    assert str(tmp_path / "terabyte_processed.prepared" / "report.json") in result.out


def test_rates_of_lines_and_of_the_rows_that_are_kept(tmp_path):
    """Sub-sampling changes what is kept and its categories, not what was read."""
    days = write_days(tmp_path, 2, 60, seed=2)
    assert prepare(tmp_path, "--data-sub-sample-rate=0.7", "--numpy-rand-seed=8").status == 0
    draws = np.random.RandomState(8).uniform(size=120)
    labels = [row[0] for day in days for row in day]
    dropped = [k for k in range(120) if labels[k] == "0" and draws[k] < 0.7]
    report = report_of(tmp_path)
    assert 20 < len(dropped) < 60 and sum(report["rows"].values()) == 120 - len(dropped)
    assert_report(report, by_hand(days, dropped))


def test_distinct_values_are_the_tables_rows(tmp_path):
    """Of the values as they are kept: modulo the range."""
    days = write_days(tmp_path, 2, 40, seed=3)
    prepare(tmp_path, "--max-ind-range=3")
    want = {
        name: len({int(row[14 + k] or "0", 16) % 3 for day in days for row in day})
        for k, name in enumerate(C)
    }
    report = report_of(tmp_path)
    meta = json.loads((tmp_path / "terabyte_processed.prepared" / "meta.json").read_text())
    assert report["distinct_values"] == want and meta["counts"] == list(want.values())
    assert report["columns"] == meta["columns"] and report["rows"] == meta["rows"]


def test_flat_files_have_their_report_beside_them(tmp_path):
    days = write_days(tmp_path, 2, 20)
    result = prepare(tmp_path, "--mlperf-bin-loader", "--data-randomize=none")
    path = tmp_path / "terabyte_processed_report.json"
    report = json.loads(path.read_text())
    assert_report(report, by_hand(days))
    assert {kind for _, kind in report["columns"]} == {"<i4"}
    assert report_table(report) in result.out and str(path) in result.out


def test_the_table_has_a_line_a_column(tmp_path):
    """Name, type, missing values, and of a category distinct values."""
    days = write_days(tmp_path, 2, 20, seed=5)
    row = ["1", "70000", "300", *days[0][0][3:]]
    days[0][0] = row
    (tmp_path / "day_0").write_text("".join("\t".join(row) + "\n" for row in days[0]))
    text = prepare(tmp_path).out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    want = by_hand(days)
    types = {"I1": "<i4", "I2": "<u2"}
    for name in NAMES[1:]:
        missing = [f"{100 * want['missing_rate'][name]:.2f}", "%"]
        distinct = [str(want["distinct_values"][name])] if name in C else []
        assert lines[name] == [types.get(name, "|u1"), *missing, *distinct], name


def test_the_table_by_hand():
    """Large numbers, as Criteo's are, keep their columns."""
    report = {
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
    table = report_table(report)
    assert table.splitlines()[:4] == [
        "lines read     4,373,472,329  in 24 files, 1,000,000.5 MB of text",
        "bad lines              1,203  1,200 not hexadecimal, 3 number of fields",
        "rows kept      4,000,000,000  3,900,000,000 train, 50,000,000 test, 50,000,000 validation;"
        " 43 bytes a row",
        "label 1              3.320 %  of the lines, 5.000 % of the rows kept",
    ]
    assert len(table.splitlines()) == 5 + 39
    widths = {len(line) for line in table.splitlines()[4:]}
    assert max(widths) <= 100 and len(widths) == 2, "integers have no distinct values"
    good = report_table(report | {"bad_lines": {}})
    assert good.splitlines()[1].split() == ["bad", "lines", "0"]


# ---------------------------------------------------------------- bad lines


def write_with_bad_lines(folder, seed=0, num_days=3):
    """Days with each line of BAD somewhere; gives the days without, and [(day, line from 1)]."""
    draw = random.Random(seed)
    days = write_days(folder, num_days, 40, seed)
    files = [["\t".join(row) for row in day] for day in days]
    for line in (line for lines in BAD.values() for line in lines):
        file = draw.choice(files)
        file.insert(draw.randint(0, len(file)), line)
    for day, lines in enumerate(files):
        (folder / f"day_{day}").write_text("".join(f"{line}\n" for line in lines))
    bad = {line for lines in BAD.values() for line in lines}
    places = [(day, n) for day, lines in enumerate(files) for n, line in enumerate(lines, 1)
              if line in bad]  # fmt: skip
    return days, places


NUM_BAD = sum(map(len, BAD.values()))

pieces = pytest.mark.parametrize("piece_bytes", [600, 32 << 20])


@pieces
@pytest.mark.parametrize("flags", [[], ["--memory-map", "--dataset-multiprocessing"]])
def test_bad_lines_are_skipped_and_counted_by_kind(tmp_path, monkeypatch, piece_bytes, flags):
    """As many as are allowed; rows, ids and rates are those of the good lines alone."""
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", piece_bytes)
    days, places = write_with_bad_lines(tmp_path / "bad")
    if not flags:  # a shuffled order depends on how lines lie in pieces
        write_days(tmp_path / "good", 3, 40)
        assert prepare(tmp_path / "good").status == 0
    result = prepare(tmp_path / "bad", f"--max-bad-lines={NUM_BAD}", *flags)
    assert result.status == 0
    if not flags:
        assert files_of(tmp_path / "bad") == files_of(tmp_path / "good")
    report = report_of(tmp_path / "bad")
    assert report["bad_lines"] == {kind: len(lines) for kind, lines in BAD.items()}
    want = by_hand(days)
    lines = Counter(day for day, _ in places)
    want["lines"] += NUM_BAD
    want["lines_per_file"] = [40 + lines[day] for day in range(3)]
    want["bytes_of_text"] += sum(len(line) + 1 for lines in BAD.values() for line in lines)
    day, line = places[0]
    first = f"{tmp_path}/bad/day_{day}, line {line}: "
    del want["bad_lines"], want["first_bad_line"]
    assert_report(report, want)
    assert report["first_bad_line"].startswith(first)
    assert result.err.count("\n") == 1 and result.err.startswith("warning: ")
    assert f"{NUM_BAD}" in result.err and report["first_bad_line"] in result.err
    for kind, lines in BAD.items():
        assert f"{len(lines)} {kind}" in result.out


@pieces
@pytest.mark.parametrize("flags", [[], ["--dataset-multiprocessing"]])
def test_one_bad_line_more_than_allowed_ends_the_run(tmp_path, monkeypatch, piece_bytes, flags):
    """Also where no piece alone has too many; one line says it, and nothing is prepared."""
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", piece_bytes)
    write_with_bad_lines(tmp_path)
    result = prepare(tmp_path, f"--max-bad-lines={NUM_BAD - 1}", *flags)
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"--max-bad-lines={NUM_BAD - 1}" in result.err and f"{tmp_path}/day_" in result.err
    assert not (tmp_path / "terabyte_processed.prepared").exists()
    again = prepare(tmp_path, f"--max-bad-lines={NUM_BAD}", *flags)
    assert again.status == 0 and sum(report_of(tmp_path)["bad_lines"].values()) == NUM_BAD
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("day")) == [
        "terabyte_processed.prepared"
    ]


@pieces
@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_without_the_flag_the_first_bad_line_of_a_file_ends_the_run(
    tmp_path, monkeypatch, piece_bytes, form
):
    """It is named by its number in the file, wherever pieces begin."""
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", piece_bytes)
    write_days(tmp_path, 2, 40)
    lines = (tmp_path / "day_1").read_text().splitlines()
    lines[28] = BAD["not hexadecimal"][0]
    text = "\n".join(lines).encode() + b"\n"
    (tmp_path / "day_1").write_bytes(text)
    if form == "gzip":
        os.remove(tmp_path / "day_1")
        (tmp_path / "day_1.gz").write_bytes(gzip.compress(text))
    result = prepare(tmp_path)
    assert result.status == 2 and result.err.count("\n") == 1
    name = "day_1.gz" if form == "gzip" else "day_1"
    assert f"{tmp_path}/{name}, line 29: column 40: got 'xyz'" in result.err
    assert "--max-bad-lines" in result.err


def test_a_header_line_is_one_bad_line(tmp_path):
    write_days(tmp_path, 2, 20)
    for day in range(2):
        text = (tmp_path / f"day_{day}").read_text()
        (tmp_path / f"day_{day}").write_text("\t".join(NAMES) + "\n" + text)
    result = prepare(tmp_path)
    assert result.status == 2 and "day_0, line 1: " in result.err and "header" in result.err
    assert prepare(tmp_path, "--max-bad-lines=1").status == 2
    result = prepare(tmp_path, "--max-bad-lines=2")
    assert result.status == 0 and report_of(tmp_path)["bad_lines"] == {"not a whole number": 2}
    assert report_of(tmp_path)["rows"] == {"train": 20, "test": 10, "val": 10}


def test_kaggles_bad_lines_count_where_the_file_is_cut(tmp_path, monkeypatch):
    """Parts are cut by lines, as everywhere; a piece that ends within a part changes nothing."""
    days = write_days(tmp_path, 1, 40, seed=6)
    lines = ["\t".join(row) for row in days[0]]
    for place in (3, 17, 39):
        lines.insert(place, "bad")
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    os.remove(tmp_path / "day_0")
    made = []
    for piece_bytes in (500, 32 << 20):
        monkeypatch.setattr(parsed_piece, "PIECE_BYTES", piece_bytes)
        stem = tmp_path / f"made{piece_bytes}"
        assert prepare(tmp_path, f"--processed-data-file={stem}", "--max-bad-lines=3").status == 0
        made.append(report_of(tmp_path, stem.name))
        meta = json.loads((tmp_path / f"{stem.name}.prepared" / "meta.json").read_text())
        assert meta["rows_per_part"] == [6, 6, 5, 6, 6, 6, 5]
    assert made[0] == made[1] and made[0]["bad_lines"] == {"number of fields": 3}


# ---------------------------------------------------------------- doubts

PUBLISHED = (100, 120, 90)


@pytest.fixture
def small_days(monkeypatch):
    monkeypatch.setattr(report, "DAY_ROWS", PUBLISHED)


def doubts(*lines, data_set="terabyte"):
    return find_doubts(data_set, [f"day_{k}" for k in range(len(lines))], lines)


def test_the_published_rows_are_those_of_24_days():
    assert len(DAY_ROWS) == 24 and sum(DAY_ROWS) == 4_373_472_329
    assert KAGGLE_ROWS == 45_840_617


def test_criteos_own_files_raise_no_doubts(small_days):
    assert doubts(*PUBLISHED) == []
    assert doubts(KAGGLE_ROWS, data_set="kaggle") == []


@pytest.mark.parametrize("day, rows", [(0, 99), (1, 20), (2, 0), (2, 91)])
def test_a_file_that_differs_is_named(small_days, day, rows):
    lines = list(PUBLISHED)
    lines[day] = rows
    (doubt,) = doubts(*lines)
    assert doubt.startswith(f"day_{day} has {rows} rows") and f"{PUBLISHED[day]}" in doubt


def test_all_files_that_differ_are_named(small_days):
    assert [doubt.split()[0] for doubt in doubts(99, 120, 80)] == ["day_0", "day_2"]


@pytest.mark.parametrize("lines", [(100, 120), (100,), (100, 120, 90, 90)])
def test_another_number_of_files_is_said(small_days, lines):
    (doubt,) = doubts(*lines)
    assert f"{len(lines)} files" in doubt and "3" in doubt


def test_missing_and_truncated_days_are_both_said(small_days):
    truncated, missing = doubts(100, 110)
    assert "day_1" in truncated and "2 files" in missing


@pytest.mark.parametrize(
    "lines", [(60, 72, 54), (10, 10), (1,), (0, 0, 0), (5, 5, 5, 5), (60, 60, 54, 1000)]
)
def test_of_samples_nothing_is_said(small_days, lines):
    assert doubts(*lines) == []


def test_kaggles_file_is_doubted_where_it_is_nearly_whole():
    (doubt,) = doubts(40_000_000, data_set="kaggle")
    assert "40,000,000" in doubt and "45,840,617" in doubt
    assert doubts(1_000_000, data_set="kaggle") == []


def test_doubts_are_warnings_and_end_nothing(tmp_path, monkeypatch):
    """Of a whole set none, of a truncated day one line that names its file."""
    monkeypatch.setattr(report, "DAY_ROWS", (20, 20, 20))
    write_days(tmp_path / "whole", 3, 20)
    assert prepare(tmp_path / "whole").err == ""
    write_days(tmp_path / "cut", 3, 20)
    lines = (tmp_path / "cut" / "day_1").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "day_1").write_text("".join(lines[:13]))
    result = prepare(tmp_path / "cut")
    assert result.status == 0 and result.err.count("\n") == 1
    assert result.err.startswith(f"warning: {tmp_path}/cut/day_1 has 13 rows")
