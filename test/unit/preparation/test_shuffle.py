"""The external shuffle: no row is lost, each order is as likely, evaluation rows keep theirs.

Rows are told apart by a number, the first of their integers: their place in the order of all
pieces.
"""

import functools

import numpy as np
import pytest
from scipy.stats import chi2

from criteo.row_layout import Layout
from preparation import row_files, shuffle
from preparation.row_files import RowFiles
from preparation.shuffle import PieceRows, Shuffle
from preparation.work_folder import Crew, WorkFolder

WIDE = Layout((1, 4, *[1] * 38))  # of prepared rows
NARROW = Layout((1, 4, *[1] * 36, 2, 1))  # of pieces
CELLS = 64  # a side


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Of about 100 rows, so that some thousand rows have dozens."""
    set_bucket_rows(monkeypatch, 100)


def set_bucket_rows(monkeypatch, rows):
    for name in ("SMALLEST_BUCKET", "LARGEST_BUCKET"):
        monkeypatch.setattr(row_files, name, rows * WIDE.row_bytes)


def columns_of(numbers):
    """(40, n) columns of rows: number, label and a category that go with it, others 0."""
    columns = np.zeros((40, len(numbers)), np.int32)
    columns[0], columns[1] = numbers % 2, numbers
    columns[14], columns[38] = numbers % 251, numbers % 997 % 256
    return columns


def read_piece(runs, number):
    begin = sum(rows for before in runs[:number] for _, rows in before)
    numbers = np.arange(begin, begin + sum(rows for _, rows in runs[number]))
    return PieceRows(NARROW.pack(columns_of(numbers)), NARROW, None)


def rows_per_part(runs, num_parts):
    rows = [0] * num_parts
    for part, number in (run for piece in runs for run in piece):
        rows[part] += number
    return tuple(rows)


def shuffled(folder, runs, num_parts, order, seed=1, crew=Crew(), backwards=False):  # noqa: B008
    """Numbers of the rows as they lie in train, test, val."""
    for name in ("", "scattered", "gathered"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    target = RowFiles(folder / "final", WIDE, order, seed, rows_per_part(runs, num_parts))
    target.make_files()
    work = WorkFolder(folder)
    shuffle = Shuffle(work, target, runs, functools.partial(read_piece, runs), "key")
    for tasks in (lambda: shuffle.scatter_tasks, shuffle.gather_tasks):
        work.run(tasks()[:: -1 if backwards else 1], crew, lambda _: None)
    return read_files(target)


def read_files(target):
    """Numbers of the rows in each file, whose other columns must be those of the number."""
    found = {}
    for split in ("train", "test", "val"):
        rows = np.fromfile(target.folder / f"{split}.bin", np.uint8).reshape(-1, WIDE.row_bytes)
        assert len(rows) == target.rows[split]
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


# ---------------------------------------------------------------- all rows, where they belong


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
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 10, 11])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
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
    """Rows of a piece's own layout and places become rows of the target's layout and ids."""
    runs = [[(0, 300)], [(0, 100), (1, 41)]]
    tables = [np.zeros(1, np.int32)] * 26
    (tmp_path / "scattered").mkdir()
    (tmp_path / "gathered").mkdir()
    to = Layout((1, 4, *[1] * 12, 4, *[1] * 25))
    ids = [np.arange(251, dtype=np.int32) * k + 100_000 for k in (3, 5)]

    def read(number):
        encoded = read_piece(runs, number)
        last = tables[:24] + [np.arange(256, dtype=np.int32), tables[25]]
        return PieceRows(encoded.rows, NARROW, [ids[number], *last[1:]])

    work = WorkFolder(tmp_path)
    target = RowFiles(tmp_path / "final", to, "total", 1, (400, 41))
    target.make_files()
    shuffle = Shuffle(work, target, runs, read, "key")
    work.run(shuffle.scatter_tasks, Crew(), lambda _: None)
    work.run(shuffle.gather_tasks(), Crew(), lambda _: None)
    rows = [np.fromfile(target.folder / f"{split}.bin", np.uint8) for split in target.rows]
    columns = to.unpack(np.concatenate(rows).reshape(-1, to.row_bytes)).T
    want = columns_of(columns[1])
    want[14] = np.where(columns[1] < 300, ids[0][want[14]], ids[1][want[14]])
    np.testing.assert_array_equal(columns, want)
    assert sorted(columns[1, :400]) == list(range(400)) and sorted(columns[1]) == list(range(441))


def test_few_rows_at_a_time_are_the_same_rows(tmp_path, monkeypatch):
    """A bucket is written in steps."""
    want = shuffled(tmp_path / "a", DAYS, 3, "total")
    monkeypatch.setattr(shuffle, "ROWS_AT_A_TIME", 7)
    assert_same(shuffled(tmp_path / "b", DAYS, 3, "total"), want)


# ---------------------------------------------------------------- what an order depends on


def assert_same(found, want):
    for split, numbers in want.items():
        np.testing.assert_array_equal(found[split], numbers)


@pytest.mark.parametrize("order", ["total", "day"])
def test_an_order_depends_on_the_seed_and_not_on_who_makes_it(tmp_path, order):
    """Threads, the order of the tasks, a further process: the same; another seed: another."""
    want = shuffled(tmp_path / "one", DAYS, 3, order, seed=5)
    assert_same(shuffled(tmp_path / "four", DAYS, 3, order, 5, Crew(threads=4)), want)
    assert_same(shuffled(tmp_path / "last", DAYS, 3, order, 5, Crew(2, 1, 2)), want)
    assert_same(shuffled(tmp_path / "back", DAYS, 3, order, 5, backwards=True), want)
    other = shuffled(tmp_path / "six", DAYS, 3, order, seed=6)
    together = len(other["train"])
    assert (other["train"] == want["train"]).sum() < together / 20
    assert_same({name: other[name] for name in ("test", "val")}, {
        name: want[name] for name in ("test", "val")
    })  # fmt: skip


def test_parts_and_buckets_are_shuffled_each_by_draws_of_its_own(tmp_path, monkeypatch):
    """Two days of as many rows in like pieces do not get the same order; neither do buckets."""
    runs = [[(part, 250)] for part in (0, 0, 0, 0, 1, 1, 1, 1)] + [[(2, 3)]]
    numbers = shuffled(tmp_path / "a", runs, 3, "day")["train"]
    assert (numbers[:1000] == numbers[1000:] - 1000).sum() < 20
    set_bucket_rows(monkeypatch, 10**6)
    one = shuffled(tmp_path / "b", runs, 3, "day")["train"]
    assert (one[:1000] == one[1000:] - 1000).sum() < 20


@pytest.mark.parametrize(
    "size, buckets",
    [(0, 1), (64, 1), (32 << 20, 1), ((32 << 20) + 64, 2), (8 << 30, 256), (32 << 30, 256),
     (64 << 30, 256), ((64 << 30) + 64, 257), (400 << 30, 1600)],
)  # fmt: skip
def test_the_number_of_buckets_follows_the_size(tmp_path, monkeypatch, size, buckets):
    """Buckets of 32 MB, from 8 GB on 256 of them, and none of more than 256 MB."""
    monkeypatch.setattr(row_files, "SMALLEST_BUCKET", 32 << 20)
    monkeypatch.setattr(row_files, "LARGEST_BUCKET", 256 << 20)
    layout = Layout((2,) * 12 + (4,) * 4 + (1,) * 24)
    target = RowFiles(tmp_path, layout, "day", 1, (5, size // layout.row_bytes, 9))
    assert layout.row_bytes == 64 and target.num_buckets(1) == buckets
    assert target.bucket_bytes <= 256 << 20


# ---------------------------------------------------------------- each order is as likely


def likely(statistic):
    """Does a sum of squares over 64 x 64 cells lie where 99.9 % of right shuffles' do?"""
    low, high = chi2.ppf([0.0005, 0.9995], (CELLS - 1) ** 2)
    return low < statistic < high


