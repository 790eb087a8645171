"""The flags of Criteo data become one record, or one line that says what is wrong."""

from pathlib import Path

import pytest
from by_hand import spec

from common.errors import UserError
from criteo.spec import DataSpec


def test_the_flags_are_the_record():
    flags = "--data-set=terabyte --raw-data-file=/d/day --processed-data-file=/p/x --memory-map"
    flags += " --data-randomize=day --max-ind-range=7 --data-sub-sample-rate=0.5"
    flags += " --dataset-multiprocessing --mlperf-bin-loader --numpy-rand-seed=9 --max-bad-lines=2"
    assert spec(*flags.split()) == DataSpec(
        "terabyte", Path("/d/day"), Path("/p/x"), max_ind_range=7, sub_sample_rate=0.5,
        randomize="day", memory_map=True, flat=True, parallel=True, seed=9, max_bad_lines=2,
    )  # fmt: skip
    raw_only = spec("--raw-data-file=/d/train.txt")
    processed = Path("/d/kaggleAdDisplayChallenge_processed.npz")
    assert raw_only == DataSpec("kaggle", Path("/d/train.txt"), processed)
    assert spec(f"--processed-data-file={processed}") == raw_only


def test_prepared_data_is_named_after_processed():
    for name in ("x", "x.npz"):
        named = spec("--raw-data-file=/d/day", f"--processed-data-file=/p/{name}")
        assert named.directory == Path("/p/x.prepared")
        assert named.work_folder == Path("/p/x.prepared.partial")


@pytest.mark.parametrize(
    "flags, order",
    [([], "file"), (["--memory-map"], "total"), (["--mlperf-bin-loader"], "total"),
     (["--memory-map", "--data-randomize=day"], "day"),
     (["--memory-map", "--data-randomize=none"], "file")],
)  # fmt: skip
def test_only_mapped_rows_are_shuffled_on_disk(flags, order):
    assert spec("--raw-data-file=/d/day", *flags).order == order


@pytest.mark.parametrize(
    "names, data_set, raw",
    [
        (["train.txt"], "kaggle", "train.txt"),
        (["train.txt.gz"], "kaggle", "train.txt"),
        (["kaggleAdDisplayChallenge_processed.prepared"], "kaggle", "train.txt"),
        (["day_0"], "terabyte", "day"),
        (["day_0.gz"], "terabyte", "day"),
        (["day_0_reordered.npz"], "terabyte", "day"),
        (["terabyte_processed_train.bin"], "terabyte", "day"),
    ],
)
def test_a_folder_tells_which_data_set_it_holds(tmp_path, names, data_set, raw):
    for name in names:
        (tmp_path / name).touch()
    found = spec(f"--data_path={tmp_path}")
    assert (found.data_set, found.raw) == (data_set, tmp_path / raw)


def test_what_no_data_can_be_found_for_is_named(tmp_path):
    (tmp_path / "day_0").touch(), (tmp_path / "train.txt").touch()
    (tmp_path / "empty").mkdir()
    for flags, words in (
        ([], "no data is named"),
        ([f"--data_path={tmp_path}/none"], "none: no such folder"),
        ([f"--data_path={tmp_path}/empty"], "found neither day_0, day_1, ... nor train.txt there"),
        ([f"--data_path={tmp_path}/day_0"], "day_0: not a folder; --raw-data-file takes a file"),
        ([f"--data_path={tmp_path}"], "say --data-set=kaggle or terabyte"),
        (["--raw-data-file=x", "--max-ind-range=0"], "--max-ind-range=0: expected 1 to 2^32"),
        (["--raw-data-file=x", f"--max-ind-range={2**32 + 1}"], "expected 1 to 2^32, or -1"),
    ):
        with pytest.raises(UserError) as caught:
            spec(*flags)
        assert words in str(caught.value)
    (tmp_path / "empty" / "train.txt").mkdir()
    assert spec(f"--data_path={tmp_path}/empty").raw == tmp_path / "empty" / "train.txt"
    assert spec(f"--data_path={tmp_path}", "--data-set=kaggle").raw == tmp_path / "train.txt"


@pytest.mark.parametrize("path", [".", "..", "/", "x/", "/x/.", "x/..", "//"])
@pytest.mark.parametrize("flag", ["--processed-data-file", "--raw-data-file"])
def test_a_path_that_ends_in_no_name_is_refused(flag, path):
    """All names of prepared data are made from the last part of the path."""
    with pytest.raises(UserError) as caught:
        spec("--raw-data-file=/d/day", f"{flag}={path}")
    assert str(caught.value).startswith(f"{flag}={path} ends in no file's name: expected a path")
