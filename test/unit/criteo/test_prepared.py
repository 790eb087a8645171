"""Prepared data is used if it was made as the flags ask, of the files that are there, whole."""

import dataclasses
import json

import numpy as np
import pytest

from common.errors import UserError
from criteo.prepared import FORMAT_VERSION, SPLITS, find_prepared, recipe
from criteo.raw_files import RawFile
from criteo.row_layout import Layout
from criteo.spec import DataSpec

LAYOUT = Layout((1, 2, 4) * 13 + (1,))
ROWS = {"train": 5, "test": 2, "val": 0}


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
    (made.directory / "meta.json").unlink()
    assert find_prepared(made) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_ind_range": 60}, "made with --max-ind-range = 50, this run has 60"),
        ({"sub_sample_rate": 0.5}, "made with --data-sub-sample-rate = 0.0"),
        ({"data_set": "kaggle"}, "made with --data-set = terabyte"),
        ({"memory_map": True}, "made with order on disk (--memory-map with --data-randomize) ="),
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
    assert "made with --data-set" in refusal(dataclasses.replace(made, data_set="kaggle"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 1}, f"format 1, this program reads {FORMAT_VERSION}"),
        ({"format": None}, f"format None, this program reads {FORMAT_VERSION}"),
        ({"columns": []}, "meta.json is damaged"),
        ({"recipe": {}}, "meta.json is damaged"),
        ({"counts": None}, "meta.json is damaged"),
        ({"rows": {"train": 6}}, f"expected {6 * LAYOUT.row_bytes} bytes, got"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(made, change, words):
    write(made, meta_of(made) | change)
    assert words in refusal(made)


def test_damaged_files_are_named(made):
    (made.directory / "train.bin").write_bytes(b"12")
    expected = f"train.bin is damaged (expected {5 * LAYOUT.row_bytes} bytes, got 2)"
    assert expected in refusal(made)
    (made.directory / "meta.json").write_text("no JSON")
    assert "meta.json is damaged" in refusal(made)
