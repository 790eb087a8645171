"""The shuffle on disk: no row is lost, each order is as likely, evaluation rows keep theirs.

Rows are told apart by a number, the first of their integers: their position among the rows of all
pieces.
"""

import functools

import numpy as np
import pytest
from scipy.stats import chi2

from criteo.row_layout import Layout
from preparation.crew import Crew
from preparation.piece_store import PieceRows
from preparation.row_files import RowFiles
from preparation.shuffle import Shuffle
from preparation.sizes import Sizes
from preparation.work_folder import WorkFolder

WIDE = Layout((1, 4, *[1] * 38))  # of prepared rows
NARROW = Layout((1, 4, *[1] * 36, 2, 1))  # of pieces
CELLS = 64  # a side


def buckets_of(rows):
    """Sizes of buckets of so many rows."""
    size = rows * WIDE.row_bytes
    return Sizes(smallest_bucket=size, largest_bucket=size, rows_per_write=77)


SMALL = buckets_of(100)  # some thousand rows have dozens


def columns_of(numbers):
    """(40, n) columns of rows: number, label and a category that go with it, others 0."""
    columns = np.zeros((40, len(numbers)), np.int32)
    columns[0], columns[1] = numbers % 2, numbers
    columns[14], columns[38] = numbers % 251, numbers % 997 % 256
    return columns


def read_piece(runs, piece):
    begin = sum(rows for before in runs[:piece] for _, rows in before)
    numbers = np.arange(begin, begin + sum(rows for _, rows in runs[piece]))
    return PieceRows(NARROW.pack(columns_of(numbers)), NARROW, None)


