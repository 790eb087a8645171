"""The vocabulary: its file, where it is found, copies beside a model, and ids of new rows."""

import dataclasses
import errno
import hashlib
import os
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from by_hand import assert_vocabulary_by_hand, number_by_hand, prepare, spec
from conftest import rows_of, write_days

import data_utils
from common.errors import UserError
from criteo.prepared import find_prepared
from criteo.text import parse_lines
from criteo.vocabulary import IdLookup, Vocabulary, VocabularySource, digest_of, find_vocabulary

INVERSE = pow(2654435769, -1, 2**32)  # of the factor of the lookup's hash


def write_vocabulary(path, columns):
    """A file with these values, given as 26 arrays or lists."""
    arrays = [np.array(column, np.uint32) for column in columns]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    counts = tuple(len(array) for array in arrays)
    return Vocabulary(path, counts, digest_of(path, counts))


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


# ---------------------------------------------------------------- the file


def test_columns_lie_one_after_the_other_and_the_digest_is_of_counts_and_bytes(tmp_path):
    columns = [range(1000 * k, 1000 * k + k % 3 + 1) for k in range(26)]
    vocabulary = write_vocabulary(tmp_path / "v", columns)
    for table, column in enumerate(columns):
        assert vocabulary.values(table).tolist() == list(column)
        assert vocabulary.values(table).dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.values(0)[0] = 1
    content, counts = (tmp_path / "v").read_bytes(), vocabulary.counts
    head = b"".join(count.to_bytes(8, "little") for count in counts)
    assert vocabulary.digest == hashlib.blake2b(head + content, digest_size=16).hexdigest()
    assert digest_of([content[:5], b"", content[5:]], counts) == vocabulary.digest
    assert digest_of(tmp_path / "v", counts[::-1]) != vocabulary.digest


def test_a_missing_or_another_file_is_one_line(tmp_path):
    path = tmp_path / "v"
    vocabulary = write_vocabulary(path, [[1, 2]] * 26)
    vocabulary.check()
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)
    other = digest_of(path, vocabulary.counts)
    line = refusal(vocabulary.check)
    assert f"{path} is damaged or another one (expected the digest {vocabulary.digest}" in line
    assert f"got {other}): copy it again" in line
    path.write_bytes(content[:-1])
    assert "(expected 208 bytes, got 207): copy it again" in refusal(vocabulary.check)
    path.unlink()
    assert f"{path} is missing: copy it again" in refusal(vocabulary.check)


# ---------------------------------------------------------------- ids of new rows


def colliding_values():
    """Values whose search begins at the last slots, behind which is the first."""
    return [(2**32 - 1 - k) * INVERSE % 2**32 for k in range(300)]


@pytest.fixture(scope="module")
def columns():
    """Values of 26 columns: of one value, of few, of many, in a small range and in any."""
    random = np.random.default_rng(0)
    special = [0, 2**32 - 1, 2**31, 2**31 - 1, 1]
    columns = [[7], special, colliding_values(), list(range(990))]
    while len(columns) < 26:
        few = random.integers(0, 1000 if len(columns) % 2 else 2**32, random.integers(1, 3000))
        columns.append(list(dict.fromkeys(few.tolist())))
    return columns


@pytest.mark.parametrize("max_ind_range", [-1, 1000, 5000, 2**31 - 1, 2**32])
def test_ids_are_those_of_dictionaries_and_unknown_values_have_none(
    columns, tmp_path, max_ind_range
):
    """Both kinds of maps; values that the file cannot have are unknown, not an error."""
    if max_ind_range > 0:
        columns = [dict.fromkeys(value % max_ind_range for value in column) for column in columns]
        columns = [list(column) for column in columns]
    lookup = IdLookup(write_vocabulary(tmp_path / "v", columns), max_ind_range)
    random = np.random.default_rng(1)
    any_values = random.integers(0, 2**32, (26, 500))
    rows = np.concatenate([any_values, random.integers(0, 6000, (26, 500))], 1)
    for table, column in enumerate(columns):
        rows[table, ::2] = random.choice(column, 500)
    rows[:, -3:] = 2**32 - 1, 2**31, 0
    ids = [{value: k for k, value in enumerate(column)} for column in columns]
    want = [[ids[table].get(value, -1) for value in rows[table].tolist()] for table in range(26)]
    found = lookup.ids(rows.astype(np.uint32).view(np.int32))
    assert found.dtype == np.int32 and found.shape == (1000, 26)
    np.testing.assert_array_equal(found, np.transpose(want))
    assert (found >= 0).any() and (found < 0).any()
    whole = lookup.ids(write_out(columns))
    for table, column in enumerate(columns):
        np.testing.assert_array_equal(whole[: len(column), table], range(len(column)))


