"""Prepared data is used if it was made as the flags ask, of the files that are there, whole."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from common.errors import UserError
from criteo.meta_file import FORMAT_VERSION, SPLITS, recipe
from criteo.prepared import find_prepared
from criteo.raw_files import RawFile
from criteo.row_layout import Layout
from criteo.spec import DataSpec

LAYOUT = Layout((1, 2, 4) * 13 + (1,))
ROWS = {"train": 5, "test": 2, "val": 0}
BEGINS, DIGEST = list(range(0, 26 * 50, 50)), "0123456789abcdef" * 2


@pytest.fixture
def made(tmp_path):
    """The spec of prepared data of two days, as it was written."""
    for day in range(2):
        (tmp_path / f"day_{day}").write_text("any text\n")
    spec = DataSpec("terabyte", tmp_path / "day", tmp_path / "x.npz", max_ind_range=50)
    spec.directory.mkdir()
    for split, num_rows in ROWS.items():
        LAYOUT.pack(np.full((40, num_rows), 3, np.int32)).tofile(spec.directory / f"{split}.bin")
    sources = [RawFile.at(tmp_path / f"day_{day}").fingerprint for day in range(2)]
    meta = {"format": FORMAT_VERSION, "recipe": recipe(spec), "sources": sources, "rows": ROWS}
    np.arange(26 * 50, dtype="<i4").tofile(spec.directory / "vocabulary.bin")
    meta |= {"vocabulary": {"begins": BEGINS, "digest": DIGEST}}
    write(spec, meta | {"columns": LAYOUT.columns, "counts": [50] * 26, "rows_per_part": [5, 2]})
    return spec


def meta_of(spec):
    return json.loads((spec.directory / "meta.json").read_text())


def write(spec, meta):
    (spec.directory / "meta.json").write_text(json.dumps(meta))


def refusal(spec):
    with pytest.raises(UserError) as caught:
        find_prepared(spec)
    return str(caught.value)


def test_data_that_fits_is_found_and_mapped(made):
    prepared = find_prepared(made)
    assert prepared.layout == LAYOUT and prepared.counts == (50,) * 26
    assert prepared.rows_per_part == (5, 2)
    for split in SPLITS:
        rows = prepared.rows(split)
        assert rows.shape == (ROWS[split], LAYOUT.row_bytes)
        assert (LAYOUT.unpack(rows) == 3).all() and len(rows) == ROWS[split]
    vocabulary = prepared.vocabulary
    assert vocabulary.digest == DIGEST and not prepared.has_original_ids
    assert vocabulary.values(25).tolist() == list(range(25 * 50, 26 * 50))


def test_data_of_version_2_has_no_vocabulary_and_needs_none(made):
    """Whatever lies beside it or is in its meta.json."""
    write(made, meta_of(made) | {"format": 2})
    assert find_prepared(made).vocabulary is None
    (made.directory / "vocabulary.bin").unlink()
    meta = meta_of(made)
    del meta["vocabulary"]
    write(made, meta)
    prepared = find_prepared(made)
    assert prepared.vocabulary is None and prepared.rows("train").shape == (5, LAYOUT.row_bytes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"max_ind_range": 60},
            "prepared with --max-ind-range=50; this run has --max-ind-range=60",
        ),
        ({"sub_sample_rate": 0.5}, "prepared with --data-sub-sample-rate=0.0"),
        ({"data_set": "kaggle"}, "prepared with --data-set=terabyte"),
        ({"memory_map": True}, "prepared without --memory-map (or"),
    ],
)
def test_another_recipe_is_named_with_how_to_rebuild(made, changes, words):
    line = refusal(dataclasses.replace(made, **changes))
    assert words in line and f"delete {made.directory}" in line and "--processed-data-file" in line


def test_flags_that_do_not_change_the_bytes_are_no_other_recipe(made):
    for changes in ({"seed": 9}, {"memory_map": True, "randomize": "none"}, {"parallel": True}):
        assert find_prepared(dataclasses.replace(made, **changes)) is not None
    drawn = dataclasses.replace(made, sub_sample_rate=0.5)
    assert recipe(drawn) != recipe(dataclasses.replace(drawn, seed=9))


def test_other_sources_are_named_but_they_may_be_gone(made):
    (made.raw.parent / "day_2").write_text("more\n")
    assert "made from 2 days, now there are 3" in refusal(made)
    (made.raw.parent / "day_2").unlink()
    (made.raw.parent / "day_0").write_text("another text\n")
    assert "day_0 is not the file that" in refusal(made)
    for day in range(2):
        (made.raw.parent / f"day_{day}").unlink()
    assert find_prepared(made) is not None


def test_imported_data_is_held_against_its_data_set_its_order_and_its_largest_table(made):
    """The original's files do not tell by which other flags they were made."""
    write(made, meta_of(made) | {"imported": True})
    assert find_prepared(dataclasses.replace(made, sub_sample_rate=0.5, max_ind_range=60))
    line = refusal(dataclasses.replace(made, max_ind_range=40))
    assert "has a table of 50 rows, --max-ind-range=40 allows fewer" in line
    assert "prepared with --data-set" in refusal(dataclasses.replace(made, data_set="kaggle"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 1}, "format 1, this program reads 2 and 3"),
        ({"format": 4}, "format 4, this program reads 2 and 3"),
        ({"format": None}, "format None, this program reads 2 and 3"),
        ({"format": True}, "format True, this program reads 2 and 3"),
        (
            {"rows": ROWS | {"train": 6}, "rows_per_part": [6, 2]},
            f"expected {6 * LAYOUT.row_bytes} bytes, got",
        ),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(made, change, words):
    write(made, meta_of(made) | change)
    assert words in refusal(made)


