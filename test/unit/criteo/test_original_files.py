"""Files that the original program left are read: npz, reordered npz, flat .bin with counts."""

import os
import random
import shutil

import numpy as np
import pytest
from by_hand import by_hand, prepare, spec
from conftest import CRITEO_MODEL, rows_of, train, write_days

import data_utils
from common.errors import UserError
from criteo.original_files import ROWS_PER_BLOCK, find_original, read_original


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(rows of three days of 50, rows of each table), as the original would write them."""
    return by_hand(write_days(tmp_path_factory.mktemp("raw"), 3, 50))


def save_npz(path, rows, dtype=np.int32, **more):
    path.parent.mkdir(exist_ok=True)
    integers, ids = rows[:, 1:14].astype(dtype), rows[:, 14:].astype(dtype)
    np.savez_compressed(path, X_int=integers, X_cat=ids, y=rows[:, 0], **more)


def save_flat(folder, parts, counts):
    """Flat files, named by the flags that are returned."""
    half = len(parts[-1]) // 2
    splits = {
        "train": np.concatenate(parts[:-1]),
        "test": parts[-1][:half],
        "val": parts[-1][half:],
    }
    for split, rows in splits.items():
        rows.tofile(folder / f"x_{split}.bin")
    np.savez(folder / "day_fea_count.npz", counts=np.array(counts))
    names = [f"--raw-data-file={folder}/day", f"--processed-data-file={folder}/x"]
    return ["--data-set=terabyte", "--mlperf-bin-loader", *names]


def assert_same_data(prepared, parts, counts, rows_per_part=(50, 50, 50)):
    rows = [rows_of(prepared, split) for split in ("train", "test", "val")]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(parts))
    assert list(prepared.counts) == counts and prepared.rows_per_part == rows_per_part


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_processed_npz_of_terabyte(made, tmp_path, dtype, order):
    parts, counts = made
    path = tmp_path / "terabyte_processed.npz"
    rows = np.array(np.concatenate(parts), dtype=dtype, order=order)
    np.savez(path, X_int=rows[:, 1:14], X_cat=rows[:, 14:], y=rows[:, 0], counts=np.array(counts))
    np.savez(tmp_path / "day_day_count.npz", total_per_file=np.array([50, 50, 50]))
    names = [f"--raw-data-file={tmp_path}/day", f"--processed-data-file={path}"]
    assert_same_data(data_utils.prepare(spec("--data-set=terabyte", *names)), parts, counts)
    (tmp_path / "day_day_count.npz").unlink()
    with pytest.raises(UserError, match="day_day_count.npz: no such file"):
        find_original(tmp_path / "day", path, mapped=False)
    np.savez(tmp_path / "day_day_count.npz", total_per_file=np.array([50, 50]))
    with pytest.raises(UserError, match="total_per_file adds up to 100, .* has 150 rows"):
        find_original(tmp_path / "day", path, mapped=False)


def test_processed_npz_of_kaggle_without_day_counts(made, tmp_path):
    """And the range of --max-ind-range is asked for every time."""
    parts, counts = made
    path = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    save_npz(path, np.concatenate(parts), counts=np.array(counts))
    flags = ["--data-set=kaggle", f"--processed-data-file={path}"]
    too_small = "--max-ind-range=3 allows fewer"
    assert too_small in prepare(*flags, "--max-ind-range=3").err
    rows_per_part = (22, 22, 22, 21, 21, 21, 21)
    assert_same_data(data_utils.prepare(spec(*flags)), parts, counts, rows_per_part)
    assert too_small in prepare(*flags, "--max-ind-range=3").err


def test_reordered_npz_keep_their_order_if_rows_are_mapped(made, tmp_path):
    """--data_path finds them too."""
    parts, counts = made
    folder = tmp_path / "theirs"
    for day, rows in enumerate(parts):
        save_npz(folder / f"day_{day}_reordered.npz", rows)
    assert find_original(folder / "day", tmp_path / "p", mapped=False) is None
    with pytest.raises(UserError, match="day_fea_count.npz: no such file.*: get it from"):
        find_original(folder / "day", tmp_path / "p", mapped=True)
    np.savez(folder / "day_fea_count.npz", counts=np.array(counts))
    prepared = data_utils.prepare(spec(f"--data_path={folder}", "--memory-map"))
    assert_same_data(prepared, parts, counts)


def test_blocks_of_rows_are_cut_where_parts_end(tmp_path):
    """Rows of two blocks, in seven parts."""
    rows = np.zeros((ROWS_PER_BLOCK + 999, 40), np.int32)
    rows[:, 1] = np.arange(len(rows))
    save_npz(tmp_path / "k.npz", rows, counts=np.ones(26))
    original = find_original(tmp_path / "train.txt", tmp_path / "k.npz", mapped=False)
    found = list(read_original(original))
    assert [part for part, _ in found] == sorted(part for part, _ in found) and len(found) == 8
    sizes = np.bincount([part for part, _ in found], [len(rows) for _, rows in found])
    assert tuple(sizes) == original.rows_per_part
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in found]), rows)


def test_flat_files_with_counts_are_read_as_they_are(made, tmp_path):
    parts, counts = made
    flags = save_flat(tmp_path, parts, counts)
    assert_same_data(data_utils.prepare(spec(*flags)), parts, counts, (100, 50))
    assert "--max-ind-range=3 allows fewer" in prepare(*flags, "--max-ind-range=3").err
    with open(tmp_path / "x_train.bin", "ab") as file:
        file.write(b"1234")
    assert "no whole rows" in prepare(*flags).err
    (tmp_path / "x_train.bin").write_bytes(b"")
    assert "is empty: expected rows" in prepare(*flags).err


def test_flat_files_are_written_and_read_again(tmp_path):
    days = write_days(tmp_path / "raw", 3, 50)
    parts, counts = by_hand(days)
    flags = [f"--data_path={tmp_path}/raw", f"--processed-data-file={tmp_path}/flat/x"]
    flags += ["--mlperf-bin-loader", "--data-randomize=none"]
    assert "Prepared 150 rows" in prepare(*flags).out
    assert_same_data(data_utils.prepare(spec(*flags)), parts, counts, (100, 50))
    rows = np.fromfile(tmp_path / "flat" / "x_train.bin", np.int32).reshape(-1, 40)
    np.testing.assert_array_equal(rows, np.concatenate(parts[:2]))
    assert np.load(tmp_path / "raw" / "day_fea_count.npz")["counts"].tolist() == counts
    wide = [*CRITEO_MODEL, "--mini-batch-size=16", "--test-freq=100"]
    trained = train(*wide, *flags)
    assert trained.status == 0 and len(trained.losses) == 7 and "Prepared" not in trained.out
    assert train(*wide, *flags, "--mlperf-bin-shuffle").losses != trained.losses
    loaded = train(*wide, f"--data_path={tmp_path}/raw", "--data-randomize=none")
    assert loaded.losses == trained.losses and loaded.tests == trained.tests


@pytest.mark.parametrize("split, rows", [("train", 3), ("test", 25), ("val", 1)])
def test_flat_files_without_all_of_their_rows_are_refused(tmp_path, split, rows):
    """Cut at a row's boundary; the _meta.json beside them says how many rows there were."""
    write_days(tmp_path / "raw", 3, 50)
    flags = [f"--data_path={tmp_path}/raw", f"--processed-data-file={tmp_path}/x"]
    assert prepare(*flags, "--mlperf-bin-loader").status == 0
    path = tmp_path / f"x_{split}.bin"
    size = path.stat().st_size
    os.truncate(path, size - 160 * rows)
    result = prepare(*flags, "--mlperf-bin-loader")
    assert result.status == 2 and result.err.count("\n") == 1
    sizes = f"expected {size} bytes, got {size - 160 * rows}"
    assert f"x_{split}.bin is damaged ({sizes})" in result.err
    assert f"delete {tmp_path}/x_train.bin to have it made again" in result.err


