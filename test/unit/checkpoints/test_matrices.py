"""Rows travel from any cut into files to any other, with the optimiser's state, for any ranks."""

import random
from dataclasses import replace

import dlrm_s_pytorch as dlrm

# isort: split
import placements
import pytest
import torch
from conftest import SMALL_MODEL
from placements import MOVES, PLACEMENTS, state_on

from checkpoints.matrices import (
    HeldRows,
    MatrixShape,
    Shard,
    cut_into_files,
    held_rows,
    matrix_shapes,
    named_tensors,
)
from engine.model_file import full_state_dict
from model.compression import NoCompression, compression_from_options
from ranks.process import Process
from reporting.reporter import Reporter


def rows_of(key, begin, end, fill=None, dim=3):
    """Rows begin to end of a matrix whose numbers tell their row, with a state of one a row."""
    size = end - begin
    if fill is not None:
        tensors = {"weight": torch.full((size, dim), fill), "sum": torch.full((size,), fill)}
    else:
        numbers = torch.arange(begin, end, dtype=torch.float32)
        tensors = {"weight": numbers[:, None] * 10 + torch.arange(dim), "sum": -numbers}
    return HeldRows(Shard(key, begin, end), tensors, False)


def cuts(draw, num_rows):
    """Random cuts of the rows, some of them of no rows."""
    inner = sorted(draw.randint(0, num_rows) for _ in range(draw.randint(0, 5)))
    ends = [0, *inner, num_rows]
    return list(zip(ends[:-1], ends[1:], strict=True))


def files_of(rows, most_bytes):
    return list(cut_into_files(rows, most_bytes))


def size_of(content):
    return sum(t.numel() * t.element_size() for t in named_tensors(content).values())


def test_rows_come_back_from_any_cut_to_any_other():
    """200 random cuts, against the numbers that tell their row."""
    draw = random.Random(7)
    for _ in range(200):
        num_rows, dim = draw.randint(0, 30), draw.randint(1, 4)
        written = [rows_of(key, *cut, dim=dim) for key in "ab" for cut in cuts(draw, num_rows)]
        draw.shuffle(written)
        wanted = [rows_of(key, *cut, -9.0, dim) for key in "ab" for cut in cuts(draw, num_rows)]
        for content in files_of(written, draw.choice([1, 17, 40, 100, 1000])):
            for shard in content:
                for held in wanted:
                    held.copy_from(shard, named_tensors(content))
        for held in wanted:
            true = rows_of(*vars(held.shard).values(), dim=dim)
            for name, tensor in held.tensors.items():
                assert torch.equal(tensor, true.tensors[name]), held.shard


def test_files_hold_each_row_once_and_are_no_larger_than_they_may_be():
    draw = random.Random(8)
    for _ in range(200):
        num_rows, most_bytes = draw.randint(0, 30), draw.choice([1, 16, 17, 40, 100, 1000])
        rows = [rows_of(key, *cut) for key in "ab" for cut in cuts(draw, num_rows)]
        files = files_of(rows, most_bytes)
        found = [
            (s.key, row) for content in files for s in content for row in range(s.begin, s.end)
        ]
        assert sorted(found) == sorted((key, row) for key in "ab" for row in range(num_rows))
        for content in files:
            num_rows_in = sum(shard.end - shard.begin for shard in content)
            assert size_of(content) <= most_bytes or num_rows_in == 1


def test_files_are_filled():
    """Ten rows of 16 bytes in files of 50 hold three each; small matrices share a file."""
    assert [len(c) for c in files_of([rows_of("a", 0, 10)], 50)] == [1, 1, 1, 1]
    (content,) = files_of([rows_of("a", 0, 1), rows_of("b", 5, 7), rows_of("c", 0, 1)], 64)
    assert list(content) == [Shard("a", 0, 1), Shard("b", 5, 7), Shard("c", 0, 1)]


def test_a_row_that_is_larger_than_a_file_may_be_has_one_of_its_own():
    files = files_of([rows_of("a", 3, 6, dim=100)], 64)
    assert [list(content) for content in files] == [[Shard("a", k, k + 1)] for k in (3, 4, 5)]