def test_damaged_files_are_named(made):
    (made.directory / "train.bin").write_bytes(b"12")
    expected = f"train.bin is damaged (expected {5 * LAYOUT.row_bytes} bytes, got 2)"
    assert expected in refusal(made)
    (made.directory / "train.bin").unlink()
    assert "train.bin is missing" in refusal(made)


def test_a_vocabulary_that_is_missing_or_cut_is_named(made):
    """Its digest is not computed: training does not read it."""
    path = made.directory / "vocabulary.bin"
    os.truncate(path, 26 * 50 * 4 - 1)
    assert "vocabulary.bin is damaged (expected 5200 bytes, got 5199): delete" in refusal(made)
    path.unlink()
    assert "vocabulary.bin is missing: delete" in refusal(made)


def test_only_imported_data_may_say_that_it_has_no_vocabulary(made):
    (made.directory / "vocabulary.bin").unlink()
    write(made, meta_of(made) | {"vocabulary": None, "imported": True})
    prepared = find_prepared(made)
    assert prepared.vocabulary is None and prepared.has_original_ids


def test_a_folder_or_a_file_that_is_in_the_way_is_named_before_anything_is_prepared(made):
    """The data's name is given by a rename, for which only an empty folder makes room."""
    (made.directory / "meta.json").unlink()
    assert f"{made.directory} is not prepared data, it has no meta.json: delete" in refusal(made)
    for path in made.directory.iterdir():
        path.unlink()
    assert find_prepared(made) is None
    made.directory.rmdir()
    assert find_prepared(made) is None
    made.directory.symlink_to("nothing")
    assert f"{made.directory} is a link to nothing: delete" in refusal(made)
    made.directory.unlink()
    made.directory.write_text("a file")
    assert f"{made.directory} is not a folder: delete {made.directory}" in refusal(made)
    below = dataclasses.replace(made, processed=made.directory / "x")
    assert f"{made.directory} is not a folder: " in refusal(below)


@pytest.mark.parametrize("name", ["train.bin", "meta.json", "fea_count.npz", "vocabulary.bin"])
def test_a_folder_with_the_name_of_a_flat_file_is_named_before_anything_is_prepared(made, name):
    (made.raw.parent / f"x_{name}").mkdir()
    line = refusal(dataclasses.replace(made, flat=True))
    assert f"x_{name} is a folder: delete it" in line


