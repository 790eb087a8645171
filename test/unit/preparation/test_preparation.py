"""Raw text to rows on disk: order, resumption, mistakes.

Three tiny days against arrays made by hand.
"""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from by_hand import assert_equals_by_hand, by_hand, prepare, spec
from conftest import ROOT, rows_of, write_days

from criteo import raw_files
from criteo.prepared import find_prepared
from preparation import parsed_piece, publish, row_files
from preparation.work_folder import Writer


def sorted_rows(rows):
    return sorted(map(tuple, rows.tolist()))


def folder_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_pieces(monkeypatch):
    """Days of a few lines come in many pieces, and pieces in many blocks."""
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", 1000)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 300)


@pytest.mark.parametrize("max_ind_range", [-1, 7])
@pytest.mark.parametrize("parallel", [[], ["--dataset-multiprocessing"]])
@pytest.mark.parametrize("largest", [50, 300, 70_000, 2**31 - 1])
def test_three_days_equal_arrays_made_by_hand(
    tmp_path, largest, parallel, max_ind_range, small_pieces
):
    """Of columns of 1 byte, and of 1, 2 and 4 bytes mixed."""
    days = write_days(tmp_path, 3, 41, largest=(50, largest, 300))
    flags = [f"--data_path={tmp_path}", f"--max-ind-range={max_ind_range}", *parallel]
    prepared = prepare(spec(*flags))
    assert_equals_by_hand(prepared, days, max_ind_range)
    assert prepared.rows_per_part == (41, 41, 41)


def test_values_above_two_to_the_31_and_every_form_of_hex(tmp_path):
    row = ["1", *["0"] * 13, *["ffffffff", "80000000", "7FFFFFFF", "0", "aBc"], *[""] * 21]
    for day in range(2):
        (tmp_path / f"day_{day}").write_text(
            "\t".join(row) + "\n" + "\t".join(["0", *row[1:]]) + "\n"
        )
    prepared = prepare(spec(f"--data_path={tmp_path}"))
    assert set(prepared.counts) == {1}
    assert rows_of(prepared, "train")[:, 0].tolist() == [1, 0]


def test_line_ends_and_a_missing_last_newline(tmp_path):
    line = "\t".join(["1", *["3"] * 13, *["a1"] * 26])
    (tmp_path / "day_0").write_bytes(f"{line}\r\n{line}\r\n".encode())
    (tmp_path / "day_1").write_bytes(f"{line}\n{line}".encode())
    prepared = prepare(spec(f"--data_path={tmp_path}"))
    assert prepared.rows_per_part == (2, 2)
    assert np.unique(rows_of(prepared, "train"), axis=0).tolist() == [[1] + [3] * 13 + [0] * 26]


