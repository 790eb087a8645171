"""Files that the original program left are read: npz, reordered npz, flat .bin with counts."""

import shutil

import numpy as np
import pytest
from by_hand import by_hand, prepare, spec
from conftest import CRITEO_MODEL, rows_of, train, write_days

MODEL = [*CRITEO_MODEL, "--mini-batch-size=16", "--test-freq=100", "--data-randomize=none"]


@pytest.fixture
def days(tmp_path):
    """Three days, their rows by hand, and what training on them prints."""
    rows = write_days(tmp_path / "raw", 3, 50)
    parts, counts = by_hand(rows)
    result = train(*MODEL, f"--data_path={tmp_path}/raw")
    assert result.status == 0, result.err
    return tmp_path, parts, counts, result


def save_npz(path, rows, dtype=np.int32, **more):
    np.savez_compressed(
        path,
        X_int=rows[:, 1:14].astype(dtype),
        X_cat=rows[:, 14:].astype(dtype),
        y=rows[:, 0],
        **more,
    )


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_processed_npz_of_terabyte(days, dtype):
    folder, parts, counts, wanted = days
    (folder / "theirs").mkdir()
    save_npz(
        folder / "theirs" / "terabyte_processed.npz",
        np.concatenate(parts),
        dtype,
        counts=np.array(counts),
    )
    np.savez(folder / "theirs" / "day_day_count.npz", total_per_file=np.array([50, 50, 50]))
    files = (
        f"--raw-data-file={folder}/theirs/day",
        f"--processed-data-file={folder}/theirs/terabyte_processed.npz",
    )
    result = train(*MODEL, "--data-generation=dataset", "--data-set=terabyte", *files)
    assert result.status == 0, result.err
    assert result.losses == wanted.losses and result.tests == wanted.tests


def test_processed_npz_of_kaggle_without_day_counts(days):
    folder, parts, counts, _ = days
    save_npz(
        folder / "kaggleAdDisplayChallenge_processed.npz",
        np.concatenate(parts),
        counts=np.array(counts),
    )
    prepared = prepare(
        spec(
            "--data-set=kaggle",
            f"--processed-data-file={folder}/kaggleAdDisplayChallenge_processed.npz",
        )
    )
    assert prepared.rows_per_part == (22, 22, 22, 21, 21, 21, 21)
    rows = [rows_of(prepared, split) for split in ("train", "test", "val")]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(parts))
    assert list(prepared.counts) == counts


def test_imported_data_is_held_against_the_range_every_time(days):
    folder, parts, counts, _ = days
    path = folder / "kaggle_processed.npz"
    save_npz(path, np.concatenate(parts), counts=np.array(counts))
    flags = ["--data-set=kaggle", f"--processed-data-file={path}"]
    assert prepare(*flags, "--max-ind-range=3").status == 2
    assert prepare(*flags).status == 0
    again = prepare(*flags, "--max-ind-range=3")
    assert again.status == 2 and "--max-ind-range=3 allows fewer" in again.err


def test_reordered_npz_are_trained_in_their_order(days):
    folder, parts, counts, wanted = days
    (folder / "theirs").mkdir()
    for day, rows in enumerate(parts):
        save_npz(folder / "theirs" / f"day_{day}_reordered.npz", rows)
    np.savez(folder / "theirs" / "day_fea_count.npz", counts=np.array(counts))
    files = (
        f"--raw-data-file={folder}/theirs/day",
        f"--processed-data-file={folder}/theirs/terabyte_processed.npz",
    )
    result = train(
        *MODEL, "--data-generation=dataset", "--data-set=terabyte", "--memory-map", *files
    )
    assert result.status == 0, result.err
    found = train(*MODEL, "--memory-map", f"--data_path={folder}/theirs")
    assert found.losses == result.losses, "--data_path finds them as well"
    assert result.losses == wanted.losses and result.tests == wanted.tests


