"""Data sets: which rows are drawn or read, which rank gets them, and what a block decodes to."""

import json
import pickle

import numpy as np
import pytest
import torch
from by_hand import spec as data_spec
from conftest import GOLDEN, SMALL_MODEL, train
from naive_random_data import NaiveRandomData

import dlrm_data_pytorch
import dlrm_s_pytorch as dlrm
from common import random_bags
from common.bag_kernels import start_stream
from common.draw_state import DrawState
from common.errors import RankError, UserError
from common.random_bags import ROOM
from common.stack_distances import StackDistances
from criteo.prepared import Prepared
from criteo.row_layout import FLAT, Layout
from data_utils import prepare
from dlrm_data_pytorch import (
    CriteoDataset,
    RandomDataset,
    RandomSpec,
    draw_training_order,
    load_batches,
    make_criteo_data,
    make_random_data,
    open_criteo_split,
)
from model.batch import CriteoBatch
from ranks.process import Process

MIXED = Layout((1, 2, 4) * 13 + (2,))


def rank_of(rank, world_size):
    return Process(rank, world_size, rank, torch.device("cpu"), "gloo")


ALONE = rank_of(0, 1)


# ---------------------------------------------------------------- random and synthetic data


def random_spec(**changes):
    settings = dict(
        num_rows=(20, 3, 100), num_dense=4, batch_size=7, data_size=30, num_batches=0,
        num_indices=5, num_indices_fixed=False, distribution="uniform", minimum=0, maximum=1,
        mu=-1, sigma=1, round_targets=False, seed=5,
    )  # fmt: skip
    return RandomSpec(**(settings | changes))


def bags_of(features):
    """[row][table] -> ids."""
    lengths = features.bags.lengths
    parts = iter(torch.split(features.bags.ids, lengths.reshape(-1).tolist()))
    return [[next(parts).tolist() for _ in row] for row in lengths]


def test_random_batches_follow_the_contract_draw_by_draw():
    data = RandomDataset(random_spec(), ALONE)
    random = np.random.RandomState(5)
    assert len(data) == 5
    for number, size in enumerate([7, 7, 7, 7, 2]):
        features = data[number].decode()
        dense = random.rand(size, 4).astype(np.float32)
        bags = [[] for _ in range(size)]
        for rows in (20, 3, 100):
            for row in range(size):
                count = int(np.round(max(1.0, random.random_sample(1)[0] * min(rows, 5))))
                ids = np.unique(np.round(random.random_sample(count) * (rows - 1)))
                bags[row].append(ids.astype(int).tolist())
        targets = random.rand(size, 1).astype(np.float32)
        np.testing.assert_array_equal(features.dense.numpy(), dense)
        np.testing.assert_array_equal(features.label.numpy(), targets)
        assert bags_of(features) == bags


def test_random_batches_are_the_same_in_any_order_and_every_epoch():
    """And an evaluation between steps does not disturb the training draws."""
    wanted = [RandomDataset(random_spec(), ALONE)[number].block for number in range(5)]
    data = make_random_data(random_spec(), ALONE)
    for number in (3, 0, 4, 4, 1):
        assert torch.equal(data.train[number].block, wanted[number])
        assert torch.equal(data.test[0].block, wanted[0])


@pytest.mark.parametrize("world_size", [2, 8])
def test_shares_of_ranks_add_up_to_the_batch(world_size):
    whole = RandomDataset(random_spec(), ALONE)
    shares = [RandomDataset(random_spec(), rank_of(rank, world_size)) for rank in range(world_size)]
    for number in range(5):
        features, parts = whole[number].decode(), [share[number].decode() for share in shares]
        assert torch.equal(torch.cat([part.dense for part in parts]), features.dense)
        assert torch.equal(torch.cat([part.label for part in parts]), features.label)
        assert torch.equal(torch.cat([part.bags.ids for part in parts]), features.bags.ids)
        for rank, part in enumerate(parts):
            ids = part.bags.lengths.sum(0).numpy()
            np.testing.assert_array_equal(part.bags.ids_per_rank[rank], ids)
    assert sum(share.num_rows_read for share in shares) == whole.num_rows_read == 30