def test_kaggle_is_cut_into_seven_parts_before_sub_sampling(tmp_path, small_pieces):
    days = write_days(tmp_path, 1, 31)
    os.rename(tmp_path / "day_0", tmp_path / "train.txt")
    prepared = prepare(spec(f"--data_path={tmp_path}"))
    assert prepared.rows_per_part == (5, 5, 5, 4, 4, 4, 4)
    rate = prepare(
        spec(
            f"--data_path={tmp_path}",
            "--data-sub-sample-rate=0.6",
            f"--processed-data-file={tmp_path}/x",
        )
    )
    random, labels = np.random.RandomState(123), [int(row[0]) for row in days[0]]
    keep = [
        label or draw >= 0.6 for label, draw in zip(labels, random.uniform(size=31), strict=True)
    ]
    ends = np.cumsum((0, 5, 5, 5, 4, 4, 4, 4))
    want = tuple(sum(keep[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))
    assert rate.rows_per_part == want
    kept = [row for row, wanted in zip(days[0], keep, strict=True) if wanted]
    parts, counts = by_hand([kept])
    rows = np.concatenate([rows_of(rate, split) for split in ("train", "test", "val")])
    np.testing.assert_array_equal(rows, parts[0])
    assert list(rate.counts) == counts


@pytest.mark.parametrize("order", ["total", "day"])
def test_mapped_data_is_shuffled_on_disk_by_the_seed(tmp_path, order, monkeypatch):
    for name in ("SMALLEST_BUCKET", "LARGEST_BUCKET"):  # so that the shuffle has many buckets
        monkeypatch.setattr(row_files, name, 500)
    parts, _ = by_hand(write_days(tmp_path, 3, 60))
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--memory-map", f"--data-randomize={order}", f"--numpy-rand-seed={seed}"]
        place = f"--processed-data-file={tmp_path}/{name}"
        prepared = prepare(spec(f"--data_path={tmp_path}", *flags, place))
        made[name] = rows_of(prepared, "train")
    np.testing.assert_array_equal(made["a"], made["b"])
    assert not np.array_equal(made["a"], made["c"])
    together = np.concatenate(parts[:2])
    assert sorted_rows(made["a"]) == sorted_rows(together)
    assert not np.array_equal(made["a"], together)
    if order == "day":
        assert sorted_rows(made["a"][:60]) == sorted_rows(parts[0])
    else:
        assert sorted_rows(made["a"][:60]) != sorted_rows(parts[0])


def test_done_once_and_complete_or_absent(tmp_path):
    write_days(tmp_path, 2, 30)
    first = prepare(f"--data_path={tmp_path}")
    assert first.status == 0 and "Prepared 60 rows (30 train, 15 test, 15 validation)" in first.out
    again = prepare(f"--data_path={tmp_path}")
    assert "Prepared already" in again.out and "60 rows" not in again.out
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared"]


def test_killed_while_it_prepares_nothing_half_is_used(tmp_path):
    days = write_days(tmp_path, 2, 30)
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import data_utils\n"
        "data_utils._write_synced = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "data_utils.main(['--data_path=' + sys.argv[2]])"
    )
    killed = subprocess.run([sys.executable, "-c", program, ROOT, tmp_path], check=False)
    assert killed.returncode == -9
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared.partial"]
    assert prepare(f"--data_path={tmp_path}").status == 0
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared"]
    assert_equals_by_hand(find_prepared(spec(f"--data_path={tmp_path}")), days)


BAD_LINES = {
    "fields": ("1\t2\t3", "3 tab-separated fields, expected 40"),
    "many": ("\t".join(["1"] * 41), "41 tab-separated fields, expected 40"),
    "number": ("\t".join(["1", "x7", *["1"] * 38]), "column 2: got 'x7', expected a whole number"),
    "minus": ("\t".join(["1", "-", *["1"] * 38]), "column 2: got '-', expected a whole number"),
    "range": (
        "\t".join(["1", "9999999999", *["1"] * 38]),
        "column 2: got '9999999999', expected a whole number of 32",
    ),
    "hex": ("\t".join(["1"] * 39 + ["12g4"]), "column 40: got '12g4', expected hexadecimal digits"),
    "long": (
        "\t".join(["1"] * 39 + ["123456789"]),
        "column 40: got '123456789', expected at most 8 hex",
    ),
    "label": ("\t".join(["2"] * 40), "column 1: got '2', expected the label 0 or 1"),
    "blank": ("", "1 tab-separated fields, expected 40"),
}


def put_line(path, number, text):
    """Replace a line of a file, numbered from 1."""
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_names_file_line_and_column(tmp_path, name, small_pieces):
    """What was finished stays; once the line is mended, the next run ends as if it was first."""
    days = write_days(tmp_path, 2, 20)
    text, message = BAD_LINES[name]
    put_line(tmp_path / "day_1", 14, text)
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2
    assert f"{tmp_path}/day_1, line 14: " in result.err and message in result.err
    assert result.err.endswith("--max-bad-lines=N skips and counts up to N such lines\n")
    assert result.err.count("\n") == 1
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared.partial"]
    put_line(tmp_path / "day_1", 14, "\t".join(days[1][13]))
    prepared = prepare(spec(f"--data_path={tmp_path}"))
    assert_equals_by_hand(prepared, days)
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared"]