def test_flat_files_with_counts_are_read_as_they_are(days):
    folder, parts, counts, wanted = days
    (folder / "theirs").mkdir()
    stem = folder / "theirs" / "terabyte_processed"
    np.concatenate(parts[:2]).tofile(f"{stem}_train.bin")
    parts[2][:25].tofile(f"{stem}_test.bin"), parts[2][25:].tofile(f"{stem}_val.bin")
    np.savez(folder / "theirs" / "day_fea_count.npz", counts=np.array(counts))
    files = [
        f"--raw-data-file={folder}/theirs/day",
        f"--processed-data-file={stem}",
        "--data-set=terabyte",
    ]
    flags = [*MODEL, "--data-generation=dataset", "--mlperf-bin-loader", *files]
    result = train(*flags)
    assert result.status == 0, result.err
    assert result.losses == wanted.losses and result.tests == wanted.tests
    too_small = train(*flags, "--max-ind-range=3")
    assert too_small.status == 2 and "--max-ind-range=3 allows fewer" in too_small.err
    with open(f"{stem}_train.bin", "ab") as file:
        file.write(b"1234")
    assert "no whole rows" in train(*flags).err


def test_flat_files_are_written_and_read_again(days):
    folder, parts, counts, wanted = days
    flags = [
        *MODEL,
        f"--data_path={folder}/raw",
        "--mlperf-bin-loader",
        f"--processed-data-file={folder}/flat/x",
    ]
    first, second = train(*flags), train(*flags)
    assert first.losses == second.losses == wanted.losses
    assert "Prepared 150 rows" in first.out and "Prepared" not in second.out
    rows = np.fromfile(folder / "flat" / "x_train.bin", np.int32).reshape(-1, 40)
    np.testing.assert_array_equal(rows, np.concatenate(parts[:2]))
    assert np.load(folder / "raw" / "day_fea_count.npz")["counts"].tolist() == counts
    shuffled = train(*flags, "--mlperf-bin-shuffle")
    assert shuffled.status == 0 and shuffled.losses != first.losses


def test_an_id_outside_its_table_names_file_row_and_table(days):
    folder, parts, counts, _ = days
    rows = np.concatenate(parts)
    rows[7, 14 + 3] = 99
    save_npz(folder / "bad_processed.npz", rows, counts=np.array(counts))
    result = prepare("--data-set=kaggle", f"--processed-data-file={folder}/bad_processed.npz")
    assert result.status == 2
    assert (
        f"bad_processed.npz, row 7: id 99 of table 3 is outside its {counts[3]} rows" in result.err
    )
    assert not (folder / "bad_processed.prepared").exists()


def test_an_id_outside_its_table_in_flat_files_is_found_when_it_is_read(days):
    folder, parts, counts, _ = days
    rows = np.concatenate(parts[:2])
    rows[33, 14] = -1
    for split, part in (("train", rows), ("test", parts[2]), ("val", parts[2])):
        part.tofile(folder / f"flat_{split}.bin")
    np.savez(folder / "day_fea_count.npz", counts=np.array(counts))
    files = [f"--raw-data-file={folder}/day", f"--processed-data-file={folder}/flat"]
    result = train(*MODEL, "--data-generation=dataset", "--mlperf-bin-loader", *files)
    assert (
        result.status == 2
        and "row 33 of the epoch" in result.err
        and "id -1 of table 0" in result.err
    )


def test_files_that_are_none_are_refused(days):
    folder, parts, counts, _ = days
    path = folder / "kaggle_processed.npz"
    flags = ["--data-set=kaggle", f"--processed-data-file={path}"]
    path.write_bytes(b"no zip")
    assert "is not an npz" in prepare(*flags).err
    np.savez(path, X_int=np.zeros((3, 13)), counts=np.array(counts))
    assert "is not an npz" in prepare(*flags).err
    save_npz(path, np.concatenate(parts), counts=np.array(counts, dtype=object))
    refused = prepare(*flags)
    assert refused.status == 2 and "is not an npz" in refused.err
    shutil.copy(folder / "raw" / "day_0", folder / "train.txt")