def test_the_flags_of_random_data_are_its_record():
    flags = "--arch-embedding-size=5-6 --arch-mlp-bot=7-2 --mini-batch-size=3 --data-size=11"
    flags += " --num-batches=2 --num-indices-per-lookup=4 --num-indices-per-lookup-fixed=true"
    flags += " --rand-data-dist=gaussian --rand-data-min=1 --rand-data-max=2 --rand-data-mu=1.5"
    flags += " --rand-data-sigma=0.5 --round-targets=true --numpy-rand-seed=9"
    flags += " --data-trace-file=t --data-trace-enable-padding=true"
    want = RandomSpec((5, 6), 7, 3, 11, 2, 4, True, "gaussian", 1, 2, 1.5, 0.5, True, 9, "", True)
    assert RandomSpec.from_options(dlrm.parse_options(flags.split())) == want
    options = dlrm.parse_options([*flags.split(), "--data-generation=synthetic"])
    assert RandomSpec.from_options(options).trace == "t"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--rand-data-min=5 --rand-data-max=2", "--rand-data-min=5.0 and --rand-data-max=2.0: exp"),
        ("--rand-data-min=nan", "--rand-data-min=nan and --rand-data-max=1"),
        ("--rand-data-max=inf", "--rand-data-min=0 and --rand-data-max=inf"),
        ("--rand-data-mu=nan", "--rand-data-mu=nan: expected a number"),
        ("--rand-data-mu=-inf", "--rand-data-mu=-inf: expected a number"),
        (
            "--num-indices-per-lookup=2147483648 --num-indices-per-lookup-fixed=true",
            "--num-indices-per-lookup=2147483648: expected at most 2147483647 indices in a bag",
        ),
    ],
)
def test_random_data_that_cannot_be_drawn_is_refused(flags, words):
    result = train("--rand-data-dist=gaussian", *flags.split())
    assert result.status == 2 and result.err.count("\n") == 1 and words in result.err


def test_gaussian_ids_outside_a_table_are_an_error():
    data = RandomDataset(random_spec(distribution="gaussian", maximum=90, mu=60), ALONE)
    with pytest.raises(UserError, match="for table 0 of 20 rows: let --rand-data-min and --rand-"):
        data[0]


def write_trace(path, text="3,1,2\n0,1,2\n0.5,0.75,1.0\n"):
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def test_each_table_has_a_trace_and_ids_beyond_it_are_taken_modulo_with_a_warning(tmp_path):
    write_trace(tmp_path / "trace_0"), write_trace(tmp_path / "trace_1", "4,5\n0,1\n0.5,1.0\n")
    data = RandomDataset(
        random_spec(num_rows=(4, 5), trace=f"{tmp_path}/trace_j", num_indices=9), ALONE
    )
    with pytest.warns(UserWarning, match="the trace of table 1 has ids beyond its 5 rows: taken"):
        bags = [row for number in range(5) for row in bags_of(data[number].decode())]
    assert {id for first, _ in bags for id in first} == {1, 2, 3}
    assert {id for _, second in bags for id in second} == {4, 0}


@pytest.mark.parametrize(
    "text",
    [None, "", "1,2\n0,1\n", "1,x\n0,1\n0.5,1\n", "1,2\n0,5\n0.5,1.0\n", "1,2\n0,1\n1.0\n",
     "1,99999999999999999999999\n0,1\n0.5,1\n", "1," + "9" * 400 + "\n0,1\n0.5,1\n",
     "1," + "9" * 5000 + "\n0,1\n0.5,1\n", "1,2\n0," + "9" * 23 + "\n0.5,1\n",
     "1,2\n0,1\n0.5,nan\n", "1,2\n0,1\n0.5,1e400\n", "1,2\n0,1\n0.5,0.4\n", "1,2\n0,1\n-1,1\n",
     "1,2\n-1,1\n0.5,1\n", "1,2\n1,0\n0.5,1\n", "\udcff"],
    ids=range(17),
)  # fmt: skip
def test_a_bad_trace_file_is_named(tmp_path, text):
    if text is not None:
        write_trace(tmp_path / "t", text)
    with pytest.raises(UserError, match=f"--data-trace-file: {tmp_path}/t: .*expected "):
        StackDistances(tmp_path / "t", padding=False)