def test_an_id_outside_its_table_names_file_row_and_table(made, tmp_path):
    parts, counts = made
    rows = np.concatenate(parts)
    rows[7, 14 + 3] = 99
    save_npz(tmp_path / "bad_processed.npz", rows, counts=np.array(counts))
    result = prepare("--data-set=kaggle", f"--processed-data-file={tmp_path}/bad_processed.npz")
    where = f"bad_processed.npz, row 7: id 99 of table 3 is outside its {counts[3]} rows"
    assert result.status == 2 and where in result.err
    assert not (tmp_path / "bad_processed.prepared").exists()


def test_an_id_outside_its_table_in_flat_files_is_found_when_it_is_read(made, tmp_path):
    parts, counts = [part.copy() for part in made[0]], made[1]
    parts[0][33, 14] = -1
    flags = save_flat(tmp_path, parts, counts)
    result = train(*CRITEO_MODEL, "--data-generation=dataset", *flags)
    assert result.status == 2
    assert f"row 33 of {tmp_path}/x_train.bin" in result.err and "id -1 of table 0" in result.err


def test_files_of_another_kind_are_refused(made, tmp_path):
    parts, counts = made
    path = tmp_path / "kaggle_processed.npz"
    flags = ["--data-set=kaggle", f"--processed-data-file={path}"]
    path.write_bytes(b"no zip")
    assert "is not an npz" in prepare(*flags).err
    np.savez(path, X_int=np.zeros((3, 13)), counts=np.array(counts))
    assert "is not an npz" in prepare(*flags).err
    save_npz(path, np.concatenate(parts), counts=np.array(counts, dtype=object))
    assert "is not an npz" in prepare(*flags).err
    save_npz(path, np.concatenate(parts), counts=np.zeros(26))
    assert "counts[0] is 0.0, expected 26 whole numbers from 1 to 2^31" in prepare(*flags).err


def refusal_of(path, *flags):
    """The one line about an npz; nothing is prepared of it."""
    result = prepare("--data-set=kaggle", f"--processed-data-file={path}", *flags)
    assert result.status == 2 and result.err.count("\n") == 1 and str(path.parent) in result.err
    assert not path.with_suffix(".prepared").exists()
    return result.err


