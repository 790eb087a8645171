"""Batches: what is drawn, who reads what, what the block decodes to."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, GOLDEN, SMALL_MODEL, train

from common.shares import share_of_rows, split_evenly
from criteo.prepared import Prepared
from criteo.row_layout import FLAT, Layout
from dlrm_data_pytorch import (
    CriteoData,
    RandomData,
    RandomSpec,
    StackDistances,
    criteo_split,
    draw_training_order,
)
from model.batch import CriteoBatch
from ranks.process import Process

MIXED = Layout((1, 2, 4) * 13 + (2,))


def rank_of(rank, world_size):
    return Process(rank, world_size, rank, torch.device("cpu"), "gloo")


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
    data = RandomData(random_spec(), rank_of(0, 1))
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
    data, other = (
        RandomData(random_spec(), rank_of(0, 1)),
        RandomData(random_spec(), rank_of(0, 1)),
    )
    wanted = [data[number].block for number in range(5)]
    for number in (3, 0, 4, 4, 1):
        assert torch.equal(other[number].block, wanted[number])


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shares_of_ranks_add_up_to_the_batch(world_size):
    whole = RandomData(random_spec(), rank_of(0, 1))
    shares = [RandomData(random_spec(), rank_of(rank, world_size)) for rank in range(world_size)]
    for number in range(5):
        features, parts = whole[number].decode(), [share[number].decode() for share in shares]
        assert torch.equal(torch.cat([part.dense for part in parts]), features.dense)
        assert torch.equal(torch.cat([part.label for part in parts]), features.label)
        assert torch.equal(torch.cat([part.bags.ids for part in parts]), features.bags.ids)
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(
                part.bags.ids_per_rank[rank], part.bags.lengths.sum(0).numpy()
            )
    assert sum(share.rows_read for share in shares) == whole.rows_read == 30


def made_up(num_rows):
    random = np.random.default_rng(0)
    rows = random.integers(0, 50, (num_rows, 40), dtype=np.int32)
    rows[:, 0] = np.arange(num_rows)  # a label that tells which row it is
    return rows


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [10, 7, 64])
@pytest.mark.parametrize("shuffled", [True, False])
def test_loaded_and_mapped_shares_hold_the_right_rows(tmp_path, world_size, batch_size, shuffled):
    rows = made_up(53)
    packed = MIXED.pack(rows.T)
    files = {split: tmp_path / f"{split}.bin" for split in ("train", "test", "val")}
    for path in files.values():
        packed.tofile(path)
    prepared = Prepared(files, (50,) * 26, (30, 23, 53), MIXED)
    order = np.random.default_rng(1).permutation(53) if shuffled else None
    epoch = rows if order is None else rows[order]
    for in_memory in (True, False) if order is None else (True,):
        splits = [
            criteo_split(prepared, "train", batch_size, rank_of(rank, world_size), order, in_memory)
            for rank in range(world_size)
        ]
        for number in range(len(splits[0])):
            got = torch.cat([split[number].block for split in splits]).numpy()
            np.testing.assert_array_equal(
                MIXED.unpack(got), epoch[number * batch_size : (number + 1) * batch_size]
            )
        assert sum(split.rows_read for split in splits) == 53
        if in_memory:
            assert sum(len(split._rows) for split in splits) == 53, "a rank loads its rows only"


@pytest.mark.parametrize("layout", [FLAT, MIXED], ids=["flat", "mixed"])
def test_a_criteo_block_decodes_to_logarithms_ids_and_labels(layout):
    rows = made_up(4)
    largest = np.array([2 ** min(8 * width, 31) - 1 for width in layout.widths])
    rows[3] = [3, *largest[1:]]
    features = CriteoBatch(torch.from_numpy(layout.pack(rows.T)), 4, (4,), layout).decode()
    want = torch.log(torch.tensor(rows[:, 1:14], dtype=torch.float) + 1)
    assert torch.equal(features.dense, want)
    assert features.bags.ids.view(4, 26).tolist() == rows[:, 14:].tolist()
    assert features.label.view(-1).tolist() == [0, 1, 2, 3]


def test_training_order_draws_what_the_original_drew():
    prepared = Prepared({}, (), (5, 4, 3), FLAT)
    np.random.seed(1)
    total = draw_training_order(prepared, "total")
    after = np.random.rand()
    np.random.seed(1)
    np.testing.assert_array_equal(total, np.random.permutation(9))
    np.random.permutation(9)
    assert np.random.rand() == after
    np.random.seed(1)
    day = draw_training_order(prepared, "day")
    after = np.random.rand()
    np.random.seed(1)
    np.testing.assert_array_equal(
        day, np.r_[np.random.permutation(5), 5 + np.random.permutation(4)]
    )
    np.random.permutation(5), np.random.permutation(4)
    assert np.random.rand() == after
    assert draw_training_order(prepared, "none") is None


@pytest.mark.parametrize("kind", ["random", "mapped", "loaded"])
def test_loader_workers_change_nothing(kaggle, kind):
    flags = {
        "random": [*SMALL_MODEL, "--test-freq=5"],
        "mapped": [
            *CRITEO_MODEL,
            f"--data_path={kaggle}",
            "--memory-map",
            "--data-randomize=none",
            "--test-freq=47",
        ],
        "loaded": [*CRITEO_MODEL, f"--data_path={kaggle}", "--test-freq=47"],
    }[kind]
    alone = train(*flags)
    assert alone.status == 0, alone.err
    helped = train(*flags, "--num-workers=2", "--test-num-workers=1")
    assert (helped.losses, helped.tests) == (alone.losses, alone.tests)


def test_an_evaluation_does_not_disturb_the_training_draws():
    assert train(*SMALL_MODEL, "--test-freq=3").losses == train(*SMALL_MODEL).losses


def test_gaussian_ids_outside_a_table_are_an_error():
    result = train(
        *SMALL_MODEL, "--rand-data-dist=gaussian", "--rand-data-max=90", "--rand-data-mu=60"
    )
    assert result.status == 2 and "of 40 rows" in result.err and "--rand-data-max" in result.err


def test_synthetic_ids_beyond_a_table_are_taken_modulo_with_a_warning(recwarn):
    flags = ["--data-generation=synthetic", f"--data-trace-file={GOLDEN}/data/dist_emb_j.log"]
    flags += ["--data-size=40", "--num-indices-per-lookup=9", "--num-indices-per-lookup-fixed=true"]
    assert train(*flags, "--arch-embedding-size=2-2-2", "--arch-mlp-top=4-1").status == 0
    assert any("taken modulo" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    "text", [None, "1,2\n0,1\n", "1,x\n0,1\n0.5,1\n", "1,2\n0,5\n0.5,1.0\n", "1,2\n0,1\n1.0\n"]
)
def test_a_bad_trace_file_is_one_line(tmp_path, text):
    for table in range(3):
        if text is not None:
            (tmp_path / f"trace_{table}.log").write_text(text)
    result = train("--data-generation=synthetic", f"--data-trace-file={tmp_path}/trace_j.log")
    assert result.status == 2 and "--data-trace-file" in result.err and result.err.count("\n") == 1


def test_padding_of_a_trace_draws_no_new_ids_once_all_distances_are_reachable(tmp_path):
    path = tmp_path / "t"
    path.write_text("3,1,2\n0,1,2\n0.5,0.75,1.0\n")
    for padding in (False, True):
        drawn = StackDistances(path, padding).draw(50, np.random.RandomState(0))
        assert set(drawn) <= {1, 2, 3}
    padded = StackDistances(path, True)
    assert padded._draw_distance(2, 0.0) == 0 and padded._draw_distance(2, 0.01) == 1
    assert StackDistances(path, False)._draw_distance(2, 0.01) == 0
    assert padded._draw_distance(0, 0.99) == 0, "before an id was used only distance 0 can be drawn"


def test_bin_shuffle_trains_whole_batches_in_another_order_each_epoch(kaggle_copy):
    flags = [
        *CRITEO_MODEL,
        f"--data_path={kaggle_copy}",
        "--mlperf-bin-loader",
        "--learning-rate=0",
    ]
    plain, shuffled = (
        train(*flags, "--nepochs=2"),
        train(*flags, "--nepochs=2", "--mlperf-bin-shuffle"),
    )
    epochs = [
        [loss for *_, epoch, loss in run.losses if epoch == k]
        for run in (plain, shuffled)
        for k in (0, 1)
    ]
    assert epochs[0] == epochs[1] and sorted(epochs[2]) == sorted(epochs[0])
    assert epochs[2] != epochs[0] and epochs[3] != epochs[2]


def test_rows_are_split_consecutively_and_evenly():
    assert split_evenly(10, 4) == [3, 3, 2, 2]
    assert split_evenly(2, 4) == [1, 1, 0, 0]
    assert [share_of_rows(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_prepared_data_is_read_where_it_lies(tmp_path):
    """The README's few lines of numpy."""
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "d")
    train(*CRITEO_MODEL, f"--data_path={tmp_path}/d", "--num-batches=1")
    folder = tmp_path / "d" / "kaggleAdDisplayChallenge_processed.prepared"
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", [tuple(column) for column in meta["columns"]], "r")
    assert rows.shape == (6003,) and len(rows.dtype.names) == 40
    lines = (tmp_path / "d" / "train.txt").read_text().splitlines()[:6003]
    fields = [line.split("\t") for line in lines]
    assert rows["label"].tolist() == [int(field[0]) for field in fields]
    assert rows["I1"].tolist() == [max(int(field[1] or 0), 0) for field in fields]
    ids = {}
    values = [int(field[39] or "0", 16) for field in fields]
    assert rows["C26"].tolist() == [ids.setdefault(value, len(ids)) for value in values]


@pytest.mark.parametrize("rank, real", [(0, 2), (2, 1)])
def test_a_short_batch_is_filled_up_with_rows_that_do_not_count(rank, real):
    """5 rows on 3 ranks: filled, each has the 4 of a full batch of 12."""
    counts = (9,) * 26
    rows = np.random.default_rng(0).integers(0, 9, (17, 40), np.int32)
    prepared = Prepared({}, counts, (12, 5), MIXED)
    data = CriteoData(prepared, MIXED.pack(np.ascontiguousarray(rows.T)), 17, 12, rank_of(rank, 3))
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


def test_one_lookup_or_one_a_table_give_the_same():
    flags = [*SMALL_MODEL, "--num-indices-per-lookup-fixed=true", "--num-indices-per-lookup=1"]
    assert train(*flags, "--one-lookup=false").losses == train(*flags).losses