def drawn_in_order(spec, *ranks):
    """For each batch, what the naive loop draws, and what ranks give, joined again."""
    shares, naive = [RandomDataset(spec, rank) for rank in ranks], NaiveRandomData(spec)
    for number in range(len(shares[0])):
        parts = [share[number].decode() for share in shares]
        dense, label = (
            torch.cat([getattr(p, n) for p in parts]).numpy() for n in ("dense", "label")
        )
        yield (
            naive.batch(len(dense)),
            (dense, label, [row for part in parts for row in bags_of(part)]),
        )


SOURCES = {
    "uniform": {},
    "gaussian": dict(distribution="gaussian", maximum=2.5, sigma=2, mu=1),
    "the middle": dict(distribution="gaussian", minimum=-0.5, maximum=2.9),
    "trace": dict(trace="golden"),
    "padded trace": dict(trace="golden", trace_padding=True),
}


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("num_indices, fixed", [(1, True), (1, False), (4, True), (300, False)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:the trace of table")
def test_batches_are_those_of_a_naive_loop(source, num_indices, fixed, seed, monkeypatch):
    """With a short last batch, tables of few rows and of many, on one rank and on three.

    The three draw and sort a bag of 300 ids or two bags of 4 at a time.
    """
    changes = SOURCES[source]
    if "trace" in changes:
        changes = changes | {"trace": str(GOLDEN / "data" / "dist_emb_j.log")}
    settings = dict(num_indices=num_indices, num_indices_fixed=fixed, seed=seed)
    spec = random_spec(
        num_rows=(3, 1000, 4) if changes else (1, 2, 10**9), round_targets=fixed,
        **settings, **changes,
    )  # fmt: skip
    for ranks, room in (([ALONE], ROOM), ([rank_of(rank, 3) for rank in range(3)], 10)):
        monkeypatch.setattr(random_bags, "ROOM", room)
        for want, found in drawn_in_order(spec, *ranks):
            np.testing.assert_array_equal(found[0], want[0])
            np.testing.assert_array_equal(found[1], want[1])
            assert found[2] == want[2]


@pytest.mark.parametrize("rows_per_state", [1, 20])
@pytest.mark.parametrize("rank", [ALONE, rank_of(1, 3)], ids=["alone", "1 of 3"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("counted", [{}, {"num_batches": 5}], ids=["rows", "batches"])
@pytest.mark.filterwarnings("ignore:the trace of table")
def test_a_resumed_run_draws_what_comes_next_and_little_else(
    counted, source, rank, rows_per_state, monkeypatch
):
    """From each batch of the second epoch on, to the end of the third.

    If states are noted less often than there are batches, the two before at most are drawn again.
    """
    monkeypatch.setattr(dlrm_data_pytorch, "ROWS_PER_STATE", rows_per_state)
    changes = dict(SOURCES[source])
    if "trace" in changes:
        changes["trace"] = str(GOLDEN / "data" / "dist_emb_j.log")
    spec = random_spec(num_rows=(3, 1000, 4) if changes else (20, 3, 100), **changes, **counted)
    whole, numbers, drawn = RandomDataset(spec, rank), list(range(5)), []
    loaded = [batch for _ in range(3) for batch in load_batches(whole, numbers, 0, rank.device)]

    def counting(*args):
        drawn.append(args)
        return random_bags.draw_rows(*args)

    monkeypatch.setattr(dlrm_data_pytorch, "draw_rows", counting)
    for number in numbers:
        data, state = RandomDataset(spec, rank), loaded[5 + number].state_after
        assert state is None or state.number <= number + 1
        data.seek(state)
        rest = [numbers[number + 1 :], numbers]
        found = [batch for order in rest for batch in load_batches(data, order, 0, rank.device)]
        for batch, want in zip(found, loaded[6 + number :], strict=True):
            assert torch.equal(batch.block, want.block) and batch.state_after == want.state_after
        assert len(drawn) - len(found) <= (0 if rows_per_state == 1 else 2)
        drawn.clear()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_processes_go_on_from_a_state(num_workers, monkeypatch):
    """Each draws all batches and returns its own, which bring their states with them."""
    monkeypatch.setattr(dlrm_data_pytorch, "ROWS_PER_STATE", 1)
    spec = random_spec(distribution="gaussian", maximum=2, mu=1, num_batches=6)
    whole, data = RandomDataset(spec, ALONE), RandomDataset(spec, ALONE)
    wanted = [whole[number] for number in range(6)]
    before = list(load_batches(data, range(6), num_workers, ALONE.device))
    resumed = RandomDataset(spec, ALONE)
    resumed.seek(before[2].state_after)
    resumed = pickle.loads(pickle.dumps(resumed))  # as other ways to start processes do
    for numbers in (range(3, 6), range(6)):
        found = list(load_batches(resumed, numbers, num_workers, ALONE.device))
        for number, batch in zip(numbers, found, strict=True):
            assert torch.equal(batch.block, wanted[number].block)
            assert batch.state_after == wanted[number].state_after == before[number].state_after


def test_a_place_in_shuffled_batches_is_found_again(monkeypatch):
    monkeypatch.setattr(dlrm_data_pytorch, "ROWS_PER_STATE", 1)
    whole, data = RandomDataset(random_spec(), ALONE), RandomDataset(random_spec(), ALONE)
    wanted = {number: whole[number] for number in (3, 0, 4, 1, 2)}
    data.seek(wanted[4].state_after)
    for number in (1, 2):
        assert torch.equal(data[number].block, wanted[number].block)
    data.seek(None)
    assert torch.equal(data[3].block, wanted[3].block)


def test_a_state_of_more_batches_is_refused():
    data = RandomDataset(random_spec(), ALONE)
    state = DrawState.of_stream(start_stream(5), 6)
    with pytest.raises(ValueError, match="state of batch 6, of 5 batches"):
        data.seek(state)


# ---------------------------------------------------------------- Criteo data


def made_up(num_rows):
    random = np.random.default_rng(0)
    rows = random.integers(0, 50, (num_rows, 40), dtype=np.int32)
    rows[:, 0] %= 2
    rows[:, 1] = np.arange(num_rows)  # an integer that tells which row it is
    return rows


def write_splits(folder, rows, counts=(50,) * 26, rows_per_part=(30, 23, 53)):
    """Prepared data whose three splits all hold the rows."""
    files = {split: folder / f"{split}.bin" for split in ("train", "test", "val")}
    for path in files.values():
        MIXED.pack(rows.T).tofile(path)
    return Prepared(files, counts, rows_per_part, MIXED)


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [10, 7, 64])
@pytest.mark.parametrize("shuffled", [True, False])
def test_loaded_and_mapped_shares_hold_the_right_rows(tmp_path, world_size, batch_size, shuffled):
    rows = made_up(53)
    prepared = write_splits(tmp_path, rows)
    order = np.random.default_rng(1).permutation(53) if shuffled else None
    epoch = rows if order is None else rows[order]
    for in_memory in (True, False) if order is None else (True,):
        arguments = (order, in_memory)
        splits = [
            open_criteo_split(prepared, "train", batch_size, rank_of(rank, world_size), *arguments)
            for rank in range(world_size)
        ]
        for split in splits:
            split.seek(None)
        for number in range(len(splits[0])):
            got = torch.cat([split[number].block for split in splits]).numpy()
            want = epoch[number * batch_size : (number + 1) * batch_size]
            np.testing.assert_array_equal(MIXED.unpack(got), want)
        assert sum(split.num_rows_read for split in splits) == 53
        assert splits[0][0].state_after is None


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
def test_only_rows_in_memory_are_shuffled_and_only_for_training(tmp_path, randomize):
    prepared = write_splits(tmp_path, made_up(53))
    np.random.seed(1)
    order = draw_training_order(prepared, randomize)
    want = list(range(53)) if order is None else order.tolist()
    for in_memory in (True, False):
        np.random.seed(1)
        data = make_criteo_data(prepared, randomize, in_memory, (53, 53), "val", ALONE)
        assert (data.num_rows, data.num_dense) == ((50,) * 26, 13)
        numbers = [MIXED.unpack(split[0].block.numpy())[:, 1] for split in (data.train, data.test)]
        assert numbers[0].tolist() == (want if in_memory else list(range(53)))
        assert numbers[1].tolist() == list(range(53))


def test_an_evaluation_split_without_rows_is_an_error(tmp_path):
    prepared = write_splits(tmp_path, made_up(5), rows_per_part=(5, 5))
    prepared.files["val"].write_bytes(b"")
    make_criteo_data(prepared, "none", False, (2, 2), "test", ALONE)
    with pytest.raises(UserError, match=f"--eval-split=val has no rows in {tmp_path}/val.bin"):
        make_criteo_data(prepared, "none", False, (2, 2), "val", ALONE)


@pytest.mark.parametrize(
    "column, fault", [(0, "label 7 is neither 0 nor 1"), (20, "id 77 of table")]
)
def test_a_row_that_cannot_be_is_named_by_its_number_in_the_file(tmp_path, column, fault):
    """Loaded rows are checked when they are loaded, mapped ones in their batch."""
    rows = made_up(53)
    rows[40, column] = 7 if column == 0 else 77
    prepared = write_splits(tmp_path, rows)
    order = np.random.default_rng(1).permutation(53)
    line = f"row 40 of {tmp_path}/train.bin: {fault}.*; delete the prepared data to have it made"
    for numbers in (order, None):
        with pytest.raises(RankError, match=line):
            open_criteo_split(prepared, "train", 10, ALONE, numbers, in_memory=True)
    mapped = open_criteo_split(prepared, "train", 10, ALONE, None, in_memory=False)
    assert len(mapped.read([0, 1, 2, 3])) == 4
    with pytest.raises(RankError, match=line):
        mapped.read([3, 4])


def test_training_order_draws_what_the_original_drew():
    prepared = Prepared({}, (), (5, 4, 3), FLAT)
    drawn = {"total": [9], "day": [5, 4]}
    for randomize, sizes in drawn.items():
        np.random.seed(1)
        order = draw_training_order(prepared, randomize)
        after = np.random.rand()
        np.random.seed(1)
        parts = [np.random.permutation(size) for size in sizes]
        want = np.concatenate([begin + part for begin, part in zip([0, 5], parts, strict=False)])
        np.testing.assert_array_equal(order, want)
        for size in sizes:  # the original's test data
            np.random.permutation(size)
        assert np.random.rand() == after
    assert draw_training_order(prepared, "none") is None


def test_bin_shuffle_is_another_order_of_whole_batches_each_epoch():
    plain, shuffled = (
        dlrm.parse_options(flags) for flags in ([], ["--mlperf-bin-shuffle", "--numpy-rand-seed=3"])
    )
    assert list(dlrm.batch_order(plain, 30, 1)) == list(range(30))
    epochs = [list(dlrm.batch_order(shuffled, 30, epoch)) for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(30)) != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] == list(dlrm.batch_order(shuffled, 30, 0))


@pytest.mark.parametrize("layout", [FLAT, MIXED], ids=["flat", "mixed"])
def test_a_criteo_block_decodes_to_logarithms_ids_and_labels(layout):
    rows = made_up(4)
    largest = np.array([2 ** min(8 * width, 31) - 1 for width in layout.widths])
    rows[:, 0], rows[3, 1:] = [0, 1, 1, 0], largest[1:]
    features = CriteoBatch(torch.from_numpy(layout.pack(rows.T)), 4, (4,), layout).decode()
    want = torch.log(torch.tensor(rows[:, 1:14], dtype=torch.float) + 1)
    assert torch.equal(features.dense, want)
    assert features.bags.ids.view(4, 26).tolist() == rows[:, 14:].tolist()
    assert features.label.view(-1).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("rank, real", [(0, 2), (2, 1)])
def test_a_short_batch_is_filled_up_with_rows_that_do_not_count(rank, real):
    """5 rows on 3 ranks: filled, each has the 4 of a full batch of 12."""
    prepared = Prepared({}, (50,) * 26, (12, 5), MIXED)
    data = CriteoDataset(prepared, MIXED.pack(made_up(17).T), 17, 12, rank_of(rank, 3))
    full, short = data.read([0, 1])
    assert full.padded(4) is full and full.mask() is None
    padded = short.padded(4)
    assert padded.rows_per_rank == (4, 4, 4) and padded.num_rows == len(padded.block) == 4
    assert padded.num_padding == 4 - real
    assert padded.mask().tolist() == [[1.0]] * real + [[0.0]] * (4 - real)
    assert torch.equal(padded.block[:real], short.block)
    features = padded.decode()
    assert features.dense[real:].eq(0).all() and features.label[real:].eq(0).all()
    assert features.bags.ids.view(4, 26)[real:].eq(0).all()


def test_prepared_data_is_read_with_the_readmes_few_lines_of_numpy(kaggle_copy):
    prepare(data_spec(f"--data_path={kaggle_copy}", "--data-randomize=none"))
    folder = kaggle_copy / "kaggleAdDisplayChallenge_processed.prepared"
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", [tuple(column) for column in meta["columns"]], "r")
    assert rows.shape == (6003,) and len(rows.dtype.names) == 40
    fields = [line.split("\t") for line in (kaggle_copy / "train.txt").read_text().splitlines()]
    fields = fields[:6003]
    assert rows["label"].tolist() == [int(field[0]) for field in fields]
    assert rows["I1"].tolist() == [max(int(field[1] or 0), 0) for field in fields]
    ids = {}
    values = [int(field[39] or "0", 16) for field in fields]
    assert rows["C26"].tolist() == [ids.setdefault(value, len(ids)) for value in values]
    vocabulary = np.fromfile(folder / "vocabulary.bin", "<u4")
    entries = meta["vocabulary"]["begins"][25] + rows["C26"]
    written = [f"{value:08x}" for value in vocabulary[entries]]
    assert written == [field[39] or "00000000" for field in fields]


# ---------------------------------------------------------------- loader processes


@pytest.mark.parametrize("kind", ["random", "mapped", "loaded"])
def test_loader_processes_give_the_same_batches(tmp_path, kind):
    if kind == "random":
        data = RandomDataset(random_spec(), ALONE)
    else:
        prepared = write_splits(tmp_path, made_up(53))
        data = open_criteo_split(prepared, "train", 12, ALONE, None, kind == "loaded")
    wanted = [data[number].block for number in range(5)]
    found = list(load_batches(data, range(5), 2, ALONE.device))
    assert all(torch.equal(batch.block, want) for batch, want in zip(found, wanted, strict=True))


def test_loader_processes_change_nothing_in_a_run():
    flags = [*SMALL_MODEL, "--test-freq=5"]
    alone, helped = train(*flags), train(*flags, "--num-workers=2", "--test-num-workers=1")
    assert alone.status == 0 and alone.losses == helped.losses and len(alone.losses) == 10
