"""Sums, maxima and gathers of four ranks; each rank counts the same collectives."""

import sys

from conftest import ROOT, shell

PROGRAM = """
import sys
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
import torch
from forked_ranks import run_ranks
from ranks.collectives import (
    PendingSum, all_to_all, any_rank, begin_all_to_all, gather_on_first, largest_numbers,
    numbers_from_first, row_blocks_on_first, sum_in_rank_order, text_from_first, texts_of_all,
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
        send_to_first(process, torch.ones(2), torch.empty(2), 3)
        counts = process.attendance.begun, process.attendance.ended
        assert counts == tuple(numbers_from_first(process, counts)) and counts[0] == counts[1] == 13


run_ranks(4, work)
"""


def test_four_ranks_sum_in_order_and_find_maxima_and_texts(tmp_path):
    program = tmp_path / "four_ranks.py"
    program.write_text(PROGRAM.format(paths=[str(ROOT), str(ROOT / "test" / "unit")]))
    done = shell(sys.executable, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