def write_out(columns):
    """(26, n) int32 with all values of each column, and then its first one again."""
    longest = max(len(column) for column in columns)
    padded = [[*column, *column[:1] * (longest - len(column))] for column in columns]
    return np.array(padded, np.uint32).view(np.int32)


def test_threads_search_slices_of_the_same_columns(columns, tmp_path):
    lookup = IdLookup(write_vocabulary(tmp_path / "v", columns), -1)
    rows = np.zeros((40, 4000), np.int32)
    rows[14:] = np.random.default_rng(2).integers(-50, 1000, (26, 4000))
    want = lookup.ids(rows[14:])
    slices = [slice(begin, begin + 250) for begin in range(0, 4000, 250)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: lookup.ids(rows[14:, part]), slices))
    np.testing.assert_array_equal(np.concatenate(found), want)
    assert lookup.ids(rows[14:, :0]).shape == (0, 26)


@pytest.mark.parametrize("max_ind_range", [-1, 40])
def test_a_column_that_has_a_value_twice_is_named(tmp_path, max_ind_range):
    columns = [[*range(30)] for _ in range(26)]
    columns[4][29] = 17
    vocabulary = write_vocabulary(tmp_path / "v", columns)
    line = refusal(IdLookup, vocabulary, max_ind_range)
    assert (
        f"{tmp_path}/v: column C5 has the value 00000011 twice, the second time for id 29" in line
    )


def test_a_column_of_another_range_is_named(tmp_path):
    columns = [[1]] * 25 + [[1, 2**32 - 7]]
    vocabulary = write_vocabulary(tmp_path / "v", columns)
    line = refusal(IdLookup, vocabulary, 2**31)
    assert "column C26 has the value 4294967289, expected values below --max-ind-range=" in line


@pytest.mark.parametrize("max_ind_range", [-1, 300_000])
def test_the_memory_of_a_lookup_is_bounded(tmp_path, max_ind_range):
    """Where a column has fewer values than its range, 4 bytes each of the range may be more."""
    random = np.random.default_rng(3)
    columns = [[k] for k in range(24)] + [
        random.permutation(300_000)[:size] for size in (9, 200_000)
    ]
    vocabulary = write_vocabulary(tmp_path / "v", columns)
    IdLookup(vocabulary, max_ind_range)  # compiled
    tracemalloc.start()
    lookup = IdLookup(vocabulary, max_ind_range)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    most = 14 * sum(vocabulary.counts) if max_ind_range < 0 else 4 * max_ind_range
    assert peak <= most + 100_000
    assert lookup.ids(write_out([list(column[:5]) for column in columns]))[4, 25] == 4


# ---------------------------------------------------------------- what preparation made

FLAGS = ("--max-ind-range=7", "--data-sub-sample-rate=0.3")