@pytest.mark.parametrize("number", [1, 3])
def test_a_bad_line_before_anything_is_finished_leaves_nothing(tmp_path, number):
    write_days(tmp_path, 2, 20)
    put_line(tmp_path / "day_0", number, "label\tI1\tI2")
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"{tmp_path}/day_0, line {number}: column 1: got 'label'" in result.err
    assert ("header" in result.err) == (number == 1)
    assert folder_names(tmp_path) == ["day_0", "day_1"]


def test_flags_that_do_not_match_say_which_and_how_to_rebuild(tmp_path):
    write_days(tmp_path, 2, 20)
    base = f"--data_path={tmp_path}"
    assert prepare(base, "--max-ind-range=50").status == 0
    for flags, words in (
        (["--max-ind-range=60"], ("--max-ind-range = 50", "this run has 60")),
        (["--max-ind-range=50", "--data-sub-sample-rate=0.5"], ("--data-sub-sample-rate = 0.0",)),
        (["--max-ind-range=50", "--memory-map"], ("order on disk", "= file", "this run has total")),
    ):
        result = prepare(base, *flags)
        assert result.status == 2 and result.err.count("\n") == 1
        assert all(word in result.err for word in (*words, "delete", "--processed-data-file"))
    assert prepare(base, "--max-ind-range=50", "--numpy-rand-seed=9").status == 0, (
        "nothing was drawn by the seed"
    )
    assert prepare(base, "--max-ind-range=50", "--memory-map", "--data-randomize=none").status == 0


def test_a_changed_source_and_a_further_day_are_noticed(tmp_path):
    write_days(tmp_path, 2, 20)
    assert prepare(f"--data_path={tmp_path}").status == 0
    shutil.copy(tmp_path / "day_1", tmp_path / "day_2")
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and "made from 2 days, now there are 3" in result.err
    os.remove(tmp_path / "day_2")
    with open(tmp_path / "day_0", "a") as file:
        file.write("\n")
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and "day_0 is not the file" in result.err


def test_damaged_prepared_data_is_noticed(tmp_path):
    write_days(tmp_path, 2, 20)
    prepare(f"--data_path={tmp_path}")
    folder = tmp_path / "terabyte_processed.prepared"
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(100)
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and "train.bin is damaged (expected 800 bytes, got 100)" in result.err
    (folder / "meta.json").write_text("{}")
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and "meta.json is damaged" in result.err


def test_prepared_data_serves_where_the_raw_files_are_gone(tmp_path):
    write_days(tmp_path, 2, 20)
    prepare(f"--data_path={tmp_path}")
    os.remove(tmp_path / "day_0"), os.remove(tmp_path / "day_1")
    assert "Prepared already" in prepare(f"--data_path={tmp_path}").out