def places_statistic(order):
    """Chi-square of where rows come from against where they are, in 64ths."""
    size = len(order) // CELLS
    table = np.zeros((CELLS, CELLS))
    np.add.at(table, (order // size, np.arange(len(order)) // size), 1)
    return ((table - size / CELLS) ** 2).sum() / (size / CELLS)


def neighbours_statistic(order):
    """Chi-square of where a row comes from against where the next one does."""
    size = len(order) // CELLS
    source = order // size
    table = np.zeros((CELLS, CELLS))
    np.add.at(table, (source[:-1], source[1:]), 1)
    expected = (size * size - size * np.eye(CELLS)) / len(order)  # a row is not its own neighbour
    return ((table - expected) ** 2 / expected).sum()


STATISTICS = {"places": places_statistic, "neighbours": neighbours_statistic}
LARGE = CELLS * CELLS * 8  # rows: 8 are expected in each cell


def large_order(folder, order, seed):
    """Orders (n,) of each group of rows, from 0: one of total, two of day."""
    parts = (LARGE // 2, LARGE // 2) if order == "total" else (LARGE, LARGE)
    runs = [run for part, rows in enumerate(parts) for run in pieces_of(rows, part, part)]
    found = shuffled(folder, [*runs, [(2, 2)]], 3, order, seed)["train"]
    return [found] if order == "total" else [found[:LARGE], found[LARGE:] - LARGE]


def test_the_statistics_of_numpys_own_shuffle_are_likely():
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(LARGE)
        assert likely(places_statistic(order)) and likely(neighbours_statistic(order))


@pytest.mark.parametrize("bucket_rows", [900, 3000])
@pytest.mark.parametrize("order, seed", [("total", 1), ("total", 2), ("total", 123), ("day", 3)])
def test_a_row_is_as_likely_everywhere_and_beside_every_other(
    tmp_path, monkeypatch, order, seed, bucket_rows
):
    """Buckets that do and do not end where the cells do; pieces of all sizes."""
    set_bucket_rows(monkeypatch, bucket_rows)
    for found in large_order(tmp_path, order, seed):
        statistics = {name: statistic(found) for name, statistic in STATISTICS.items()}
        assert all(map(likely, statistics.values())), statistics


def test_many_small_shuffles_together_are_likely(tmp_path, monkeypatch):
    """4096 rows, a row a cell, over 12 seeds: sums of tables, which one large run may hide."""
    set_bucket_rows(monkeypatch, 300)
    table = np.zeros((CELLS, CELLS))
    pairs, expected = np.zeros((CELLS, CELLS)), 0
    for seed in range(12):
        runs = [*pieces_of(4096, 0, seed % 3), [(1, 2)]]
        source = shuffled(tmp_path / str(seed), runs, 2, "total", seed)["train"] // CELLS
        np.add.at(table, (source, np.arange(4096) // CELLS), 1)
        np.add.at(pairs, (source[:-1], source[1:]), 1)
        expected += (CELLS * CELLS - CELLS * np.eye(CELLS)) / 4096
    assert likely(((table - 12) ** 2).sum() / 12)
    assert likely(((pairs - expected) ** 2 / expected).sum())


class BrokenGenerator:
    """A generator of which one draw is none."""

    make = staticmethod(np.random.default_rng)
    broken = ""

    def __init__(self, seed):
        self._random = self.make(1 if self.broken == "alike" else seed)

    def integers(self, low, high, size):
        if self.broken == "in turn":
            return np.arange(size) % high
        return self._random.integers(low, high, size)

    def permutation(self, size):
        return (
            np.arange(size) if self.broken == "no second pass" else self._random.permutation(size)
        )


@pytest.mark.parametrize(
    "broken, found_by",
    [
        ("no second pass", {"places", "neighbours"}),
        ("in turn", {"places"}),
        ("alike", {"neighbours"}),
        ("", set()),
    ],
)
def test_a_broken_shuffle_is_found(tmp_path, monkeypatch, broken, found_by):
    """Without the second pass's order, with buckets in turn, with the same draws everywhere."""
    monkeypatch.setattr(BrokenGenerator, "broken", broken)
    monkeypatch.setattr(np.random, "default_rng", BrokenGenerator)
    set_bucket_rows(monkeypatch, 3000)
    (order,) = large_order(tmp_path, "total", 1)
    unlikely = {name for name, statistic in STATISTICS.items() if not likely(statistic(order))}
    assert unlikely == found_by