@pytest.mark.parametrize(
    "counts, words",
    [
        (np.full(26, np.nan), "counts[0] is nan"),
        (np.full(26, np.inf), "counts[0] is inf"),
        ([9] * 25 + [2.5], "counts[25] is 2.5"),
        ([9] * 25 + [-1], "counts[25] is -1"),
        ([9] * 25 + [2**31 + 1], "counts[25] is 2147483649"),
        (np.full(26, 2**64 - 1, np.uint64), "counts[0] is 18446744073709551615"),
        ([9] * 25, "counts has shape (25,)"),
        (np.full((26, 1), 9), "counts has shape (26, 1)"),
        (9, "counts has shape ()"),
        (["9"] * 26, "counts has shape (26,) and type <U1"),
        ([True] * 26, "type bool"),
        ([9j] * 26, "type complex128"),
    ],
)
def test_wrong_counts_are_named(made, tmp_path, counts, words):
    path = tmp_path / "k_processed.npz"
    save_npz(path, np.concatenate(made[0]), counts=np.array(counts))
    line = refusal_of(path)
    assert words in line and "expected 26 whole numbers from 1 to 2^31" in line


@pytest.mark.parametrize("parts", [[np.nan, 150], [75.5, 74.5], [[150]], 150, ["150"], [-1, 151]])
def test_wrong_rows_of_days_are_named(made, tmp_path, parts):
    path = tmp_path / "k_processed.npz"
    save_npz(path, np.concatenate(made[0]), counts=np.array(made[1]))
    np.savez(tmp_path / "train_day_count.npz", total_per_file=np.array(parts))
    line = refusal_of(path)
    assert "train_day_count.npz: total_per_file" in line and "expected a list of whole num" in line


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "name, column, value, words",
    [
        ("y", 0, 2, "row 7: label 2 is neither 0 nor 1"),
        ("y", 0, -1, "row 7: label -1 is neither 0 nor 1"),
        ("y", 0, 0.5, "(0.5 in row 7 is not a whole number of 32 bits)"),
        ("y", 0, np.nan, "(nan in row 7 is not a whole number of 32 bits)"),
        ("X_int", 3, 2.0**31, "in row 7 is not a whole number of 32 bits)"),
        ("X_int", 3, -np.inf, "(-inf in row 7 is not a whole number of 32 bits)"),
        ("X_cat", 3, 1.5, "(1.5 in row 7 is not a whole number of 32 bits)"),
        ("X_cat", 3, -1, "row 7: id -1 of table 3 is outside"),
    ],
)
def test_values_that_no_row_has_are_named(made, tmp_path, name, column, value, words, order):
    path, rows = tmp_path / "k_processed.npz", np.concatenate(made[0]).astype(float)
    arrays = {"y": rows[:, 0], "X_int": rows[:, 1:14], "X_cat": rows[:, 14:]}
    arrays[name].reshape(len(rows), -1)[7, column] = value
    arrays = {key: np.array(array, order=order) for key, array in arrays.items()}
    np.savez(path, counts=np.array(made[1]), **arrays)
    assert words in refusal_of(path)


def test_integers_below_zero_become_zero_as_those_of_text_do(made, tmp_path):
    path, rows = tmp_path / "k_processed.npz", np.concatenate(made[0])
    rows[7, 5] = -3
    save_npz(path, rows, counts=np.array(made[1]))
    rows[7, 5] = 0
    prepared = data_utils.prepare(spec("--data-set=kaggle", f"--processed-data-file={path}"))
    assert_same_data(prepared, [rows], made[1], (22, 22, 22, 21, 21, 21, 21))


@pytest.mark.parametrize("name", ["y", "X_int", "X_cat"])
@pytest.mark.parametrize(
    "array",
    [np.zeros(()), np.zeros((0, 13)), np.array(["1"] * 150), np.zeros(7), np.zeros(150, "V8")],
    ids=range(5),
)
def test_arrays_of_another_kind_are_refused(made, tmp_path, name, array):
    path, rows = tmp_path / "k_processed.npz", np.concatenate(made[0])
    arrays = {"y": rows[:, 0], "X_int": rows[:, 1:14], "X_cat": rows[:, 14:]}
    np.savez(path, **(arrays | {"counts": np.array(made[1]), name: array}))
    line = refusal_of(path)
    assert "is not an npz that the original writes (" in line and "make it again, or delete" in line


def test_a_damaged_npz_is_one_line_wherever_the_damage_is(made, tmp_path):
    """Or no matter, if nothing reads the bytes that are damaged."""
    path, draw = tmp_path / "k_processed.npz", random.Random(0)
    save_npz(path, np.concatenate(made[0]), counts=np.array(made[1]))
    whole = path.read_bytes()
    for number in range(60):
        content = bytearray(whole[: draw.randrange(len(whole))] if number % 5 == 0 else whole)
        for _ in range(draw.randrange(1, 40)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        result = prepare("--data-set=kaggle", f"--processed-data-file={path}")
        assert (result.status, result.err.count("\n")) in ((2, 1), (0, 0)), result.err
        shutil.rmtree(path.with_suffix(".prepared"), ignore_errors=True)