def test_no_rows_and_rows_of_no_numbers():
    assert files_of([], 64) == files_of([rows_of("a", 4, 4)], 64) == []
    held = HeldRows(Shard("a", 2, 5), {"weight": torch.empty(3, 0)}, False)
    (content,) = files_of([held], 64)
    assert content[Shard("a", 2, 5)]["weight"].shape == (3, 0)
    held.copy_from(Shard("a", 0, 9), {"a/0-9/weight": torch.empty(9, 0)})
    assert held.num_bytes == 0


def test_files_have_views_and_no_copies():
    """A second copy of the tables would not have room in memory."""
    held = rows_of("a", 2, 8)
    for content in files_of([held], 40):
        for tensors in content.values():
            storage = tensors["weight"].untyped_storage().data_ptr()
            assert storage == held.tensors["weight"].untyped_storage().data_ptr()


def test_rows_of_other_matrices_and_other_rows_stay():
    held = rows_of("a", 5, 8, -1.0)
    for shard in (Shard("b", 0, 99), Shard("a", 0, 5), Shard("a", 8, 9), Shard("a", 6, 6)):
        assert not held.overlap(shard)
    source = rows_of("a", 6, 7)
    held.copy_from(source.shard, named_tensors({source.shard: source.tensors}))
    assert held.tensors["sum"].tolist() == [-1, -6, -1]


@pytest.mark.parametrize(
    "change",
    [
        {"a/0-4/weight": None}, {"a/0-4/sum": None}, {"a/0-4/weight": torch.zeros(4, 2)},
        {"a/0-4/weight": torch.zeros(5, 3)}, {"a/0-4/weight": torch.zeros(12)},
        {"a/0-4/weight": torch.zeros(4, 3, 1)}, {"a/0-4/sum": torch.zeros(4, 1)},
        {"a/0-4/weight": torch.zeros(4, 3, dtype=torch.float64)},
        {"a/0-4/weight": torch.zeros(4, 3, dtype=torch.int32)},
        {"a/0-4/sum": torch.zeros(())},
    ],
)  # fmt: skip
def test_a_tensor_of_another_shape_or_type_or_none_is_an_error(change):
    source, held = rows_of("a", 0, 4), rows_of("a", 2, 6, -1.0)
    tensors = named_tensors({source.shard: source.tensors}) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match="it has no a/0-4/(weight|sum) of shape"):
        held.copy_from(source.shard, tensors)


# ---------------------------------------------------------------- matrices of a model


def state_of(rank, world_size, *flags):
    """The state of a rank of a model that has not been trained."""
    options = dlrm.parse_options([*SMALL_MODEL, "--tensor-board-filename=", *flags])
    process = Process(rank, world_size, rank, torch.device("cpu"), "gloo")
    dlrm.seed_everything(options)
    data = dlrm.make_data(options, None, process)
    return dlrm.Trainer(options, process, data, Reporter()).state


MODELS = {
    "sgd": [],
    "adagrad": ["--optimizer=adagrad"],
    "rwsadagrad": ["--optimizer=rwsadagrad"],
    "learned adagrad": ["--optimizer=adagrad", "--weighted-pooling=learned"],
    "qr": ["--qr-flag", "--qr-threshold=50", "--optimizer=adagrad"],
    "md": ["--md-flag", "--md-threshold=50", "--optimizer=rwsadagrad"],
}


def fill(held):
    """Numbers that tell matrix, tensor and row, so that none is where another should be."""
    for name, tensor in held.tensors.items():
        own = hash_of(held.shard.key, name) + torch.arange(held.shard.begin, held.shard.end)
        tensor.copy_(own.view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape))


def hash_of(*words):
    return 1000 * (sum(map(ord, "/".join(words))) % 1000)


