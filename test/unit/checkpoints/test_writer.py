"""What is written while training goes on is a copy, for which any memory will do."""

import dlrm_s_pytorch  # noqa: F401  (before torch: common/compiled.py says why)

# isort: split
import pytest
import torch

from checkpoints.matrices import HeldRows, Shard
from checkpoints.writer import CopiedRows


def test_without_page_locked_memory_the_copy_lies_in_other_memory(monkeypatch):
    """The system limits it, and not every card's torch can get it; the run would have ended."""
    empty = torch.empty

    def without_locked(*size, pin_memory=False, **named):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **named)

    monkeypatch.setattr(torch, "empty", without_locked)
    copy = CopiedRows()
    on_card = torch.empty(5, 3, device="meta")
    copy.make_room([HeldRows(Shard("emb_l.0.weight", 0, 5), {"weight": on_card}, False)])
    assert copy.has_room


@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_copy_stays_as_it_is(num_rows):
    weight = torch.arange(3.0 * num_rows).view(num_rows, 3)
    rows = [HeldRows(Shard("emb_l.0.weight", 0, num_rows), {"weight": weight}, False)]
    copy = CopiedRows()
    (first,) = copy.take(rows)
    before = weight.clone()
    weight += 1
    assert torch.equal(first.tensors["weight"], before)
    (again,) = copy.take(rows)
    assert torch.equal(again.tensors["weight"], weight)
