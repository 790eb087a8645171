"""Raw text to rows on disk: tiny days against rows made by hand, and mistakes as one line."""

import gzip
import io
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from by_hand import assert_equals_by_hand, assert_vocabulary_by_hand, by_hand, prepare, spec
from conftest import rows_of, write_days
from preparation_runs import DAY, PARALLEL, SAMPLED, SMALL, TOTAL, Data

import data_utils
from preparation.sizes import DEFAULT_SIZES


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A machine of three cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    return Data(tmp_path)


def rows_and_counts(data, *flags):
    """(training rows (n, 40), the prepared data), which is removed."""
    prepared = data_utils.prepare(spec(*data.flags(), *flags), data.sizes)
    rows = rows_of(prepared, "train")
    shutil.rmtree(prepared.files["train"].parent)
    return rows, prepared


# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize("max_ind_range", [-1, 7, 2**31 + 11])
@pytest.mark.parametrize("largest", [50, 300, 70_000, 2**31 - 1])
def test_three_days_equal_rows_made_by_hand(tmp_path, largest, max_ind_range):
    """Of columns of 1 byte, and of 1, 2 and 4 bytes mixed."""
    days = write_days(tmp_path, 3, 41, largest=(50, largest, 300))
    flags = [f"--data_path={tmp_path}", f"--max-ind-range={max_ind_range}", PARALLEL]
    prepared = data_utils.prepare(spec(*flags), replace(SMALL, piece_bytes=1000, block_bytes=300))
    assert_equals_by_hand(prepared, days, max_ind_range)


def test_kaggle_is_cut_into_seven_parts_before_sub_sampling(tmp_path):
    (day,) = write_days(tmp_path, 1, 31)
    os.rename(tmp_path / "day_0", tmp_path / "train.txt")
    flags, sizes = [f"--data_path={tmp_path}"], replace(SMALL, piece_bytes=1000, block_bytes=300)
    assert data_utils.prepare(spec(*flags), sizes).rows_per_part == (5, 5, 5, 4, 4, 4, 4)
    flags += ["--data-sub-sample-rate=0.6", f"--processed-data-file={tmp_path}/x"]
    prepared = data_utils.prepare(spec(*flags), sizes)
    draws = np.random.RandomState(123).uniform(size=31)
    keep = [row[0] == "1" or draw >= 0.6 for row, draw in zip(day, draws, strict=True)]
    ends = np.cumsum((0, 5, 5, 5, 4, 4, 4, 4))
    want = tuple(sum(keep[a:b]) for a, b in itertools.pairwise(ends))
    assert prepared.rows_per_part == want
    kept = [row for row, wanted in zip(day, keep, strict=True) if wanted]
    parts, counts = by_hand([kept])
    rows = np.concatenate([rows_of(prepared, split) for split in ("train", "test", "val")])
    np.testing.assert_array_equal(rows, parts[0])
    assert list(prepared.counts) == counts
    assert_vocabulary_by_hand(prepared.vocabulary, [kept])