@pytest.mark.parametrize("name", MODELS)
def test_three_ranks_hold_what_one_rank_holds_and_two_can_read(name):
    shapes = matrix_shapes(state_of(0, 1, *MODELS[name]))
    states = [state_of(rank, 3, *MODELS[name]) for rank in range(3)]
    assert all(matrix_shapes(state) == shapes for state in states)
    written = [h for s in states for h in held_rows(s) if s.process.is_first or not h.is_shared]
    sizes = {}
    for held in written:
        fill(held)
        sizes[held.shard.key] = sizes.get(held.shard.key, 0) + held.num_bytes
        of_row = {name: tuple(t.shape[1:]) for name, t in held.tensors.items()}
        assert of_row == shapes[held.shard.key].row_shapes
    assert sizes == {key: shape.num_bytes for key, shape in shapes.items()}
    read = [held for rank in range(2) for held in held_rows(state_of(rank, 2, *MODELS[name]))]
    for content in cut_into_files(written, 3000):
        for shard in content:
            for held in read:
                if held.overlap(shard):
                    held.copy_from(shard, named_tensors(content))
    for held in read:
        wanted = {name: torch.empty_like(tensor) for name, tensor in held.tensors.items()}
        fill(replace(held, tensors=wanted))
        for tensor_name, tensor in held.tensors.items():
            assert torch.equal(tensor, wanted[tensor_name]), (held.shard, tensor_name)


def test_matrices_have_the_names_of_the_state_dict_and_are_the_models_own():
    state = state_of(0, 1, "--optimizer=adagrad")
    for held in held_rows(state):
        held.tensors["weight"].fill_(7.0)
    found = full_state_dict(state)
    assert set(found) == set(matrix_shapes(state))
    assert all((tensor == 7).all() for tensor in found.values())


def test_the_state_of_the_optimisers_goes_with_the_rows():
    """Numbers for the whole of a parameter are no rows; run_state.py has them."""
    shapes = matrix_shapes(state_of(0, 1, "--optimizer=adagrad"))
    assert shapes["emb_l.1.weight"] == MatrixShape(200, {"weight": (16,), "sum": (16,)})
    assert shapes["bot_l.0.weight"] == MatrixShape(64, {"weight": (13,), "sum": (13,)})
    assert shapes["bot_l.0.bias"] == MatrixShape(64, {"weight": (), "sum": ()})
    shapes = matrix_shapes(state_of(0, 1, "--optimizer=rwsadagrad"))
    assert shapes["emb_l.1.weight"].row_shapes == {"weight": (16,), "momentum": ()}


@pytest.mark.parametrize("one, other", MOVES, ids=map("-".join, MOVES))
@pytest.mark.parametrize("name", ["adagrad", "learned adagrad", "qr", "md"])
def test_what_one_placement_wrote_another_one_reads(name, one, other):
    """Also parts of cut matrices, and of ranks that hold the same rows only the first one's."""
    options = dlrm.parse_options([*SMALL_MODEL, *MODELS[name]])
    tables = compression_from_options(options).make_tables((100, 7, 30, 4))
    learned = options.weighted_pooling == "learned"

    def states(num_ranks, place):
        ranks = [Process(k, num_ranks, k, torch.device("cpu"), "gloo") for k in range(num_ranks)]
        return [state_on(rank, PLACEMENTS[place], tables, "adagrad", learned) for rank in ranks]

    written = states(4, one)
    for state in written:
        placements.fill(state.tables)
    shapes = matrix_shapes(written[0])
    rows = [h for s in written for h in held_rows(s) if s.process.is_first or not h.is_shared]
    sizes = {key: sum(h.num_bytes for h in rows if h.shard.key == key) for key in shapes}
    assert sizes == {key: shape.num_bytes for key, shape in shapes.items()}
    for state in states(3, other):
        assert matrix_shapes(state) == shapes
        for held in held_rows(state):
            for content in cut_into_files(rows, 500):
                for shard in content:
                    if held.overlap(shard):
                        held.copy_from(shard, named_tensors(content))
        found = placements.held(state.tables)
        placements.fill(state.tables)
        for key, wanted in placements.held(state.tables).items():
            assert torch.equal(found[key], wanted), key


def test_a_table_that_is_cut_is_one_matrix():
    """A rank's parts of it begin where they begin in the matrix."""
    tables = NoCompression(2).make_tables([9])
    rank = Process(1, 3, 1, torch.device("cpu"), "gloo")
    state = state_on(rank, PLACEMENTS["cut"], tables, "sgd")
    assert matrix_shapes(state)["emb_l.0.weight"] == MatrixShape(9, {"weight": (2,)})
    held = [one for one in held_rows(state) if one.shard.key == "emb_l.0.weight"]
    assert [one.shard for one in held] == [Shard("emb_l.0.weight", 3, 6)]
    assert not held[0].is_shared