@pytest.mark.parametrize("flags", [(), FLAGS, ("--mlperf-bin-loader", "--data-randomize=none")])
def test_rows_of_text_get_the_ids_that_preparation_gave_them(tmp_path, flags):
    """Those that it dropped may hold values that have none."""
    days = write_days(tmp_path / "raw", 3, 50, seed=5)
    of_data = spec(f"--data_path={tmp_path}/raw", f"--processed-data-file={tmp_path}/x", *flags)
    rows = rows_of(data_utils.prepare(of_data), "train")
    source = find_vocabulary(of_data, find_prepared(of_data))
    source.write_beside(tmp_path / "copy")
    vocabulary = Vocabulary(tmp_path / "copy", source.counts, source.digest)
    text = b"".join((tmp_path / "raw" / f"day_{day}").read_bytes() for day in range(2))
    columns = np.empty((40, 100), np.int32)
    draws = np.random.RandomState(123).uniform(size=100)
    drop = draws < of_data.sub_sample_rate
    counted = np.zeros(43, np.int64)
    bound = of_data.max_ind_range
    parse_lines(np.frombuffer(text, np.uint8), 0, columns, max(bound, 0), drop, counted)
    found = IdLookup(vocabulary, bound).ids(columns[14:, : counted[0]])
    np.testing.assert_array_equal(found, rows[:, 14:])
    kept = [
        row for row, low in zip(days[0] + days[1], drop, strict=True) if row[0] == "1" or not low
    ]
    _, ids = number_by_hand([kept], bound)
    for table, of_table in enumerate(ids):  # test rows, which come later, may have added others
        values = vocabulary.values(table).view(np.uint32).tolist()
        assert values[: len(of_table)] == list(of_table)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a folder with prepared data of three days, their rows as text)."""
    folder = tmp_path_factory.mktemp("made")
    days = write_days(folder / "raw", 3, 50)
    assert prepare(f"--data_path={folder}/raw", f"--processed-data-file={folder}/x").status == 0
    return folder, days


@pytest.fixture
def source(made, tmp_path):
    """The vocabulary of a copy of the data, which a test may change."""
    shutil.copytree(made[0], tmp_path / "made")
    of_data = spec(f"--data_path={tmp_path}/made/raw", f"--processed-data-file={tmp_path}/made/x")
    prepared = find_prepared(of_data)
    return find_vocabulary(of_data, prepared)


def test_a_copy_is_a_hard_link_and_is_made_once(source, tmp_path):
    copy = tmp_path / "model.vocabulary"
    source.write_beside(copy)
    assert os.path.samefile(copy, source.file) and copy.stat().st_nlink == 2
    before = copy.stat()
    source.write_beside(copy)
    assert copy.stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model.vocabulary"]


def test_another_disk_gets_a_copy_and_a_copy_that_is_there_stays(source, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copy = tmp_path / "v"
    source.write_beside(copy)
    assert copy.read_bytes() == source.file.read_bytes() and copy.stat().st_nlink == 1
    before = copy.stat()
    source.write_beside(copy)
    after = copy.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "v"]


@pytest.mark.parametrize("can_link", [True, False])
def test_another_vocabulary_is_replaced_and_a_link_stays_one(
    source, tmp_path, monkeypatch, can_link
):
    if not can_link:
        monkeypatch.setattr("criteo.vocabulary.link_whole", lambda *_: False)
    write_vocabulary(tmp_path / "target", [[3]] * 26)
    (tmp_path / "v").symlink_to("target")
    source.write_beside(tmp_path / "v")
    assert (tmp_path / "v").is_symlink()
    Vocabulary(tmp_path / "target", source.counts, source.digest).check()


@pytest.mark.parametrize("can_link", [True, False])
def test_a_damaged_vocabulary_is_told_of_and_replaces_nothing(
    source, tmp_path, monkeypatch, can_link
):
    if not can_link:
        monkeypatch.setattr("criteo.vocabulary.link_whole", lambda *_: False)
    content = bytearray(source.file.read_bytes())
    content[3] ^= 1
    source.file.write_bytes(content)
    (tmp_path / "v").write_bytes(b"earlier")
    assert "vocabulary.bin is damaged or another one" in refusal(
        source.write_beside, tmp_path / "v"
    )
    assert (tmp_path / "v").read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "v"]


# ---------------------------------------------------------------- the original's dictionaries


class Theirs:
    """Data as the original program leaves it: npz of Kaggle, or flat files, with dictionaries."""

    def __init__(self, folder):
        self.folder, self.prefix = folder, folder / "train"
        self.days = write_days(folder / "text", 3, 60)
        self.parts, self.ids = number_by_hand(self.days)
        shutil.rmtree(folder / "text")
        counts = np.array([len(table) for table in self.ids])
        rows = np.concatenate(self.parts)
        arrays = {"X_int": rows[:, 1:14], "X_cat": rows[:, 14:], "y": rows[:, 0]}
        np.savez_compressed(folder / "k_processed.npz", counts=counts, **arrays)
        for split, part in zip(("train", "test", "val"), self.parts, strict=True):
            part.tofile(folder / f"k_processed_{split}.bin")
        np.savez(folder / "train_fea_count.npz", counts=counts)
        for table, of_table in enumerate(self.ids):
            self.write(table, unique=np.array(list(of_table), np.int64))

    def path(self, table):
        return self.folder / f"train_fea_dict_{table}.npz"

    def write(self, table, **arrays):
        np.savez_compressed(self.path(table), **arrays)

    def spec(self, *flags):
        return spec(
            "--data-set=kaggle", f"--processed-data-file={self.folder}/k_processed.npz", *flags
        )

    def find(self, *flags):
        of_data = self.spec(*flags)
        return find_vocabulary(of_data, data_utils.prepare(of_data))


@pytest.fixture
def theirs(tmp_path):
    return Theirs(tmp_path)


def unsigned(values):
    return np.array(list(values), np.uint32)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {"unique": unsigned(values)},
        lambda values: {"unique": unsigned(values).view(np.int32)},
        lambda values: {"unique": unsigned(values).astype(float)},
        lambda values: {"of_any_name": unsigned(values)},
        lambda values: {"another": np.zeros(3), "unique": unsigned(values)},
    ],
)
def test_dictionaries_are_read_where_they_lie(theirs, tmp_path, change):
    """Of flat files; signed or unsigned, of any type, and under any name if it is the only one."""
    theirs.write(9, **change(theirs.ids[9]))
    before = {path.name for path in tmp_path.iterdir()}
    source = theirs.find("--mlperf-bin-loader")
    assert {path.name for path in tmp_path.iterdir()} == before and source.file is None
    for _ in range(2):
        source.write_beside(tmp_path / "v")
    vocabulary = Vocabulary(tmp_path / "v", source.counts, source.digest)
    assert_vocabulary_by_hand(vocabulary, theirs.days)


@pytest.mark.parametrize("flags", [(), ("--mlperf-bin-loader", "--data-randomize=none")])
def test_imported_data_takes_the_dictionaries_along(theirs, tmp_path, flags):
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    prepared = data_utils.prepare(theirs.spec(*flags))
    assert_vocabulary_by_hand(prepared.vocabulary, theirs.days)
    for table in range(26):
        theirs.path(table).unlink()
    assert theirs.find(*flags).file == prepared.vocabulary.path


@pytest.mark.parametrize("kind", ["imported", "imported as flat files", "flat files"])
def test_without_dictionaries_there_is_no_vocabulary_until_they_come(theirs, tmp_path, kind):
    flags = ("--mlperf-bin-loader",) if "flat" in kind else ()
    for path in tmp_path.glob("*.bin" if "imported" in kind else "none"):
        path.unlink()
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for table in range(26):
        theirs.path(table).rename(shelf / theirs.path(table).name)
    prepared = data_utils.prepare(theirs.spec(*flags))
    assert prepared.vocabulary is None and theirs.find(*flags) is None
    for path in shelf.iterdir():
        path.rename(tmp_path / path.name)
    assert theirs.find(*flags).counts == prepared.counts


def test_dictionaries_that_went_are_not_published(theirs, tmp_path, monkeypatch):
    """A run that was stopped when it had written the vocabulary goes on without them."""
    with monkeypatch.context() as patch:
        patch.setattr("preparation.row_files.RowFiles.sync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data_utils.prepare(theirs.spec())
    for table in range(26):
        theirs.path(table).unlink()
    assert data_utils.prepare(theirs.spec()).vocabulary is None
    names = {path.name for path in (tmp_path / "k_processed.prepared").iterdir()}
    assert "train.bin" in names and "vocabulary.bin" not in names


def test_dictionaries_beside_data_made_of_text_are_not_taken_for_its_vocabulary(theirs):
    """They may number other rows: data of version 2 has none."""
    of_data = theirs.spec()
    prepared = dataclasses.replace(data_utils.prepare(of_data), vocabulary=None)
    assert find_vocabulary(of_data, prepared).file is None
    of_text = dataclasses.replace(prepared, has_original_ids=False)
    assert find_vocabulary(of_data, of_text) is None


FAULTS = {
    "missing": (None, "train_fea_dict_9.npz: no such file, but others of its kind"),
    "few": (lambda values: values[:-1], "unique.npy has shape (9,), expected (10,)"),
    "2-D": (lambda values: values[None], "unique.npy has shape (1, 10), expected (10,)"),
    "text": (lambda values: values.astype(str), "expected whole numbers"),
    "twice": (lambda values: values[[*range(9), 3]], "ids 3 and 9 have the same value"),
    "both signs": (lambda values: np.r_[-1, 2**32 - 1, values[2:]], "ids 0 and 1 have the same"),
    "half": (lambda values: values + 0.5, "of id 0 is not a whole number of 32 bits"),
    "nan": (lambda values: values * np.nan, "nan of id 0 is not a whole number of 32 bits"),
    "large": (lambda values: np.r_[values[:-1], 2**32], "4294967296 of id 9 is not a whole"),
    "low": (lambda values: np.r_[values[:-1], -(2**31) - 1], "of id 9 is not a whole number"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("flags", [(), ("--mlperf-bin-loader",)])
def test_a_dictionary_that_does_not_fit_is_one_line(theirs, tmp_path, fault, flags):
    """Imported or read where it lies; nothing is published, and mended, all goes well."""
    change, words = FAULTS[fault]
    values = np.array(list(theirs.ids[9]))
    if change is None:
        theirs.path(9).unlink()
    else:
        theirs.write(9, unique=change(values))
    line = refusal(theirs.find, *flags)
    assert words in line and str(theirs.path(9)) in line and "delete all 26" in line
    assert not (tmp_path / "k_processed.prepared").exists()
    theirs.write(9, unique=values)
    assert theirs.find(*flags).digest


def test_a_damaged_dictionary_is_one_line(theirs):
    theirs.path(9).write_bytes(theirs.path(9).read_bytes()[:-40])
    assert "train_fea_dict_9.npz is not an npz that the original writes" in refusal(theirs.find)


def test_another_run_may_write_the_same_file_meanwhile(tmp_path):
    """It takes the unfinished file's name, so that this run has none to rename."""
    own = write_vocabulary(tmp_path / "own", [[1, 2]] * 26)
    content, path = own.path.read_bytes(), tmp_path / "model.vocabulary"

    def blocks():
        path.with_name("model.vocabulary.partial").unlink()
        path.write_bytes(content)
        yield content

    VocabularySource(own.counts, own.digest, blocks).write_beside(path)
    assert path.read_bytes() == content