# ---------------------------------------------------------------- damaged meta.json


TEXTS = [
    "no JSON",
    "",
    "[" * 200_000,
    "[]",
    "3",
    "null",
    '"text"',
    '{"format": 2',
    '{"format": ' + "9" * 5000 + "}",
    "{}",
    "\udcff",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_meta_file_that_is_no_object_is_named(made, text):
    (made.directory / "meta.json").write_bytes(text.encode(errors="surrogateescape"))
    line = refusal(made)
    assert "meta.json is damaged (" in line and f": delete {made.directory} to have it" in line


HUGE = 10**22
SOURCE = {"name": "day_0", "size": 1, "mtime_ns": 1}
NO = object()  # the key is left out
WRONG = {
    "columns": [NO, None, 3, "text", {}, [], LAYOUT.columns[:39], [["C1", "|u1"]] * 40],
    "columns[0]": [None, [], ["label"], ["label", 3], [{}, "|u1"], ["label", "|u1", "x"]],
    "columns[1]": [["I1", "<f4"], ["I1", "V999999999"], ["I1", "nonsense"], ["I99", "<u2"]],
    "rows": [NO, None, 3, [], {"train": 5}, {"train": 5, "test": 2}],
    "rows.train": [None, -5, 0, 5.0, "5", True, HUGE, float("nan"), float("inf"), [5]],
    "rows.test": [0, -1],
    "rows.val": [-1, None],
    "rows_per_part": [NO, None, 7, [], [7], [5, 3], [6, 2], {"0": 5}],
    "rows_per_part[0]": [None, -5, 5.0, "5", HUGE],
    "counts": [NO, None, 50, [], [50] * 25, [50] * 27, "5" * 26],
    "counts[3]": [None, 0, -50, 50.0, "50", True, HUGE, 2**31 + 1, float("nan"), [50]],
    "vocabulary": [NO, None, 3, [], {}, {"begins": BEGINS}, {"digest": DIGEST}],
    "vocabulary.begins": [None, 0, [], BEGINS[:25], [*BEGINS, 1300], [1, *BEGINS[1:]], "0" * 26],
    "vocabulary.begins[1]": [None, -50, 50.0, "50", True, HUGE, float("nan")],
    "vocabulary.digest": [None, 3, "", DIGEST[1:], DIGEST + "0", DIGEST.upper(), DIGEST[1:] + "\n"],
    "recipe": [NO, None, [], {}, {"--data-set": "terabyte"}],
    "recipe.--data-set": [["terabyte"], {}],
    "imported": [3, "yes", None],
    "sources": [NO, None, 3, {}],
    "sources[0]": [None, "day_0", [], {}, {"name": "day_0"}],
    "sources[0].name": [3, None, "", "a/b", "a\0b", "x" * 300, "\ud800"],
    "sources[0].size": [None, -1, "1", HUGE],
    "sources[0].mtime_ns": [None, 1.5, "1", HUGE],
}


def changed(meta, key, value):
    """meta.json with another value at a key as it is named in an error."""
    steps = [int(step) if step.isdecimal() else step for step in re.split(r"\.|\[|\]", key) if step]
    within = meta
    for step in steps[:-1]:
        within = within[step]
    if value is NO:
        del within[steps[-1]]
    else:
        within[steps[-1]] = value
    return meta


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_value_in_meta_is_one_line_that_names_the_key(made, key, value):
    write(made, changed(meta_of(made), key, value))
    line = refusal(made)
    assert "\n" not in line and len(line) < 500
    assert "meta.json is damaged (" in line and f": delete {made.directory} to have it" in line
    assert f"({key} is " in line or f"the key {key!r})" in line


def test_a_meta_file_that_is_a_folder_or_a_fifo_is_named(made):
    path = made.directory / "meta.json"
    path.unlink()
    for make in (os.mkdir, os.mkfifo):
        make(path)
        assert "meta.json is damaged (it is no regular file): delete" in refusal(made)
        path.rmdir() if path.is_dir() else path.unlink()
