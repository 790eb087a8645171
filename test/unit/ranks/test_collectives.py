"""Sums, maxima and gathers of four ranks; each rank counts the same collectives."""

import sys

from conftest import ROOT, shell

PROGRAM = """
import sys
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
import torch
from forked_ranks import run_ranks
from ranks import collectives
from ranks.collectives import (
    PendingSum, all_to_all, any_rank, begin_all_to_all, largest_numbers, numbers_from_first,
    row_blocks_on_first, sum_in_rank_order, text_from_first, texts_of_all,
)
from ranks.process import joined, this_process


def own_numbers(rank):
    "Numbers of all sizes, whose sum depends on the order."
    draw = torch.Generator().manual_seed(rank)
    signs = torch.randn(1001, generator=draw)
    return signs * 10 ** torch.randint(-3, 4, (1001,), generator=draw)


def work():
    process = this_process("cpu")
    own = own_numbers(process.rank)
    in_order = own_numbers(0)
    for rank in range(1, 4):
        in_order = in_order + own_numbers(rank)
    with joined(process):
        summed = sum_in_rank_order(process, own.view(7, 143))
        assert torch.equal(summed.view(-1), in_order)
        assert torch.equal(own, own_numbers(process.rank)), "it is not overwritten"
        for k in (0, 250, 500, 1000):
            assert sum_in_rank_order(process, own[k]) == in_order[k], "it depends on the others"
        assert sum_in_rank_order(process, own[:0]).shape == (0,)
        assert largest_numbers(process, [process.rank, -process.rank, 7]) == [3, 0, 7]
        assert any_rank(process, [process.rank == 2, False, True]) == [True, False, True]
        assert any_rank(process, []) == []
        texts = ["", "größer", "\\udcff is no UTF-8", "x" * 5000]
        assert texts_of_all(process, texts[process.rank]) == texts
        assert text_from_first(process, texts[process.rank] or "first") == "first"
        check_asynchronous(process)
        assert_counted(process, 15)
        for owner in range(4):
            check_blocks(process, owner)
        assert_counted(process, 15 + 1 + 3 * 3)


def assert_counted(process, number):
    begun = process.attendance.begun
    assert [begun] == numbers_from_first(process, [begun]), begun
    assert begun == number and not process.attendance.is_inside


def check_asynchronous(process):
    "Others may begin before one is waited for; each is what it would have been alone."
    rank, send = process.rank, [0, 1, 2, 3]
    sent = torch.cat([torch.full((to,), 10.0 * rank + to) for to in send])
    received = torch.full((4 * rank,), -1.0)
    exchange = begin_all_to_all(process, received, sent, [rank] * 4, send)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(2.0 ** rank), torch.ones(0)]
    summed = PendingSum(process, tensors)
    assert not process.attendance.is_inside, "other ranks may wait for this one"
    exchange.wait()
    summed.wait()
    wanted = [10.0 * other + rank for other in range(4) for _ in range(rank)]
    assert received.tolist() == wanted
    assert torch.equal(tensors[0], torch.full((2, 3), 6.0)) and tensors[1] == 15
    own = torch.arange(4) + 10 * rank
    assert all_to_all(process, own, [1] * 4, [1] * 4).tolist() == [rank + 10 * k for k in range(4)]
    assert not process.attendance.is_inside


def check_blocks(process, owner):
    "Three blocks of a matrix of 5 rows; only the owner has it."
    rows = torch.arange(10.0).view(5, 2) + owner if process.rank == owner else None
    collectives.BLOCK_BYTES = 16
    blocks = [block.clone() for block in row_blocks_on_first(process, rows, (5, 2), owner)]
    assert [len(block) for block in blocks] == ([2, 2, 1] if process.is_first else [])
    if process.is_first:
        assert torch.equal(torch.cat(blocks), torch.arange(10.0).view(5, 2) + owner)


run_ranks(4, work)
"""


def test_four_ranks_sum_in_order_and_find_maxima_and_texts(tmp_path):
    program = tmp_path / "four_ranks.py"
    program.write_text(PROGRAM.format(paths=[str(ROOT), str(ROOT / "test" / "unit")]))
    done = shell(sys.executable, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