@pytest.mark.parametrize("order", ["total", "day"])
def test_mapped_data_is_shuffled_on_disk_by_the_seed(data, order):
    parts, _ = by_hand(data.days)
    flags = ["--memory-map", f"--data-randomize={order}"]
    made = [rows_and_counts(data, *flags, f"--numpy-rand-seed={k}")[0] for k in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    together = np.concatenate(parts[:2])
    assert sorted(made[0].tolist()) == sorted(together.tolist())
    first = sorted(made[0][: len(parts[0])].tolist())
    assert (first == sorted(parts[0].tolist())) == (order == "day")
    assert not np.array_equal(made[0], together)


# ---------------------------------------------------------------- what does not change the bytes

FLAGS = {
    "file": (),
    "file_sampled": SAMPLED,
    "none": ("--memory-map", "--data-randomize=none"),
    "total": TOTAL,
    "day": DAY,
    "total_sampled": (*TOTAL, *SAMPLED, "--max-ind-range=7"),
    "day_sampled": (*DAY, *SAMPLED, "--numpy-rand-seed=5"),
}


def without_sources(files):
    """Without what tells plain files from packed ones."""
    meta = json.loads(files["meta.json"])
    return files | {"meta.json": {name: meta[name] for name in meta if name != "sources"}}


@pytest.mark.parametrize("data_set", ["terabyte", "kaggle"])
@pytest.mark.parametrize("order", FLAGS)
def test_threads_blocks_and_gzip_do_not_show_in_the_bytes(data, order, data_set):
    """Nor in the report and in meta.json."""
    if data_set == "kaggle":
        data.to_kaggle()
    want = data.bytes_of(*FLAGS[order])
    data.sizes = replace(SMALL, block_bytes=97)
    assert data.bytes_of(*FLAGS[order], PARALLEL) == want
    for path in [*data.raw.iterdir()][:2]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    data.sizes = replace(SMALL, block_bytes=4 << 20)
    packed = data.bytes_of(*FLAGS[order])
    assert without_sources(packed) == without_sources(want)
    names = [source["name"] for source in json.loads(packed["meta.json"])["sources"]]
    assert names == sorted(path.name for path in data.raw.iterdir())
    data.sizes = SMALL
    assert data.bytes_of(*FLAGS[order], PARALLEL) == packed


def test_a_packed_day_is_never_unpacked_on_disk(data, monkeypatch):
    line = (data.raw / "day_1").read_bytes().splitlines()[3]
    data.pack(1)
    seen, number = [], data_utils.number

    def look(*args):
        seen.extend(path for path in data.work_folder.rglob("*") if path.is_file())
        assert not [path for path in seen if line in path.read_bytes()]
        return number(*args)

    monkeypatch.setattr(data_utils, "number", look)
    data.bytes_of(*TOTAL)
    assert len(seen) > 6


@pytest.mark.parametrize("ends", ["newline", "none", "members"])
def test_a_packed_day_that_ends_with_a_piece_gives_the_same_bytes(data, ends):
    """Its text is as long as a number of whole pieces; also without a last newline."""
    path = data.raw / "day_0"
    text = path.read_bytes()
    text = text if ends != "none" else text[:-1]
    text = text if len(text) % 2 == 0 else b"\t".join([text[:1], b"0" + text[2:]])
    data.sizes = replace(SMALL, piece_bytes=len(text) // 2)
    path.write_bytes(text)
    plain = data.bytes_of(*TOTAL)
    data.pack(0)
    if ends == "members":  # as pigz or cat make them
        parts = (text[:1000], text[1000:1001], text[1001:])
        packed = b"".join(gzip.compress(part) for part in parts)
        path.with_name("day_0.gz").write_bytes(packed)
    assert without_sources(data.bytes_of(*TOTAL)) == without_sources(plain)


# ---------------------------------------------------------------- what is there already


def test_done_once_and_its_raw_files_may_go(data):
    first = data.run()
    assert first.status == 0
    assert "Prepared 108 rows (72 train, 18 test, 18 validation)" in first.out
    shutil.rmtree(data.raw)
    data.raw.mkdir()
    again = prepare(f"--raw-data-file={data.raw}/day", *data.flags()[1:], "--data-set=terabyte")
    assert "Prepared already" in again.out and "108 rows" not in again.out
    assert names_in(data.folder) == ["a.prepared", "raw"]


def test_meta_says_what_it_was_made_from(data):
    files = data.bytes_of("--max-ind-range=9", "--data-sub-sample-rate=0.1")
    meta = json.loads(files["meta.json"])
    assert meta["format"] == 3 and meta["recipe"]["--max-ind-range"] == 9
    assert meta["columns"][0] == ["label", "|u1"] and len(meta["columns"]) == 40
    assert meta["recipe"]["--numpy-rand-seed"] == 123
    assert [source["name"] for source in meta["sources"]] == ["day_0", "day_1", "day_2"]
    assert max(meta["counts"]) <= 9
    ends = np.cumsum(meta["counts"]).tolist()
    assert meta["vocabulary"]["begins"] == [0, *ends[:-1]]
    assert len(files["vocabulary.bin"]) == 4 * ends[-1]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data-set=kaggle"], "no data is named"),
        (["--raw-data-file=/none/day", "--processed-data-file={}/new/a"], "/none/day"),
        (["--raw-data-file=/none/day", "--max-ind-range=9999999999"], "--max-ind-range"),
    ],
)
def test_mistakes_are_one_line_and_make_no_folders(tmp_path, words, message):
    """test_spec and test_raw_files have all others, test_prepared those of data that is there."""
    result = prepare(*(word.format(tmp_path) for word in words))
    assert result.status == 2 and result.err.count("\n") == 1 and message in result.err
    assert names_in(tmp_path) == []


def test_a_file_in_place_of_the_folder_of_rows_is_told_of(data):
    data.work_folder.mkdir()
    (data.work_folder / "final").touch()
    result = data.run()
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"final is no folder: remove {data.work_folder}" in result.err


def test_a_folder_whose_name_is_no_text_is_prepared_and_printed(tmp_path, monkeypatch):
    """Its bytes are of another encoding than standard output has, which takes text only."""
    folder = tmp_path / os.fsdecode(b"\xcf\xee")
    write_days(folder, 2, 9)
    for first in ("Prepared 18 rows", "Prepared already"):
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
        monkeypatch.setattr(sys, "stdout", out)
        assert data_utils.main([f"--data_path={folder}"]) == 0
        out.flush()
        printed = out.buffer.getvalue().decode()
        assert printed.startswith(first) and f"{tmp_path}/\\xcf\\xee" in printed


def test_a_file_without_lines_is_refused_early(data):
    (data.raw / "day_1").write_bytes(b"\0" * 9_000_000)
    data.sizes = DEFAULT_SIZES
    result = data.run()
    assert result.status == 2 and "day_1, line 1: 1 tab-separated fields" in result.err


def test_too_few_rows_are_told_of(data):
    for day in range(3):
        rows = [["0", *row[1:]] for row in data.days[day]]
        text = "".join("\t".join(row) + "\n" for row in rows)
        (data.raw / f"day_{day}").write_text(text)
    result = data.run("--data-sub-sample-rate=1")
    assert result.status == 2 and "too few rows: 0 to train and 0 to test" in result.err
    assert "add lines, or lower --data-sub-sample-rate" in result.err