def test_missing_empty_single_and_gapped_days(tmp_path):
    def message(*argv):
        result = prepare(*argv)
        assert result.status == 2 and result.err.count("\n") == 1
        return result.err

    assert "no such folder" in message(f"--data_path={tmp_path}/none")
    assert "neither day_0" in message(f"--data_path={tmp_path}")
    write_days(tmp_path, 1, 20)
    assert "only day_0" in message(f"--data_path={tmp_path}")
    shutil.copy(tmp_path / "day_0", tmp_path / "day_3")
    assert "lacks day_1, day_2" in message(f"--data_path={tmp_path}")
    (
        shutil.copy(tmp_path / "day_0", tmp_path / "day_1"),
        shutil.copy(tmp_path / "day_0", tmp_path / "day_2"),
    )
    (tmp_path / "day_2").write_text("")
    assert "day_2 is empty" in message(f"--data_path={tmp_path}")
    shutil.copy(tmp_path / "day_0", tmp_path / "train.txt")
    assert "say --data-set=kaggle or terabyte" in message(f"--data_path={tmp_path}")
    assert "no data is named" in message("--data-set=kaggle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_no_permission(tmp_path):
    write_days(tmp_path, 2, 20)
    (tmp_path / "day_1").chmod(0)
    assert "no permission" in prepare(f"--data_path={tmp_path}").err
    (tmp_path / "day_1").chmod(0o644)
    tmp_path.chmod(0o555)
    assert "name a writable --processed-data-file" in prepare(f"--data_path={tmp_path}").err
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("where", ["pieces", "rows", "end"])
@pytest.mark.parametrize(
    "number,words",
    [(errno.ENOSPC, ("no space left", "is kept")), (errno.EROFS, ("--processed-data-file",))],
    ids=["full", "read-only"],
)
def test_a_full_or_read_only_disk_is_one_line_and_the_next_run_goes_on(
    tmp_path, where, number, words
):
    days = write_days(tmp_path, 2, 20)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    owner, name = {
        "pieces": (Writer, "section"),
        "rows": (os, "pwrite"),
        "end": (publish, "write_synced"),
    }[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, refuse)
        result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and all(word in result.err for word in words)
    assert result.err.count("\n") == 1
    kept = [] if where == "pieces" else ["terabyte_processed.prepared.partial"]
    assert folder_names(tmp_path) == ["day_0", "day_1", *kept]
    assert prepare(f"--data_path={tmp_path}").status == 0
    assert_equals_by_hand(find_prepared(spec(f"--data_path={tmp_path}")), days)
    assert folder_names(tmp_path) == ["day_0", "day_1", "terabyte_processed.prepared"]


def test_meta_says_what_it_was_made_from(tmp_path):
    write_days(tmp_path, 2, 20)
    prepare(f"--data_path={tmp_path}", "--max-ind-range=9", "--data-sub-sample-rate=0.1")
    meta = json.loads((tmp_path / "terabyte_processed.prepared" / "meta.json").read_text())
    assert meta["format"] == 2 and meta["recipe"]["--max-ind-range"] == 9
    assert meta["columns"][0] == ["label", "|u1"] and len(meta["columns"]) == 40
    assert meta["recipe"]["--numpy-rand-seed"] == 123
    assert [source["name"] for source in meta["sources"]] == ["day_0", "day_1"]
    assert max(meta["counts"]) <= 9


def test_a_wide_range_takes_no_table_and_keeps_values_apart(tmp_path):
    days = write_days(tmp_path, 2, 30)
    for wide in (2**31 + 11, 2**32):
        place = f"--processed-data-file={tmp_path}/{wide}"
        made = prepare(spec(f"--data_path={tmp_path}", f"--max-ind-range={wide}", place))
        assert_equals_by_hand(made, days, wide)
    assert "--max-ind-range" in prepare(f"--data_path={tmp_path}", "--max-ind-range=9999999999").err


def test_a_file_without_lines_is_refused_early(tmp_path):
    write_days(tmp_path, 2, 20)
    (tmp_path / "day_1").write_bytes(b"\0" * 9_000_000)
    result = prepare(f"--data_path={tmp_path}")
    assert result.status == 2 and "day_1, line 1: 1 tab-separated fields" in result.err


def test_bad_input_makes_no_folders(tmp_path):
    result = prepare("--raw-data-file=/none/day", f"--processed-data-file={tmp_path}/new/a/b")
    assert result.status == 2 and list(tmp_path.iterdir()) == []


def test_two_runs_at_once_prepare_once(tmp_path):
    write_days(tmp_path, 2, 3000)
    command = [sys.executable, ROOT / "data_utils.py", f"--data_path={tmp_path}"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("Prepared 6000 rows" in text for text in texts) == 1