def shuffled(folder, runs, num_parts, order, seed=1, sizes=SMALL, crew=None, backwards=False):
    """Numbers of the rows in train, test and val, in their order there."""
    rows = [0] * num_parts
    for part, number in (run for piece in runs for run in piece):
        rows[part] += number
    for name in ("", "scattered", "gathered"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    files = RowFiles(folder / "final", WIDE, order, seed, tuple(rows), sizes)
    files.make_files()
    work = WorkFolder(folder)
    shuffle = Shuffle(work, files, runs, functools.partial(read_piece, runs), "key")
    for tasks in (lambda: shuffle.scatter_tasks, shuffle.gather_tasks):
        work.run(tasks()[:: -1 if backwards else 1], crew or Crew(), lambda _: None)
    return read_files(files)


def read_files(files):
    """Numbers of the rows in each file, whose other columns must be those of the number."""
    found = {}
    for split in ("train", "test", "val"):
        rows = np.fromfile(files.folder / f"{split}.bin", np.uint8).reshape(-1, WIDE.row_bytes)
        assert len(rows) == files.rows[split]
        columns = WIDE.unpack(rows).T
        np.testing.assert_array_equal(columns, columns_of(columns[1]))
        found[split] = columns[1]
    return found


def parts_of(runs, num_parts):
    """Numbers of each part's rows in file order."""
    parts = [[] for _ in range(num_parts)]
    number = 0
    for part, rows in (run for piece in runs for run in piece):
        parts[part] += range(number, number + rows)
        number += rows
    return parts


def pieces_of(rows, part, seed):
    """Runs of pieces of random sizes that have `rows` rows of a part together."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, 12))
    return [[(part, int(number))] for number in np.diff([0, *cuts, rows])]


DAYS = [*pieces_of(1500, 0, 1), *pieces_of(1100, 1, 2), *pieces_of(301, 2, 3)]
KAGGLE = [  # parts that begin and end within pieces, of 400, 3, 0, 797, 0, 250 and 205 rows
    [(0, 350)], [(0, 50), (1, 1)], [(1, 1)], [], [(1, 1), (3, 0), (3, 700)], [(3, 97), (5, 250)],
    [(6, 100)], [(6, 3)], [(6, 0)], [(6, 102)],
]  # fmt: skip
EMPTY_FIRST = [[(1, 200)], [(1, 150), (3, 90)], [(3, 11)]]
CASES = {"days": (DAYS, 3), "kaggle": (KAGGLE, 7), "empty parts": (EMPTY_FIRST, 4)}

cases = pytest.mark.parametrize("runs, num_parts", CASES.values(), ids=CASES)


# ---------------------------------------------------------------- all rows, in the right file


@cases
@pytest.mark.parametrize("order", ["total", "day", "file"])
def test_every_row_is_there_once(tmp_path, runs, num_parts, order):
    """`file` keeps the order, `day` keeps rows in their part, `total` mixes all."""
    found = shuffled(tmp_path, runs, num_parts, order)
    *training, last = parts_of(runs, num_parts)
    together = sum(training, [])
    assert sorted(found["train"]) == sorted(together)
    if order == "file":
        assert found["train"].tolist() == together
    else:
        assert found["train"].tolist() != together
    if order == "day":
        begin = 0
        for part in training:
            inside = found["train"][begin : begin + len(part)].tolist()
            assert sorted(inside) == part and (len(part) < 100 or inside != part)
            begin += len(part)
    if order == "total" and len([part for part in training if part]) > 1:
        assert sorted(found["train"][: len(training[0])]) != training[0]
    assert found["test"].tolist() == last[: (len(last) + 1) // 2]
    assert found["val"].tolist() == last[(len(last) + 1) // 2 :]


@pytest.mark.parametrize("order", ["total", "file"])
@pytest.mark.parametrize("rows", [0, 1, 2, 11])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_evaluation_rows_are_cut_in_halves_in_file_order(tmp_path, rows, size, order):
    """The first half, rounded up, is test, wherever pieces end; a piece can lie in both."""
    sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
    runs = [[(0, 7)], [(0, 2), *((1, n) for n in sizes[:1])], *([(1, n)] for n in sizes[1:])]
    found = shuffled(tmp_path, runs, 2, order)
    numbers = np.arange(9, 9 + rows)
    np.testing.assert_array_equal(found["test"], numbers[: -(-rows // 2)])
    np.testing.assert_array_equal(found["val"], numbers[-(-rows // 2) :])
    assert sorted(found["train"]) == list(range(9))


def test_categories_become_ids_on_the_way(tmp_path):
    """Rows of a piece's own layout and indices become rows of the files' layout and ids."""
    runs = [[(0, 300)], [(0, 100), (1, 41)]]
    (tmp_path / "scattered").mkdir()
    (tmp_path / "gathered").mkdir()
    to = Layout((1, 4, *[1] * 12, 4, *[1] * 25))
    ids = [np.arange(251, dtype=np.int32) * k + 100_000 for k in (3, 5)]
    one, all_bytes = np.zeros(1, np.int32), np.arange(256, dtype=np.int32)

    def read(piece):
        rows = read_piece(runs, piece).rows
        return PieceRows(rows, NARROW, [ids[piece], *[one] * 23, all_bytes, one])

    work = WorkFolder(tmp_path)
    files = RowFiles(tmp_path / "final", to, "total", 1, (400, 41), SMALL)
    files.make_files()
    shuffle = Shuffle(work, files, runs, read, "key")
    for tasks in (lambda: shuffle.scatter_tasks, shuffle.gather_tasks):
        work.run(tasks(), Crew(), lambda _: None)
    rows = [np.fromfile(files.folder / f"{split}.bin", np.uint8) for split in files.rows]
    columns = to.unpack(np.concatenate(rows).reshape(-1, to.row_bytes)).T
    want = columns_of(columns[1])
    want[14] = np.where(columns[1] < 300, ids[0][want[14]], ids[1][want[14]])
    np.testing.assert_array_equal(columns, want)
    assert sorted(columns[1, :400]) == list(range(400)) and sorted(columns[1]) == list(range(441))


# ---------------------------------------------------------------- what an order depends on


def assert_same(found, want):
    for split, numbers in want.items():
        np.testing.assert_array_equal(found[split], numbers)


@pytest.mark.parametrize("order", ["total", "day"])
def test_an_order_depends_on_the_seed_and_not_on_who_makes_it(tmp_path, order):
    """Threads, the order of the tasks, a further process: the same; another seed: another."""
    make = functools.partial(shuffled, runs=DAYS, num_parts=3, order=order)
    want = make(tmp_path / "one", seed=5)
    assert_same(make(tmp_path / "four", seed=5, crew=Crew(threads=4)), want)
    assert_same(make(tmp_path / "last", seed=5, crew=Crew(2, 1, 2)), want)
    assert_same(make(tmp_path / "back", seed=5, backwards=True), want)
    other = make(tmp_path / "six", seed=6)
    assert (other["train"] == want["train"]).sum() < len(other["train"]) / 20
    assert_same(other | {"train": want["train"]}, want)


def test_parts_and_buckets_are_shuffled_each_by_draws_of_its_own(tmp_path):
    """Two days of as many rows in like pieces do not get the same order; neither do buckets."""
    runs = [[(part, 250)] for part in (0, 0, 0, 0, 1, 1, 1, 1)] + [[(2, 3)]]
    for sizes in (SMALL, buckets_of(10**6)):
        folder = tmp_path / str(sizes.smallest_bucket)
        numbers = shuffled(folder, runs, 3, "day", sizes=sizes)["train"]
        assert (numbers[:1000] == numbers[1000:] - 1000).sum() < 20


@pytest.mark.parametrize(
    "size, buckets",
    [(0, 1), (64, 1), (16 << 20, 1), ((16 << 20) + 64, 2), (4 << 30, 256), (32 << 30, 256),
     (64 << 30, 256), ((64 << 30) + 64, 257), (400 << 30, 1600)],
)  # fmt: skip
def test_the_number_of_buckets_follows_the_size(tmp_path, size, buckets):
    """Buckets of 16 MB, from 4 GB on 256 of them, and none of more than 256 MB."""
    layout = Layout((2,) * 12 + (4,) * 4 + (1,) * 24)
    files = RowFiles(tmp_path, layout, "day", 1, (5, size // layout.row_bytes, 9))
    assert layout.row_bytes == 64 and files.num_buckets(1) == buckets
    assert files.bucket_bytes <= 256 << 20


# ---------------------------------------------------------------- each order is as likely


def likely(statistic):
    """True if a chi-square over 64 x 64 cells is in the range of 99.9 % of right shuffles."""
    low, high = chi2.ppf([0.0005, 0.9995], (CELLS - 1) ** 2)
    return low < statistic < high


def positions_statistic(order):
    """Chi-square of the 64th that a row comes from against the one that it is in."""
    size = len(order) // CELLS
    table = np.zeros((CELLS, CELLS))
    np.add.at(table, (order // size, np.arange(len(order)) // size), 1)
    return ((table - size / CELLS) ** 2).sum() / (size / CELLS)


def neighbours_statistic(order):
    """Chi-square of the 64th that a row comes from against that of the next row."""
    size = len(order) // CELLS
    source = order // size
    table = np.zeros((CELLS, CELLS))
    np.add.at(table, (source[:-1], source[1:]), 1)
    expected = (size * size - size * np.eye(CELLS)) / len(order)  # a row is not its own neighbour
    return ((table - expected) ** 2 / expected).sum()


STATISTICS = {"positions": positions_statistic, "neighbours": neighbours_statistic}
LARGE = CELLS * CELLS * 8  # rows: 8 are expected in each cell


def large_order(folder, order, seed, bucket_rows):
    """Orders (n,) of each group of rows, from 0: one of total, two of day."""
    parts = (LARGE // 2, LARGE // 2) if order == "total" else (LARGE, LARGE)
    runs = [run for part, rows in enumerate(parts) for run in pieces_of(rows, part, part)]
    sizes = buckets_of(bucket_rows)
    found = shuffled(folder, [*runs, [(2, 2)]], 3, order, seed, sizes)["train"]
    return [found] if order == "total" else [found[:LARGE], found[LARGE:] - LARGE]


@pytest.mark.parametrize(
    "order, seed, bucket_rows", [("total", 1, 900), ("total", 123, 3000), ("day", 3, 900)]
)
def test_a_row_is_as_likely_everywhere_and_beside_every_other(tmp_path, order, seed, bucket_rows):
    """Buckets that do not end where the cells do; pieces of all sizes."""
    for found in large_order(tmp_path, order, seed, bucket_rows):
        statistics = {name: statistic(found) for name, statistic in STATISTICS.items()}
        assert all(map(likely, statistics.values())), statistics


class BrokenGenerator:
    """A generator one of whose draws is not random."""

    make = staticmethod(np.random.default_rng)
    broken = ""

    def __init__(self, seed):
        self._random = self.make(1 if self.broken == "alike" else seed)

    def integers(self, low, high, size):
        if self.broken == "in turn":
            return np.arange(size) % high
        return self._random.integers(low, high, size)

    def permutation(self, size):
        if self.broken == "no second pass":
            return np.arange(size)
        return self._random.permutation(size)


@pytest.mark.parametrize(
    "broken, found_by",
    [
        ("no second pass", {"positions", "neighbours"}),
        ("in turn", {"positions"}),
        ("alike", {"neighbours"}),
        ("", set()),
    ],
)
def test_a_broken_shuffle_is_found(tmp_path, monkeypatch, broken, found_by):
    """Without the second pass's order, with buckets in turn, with the same draws everywhere."""
    monkeypatch.setattr(BrokenGenerator, "broken", broken)
    monkeypatch.setattr(np.random, "default_rng", BrokenGenerator)
    (order,) = large_order(tmp_path, "total", 1, 3000)
    unlikely = {name for name, statistic in STATISTICS.items() if not likely(statistic(order))}
    assert unlikely == found_by
