"""Optimisers of rows: kernels equal operators, what is kept is summed, bad numbers do nothing."""

import pytest
import torch
from conftest import at
from naive_embedding import draw_rows

from optim.loss_scale import NoScale
from optim.row_gradients import SlottedRowGradients, SortedRowGradients
from optim.row_optimizers import TABLE_OPTIMIZERS

RULES = list(TABLE_OPTIMIZERS)
NUM_ROWS, LR = 40, 0.1
PATHS = pytest.mark.parametrize("on_cpu", [True, False], ids=["kernels", "operators"])
NAN, INF = float("nan"), float("inf")


def draw_weight(dim):
    return torch.randn(NUM_ROWS, dim, generator=torch.Generator().manual_seed(1))


def make(rule, dim, on_cpu):
    optimizer = TABLE_OPTIMIZERS[rule](draw_weight(dim))
    assert optimizer._on_cpu and isinstance(optimizer._kept, SlottedRowGradients)
    if not on_cpu:  # what other devices have
        optimizer._on_cpu, optimizer._kept = False, SortedRowGradients(len(optimizer.weight))
    return optimizer


def tensors(optimizer):
    return {"weight": optimizer.weight} | optimizer.state


def assert_same(got, want):
    for name, value in tensors(got).items():
        other = tensors(want)[name]
        assert value.isfinite().all(), name
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=at(name))


@pytest.mark.parametrize("dim", [1, 3, 16, 64])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_equal_the_operators_of_other_devices(rule, dim):
    kernels, operators = make(rule, dim, True), make(rule, dim, False)
    for step, size in enumerate((200, 1, 37)):
        for optimizer in (kernels, operators):
            optimizer.apply(*draw_rows(NUM_ROWS, dim, size, step), LR)
    assert_same(kernels, operators)


@PATHS
def test_row_wise_adagrad_is_its_formula(on_cpu):
    """total += mean over the row of sum^2; row -= lr * sum / (sqrt(total) + 1e-10).

    The sums are of the gradients of equal rows. test_embedding_tables.py compares the other rules
    with torch's.
    """
    optimizer = make("rwsadagrad", 2, on_cpu)
    weight, total = optimizer.weight.clone(), torch.zeros(NUM_ROWS)
    for rows, scale in (([1, 3, 1], 1.0), ([3, 0, 0], 2.0)):
        gradients = scale * torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
        optimizer.apply(torch.tensor(rows), gradients, LR)
        for row in set(rows):
            summed = sum(gradients[k] for k, other in enumerate(rows) if other == row)
            total[row] += summed.square().mean()
            weight[row] -= LR * summed / (total[row].sqrt() + 1e-10)
    torch.testing.assert_close(optimizer.weight, weight)
    torch.testing.assert_close(optimizer.state["momentum"], total)


@PATHS
@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_counts_as_one_batch(rule, on_cpu):
    kept, whole = make(rule, 3, on_cpu), make(rule, 3, on_cpu)
    for step in range(2):
        batches = [draw_rows(NUM_ROWS, 3, size, 10 * step + size) for size in (5, 70, 1, 30)]
        for batch in batches[:-1]:
            kept.keep(*batch)
        kept.apply(*batches[-1], LR)
        rows, gradients = zip(*batches, strict=True)
        whole.apply(torch.cat(rows), torch.cat(gradients), LR)
        assert_same(kept, whole)
        assert not len(kept._kept)


@PATHS
@pytest.mark.parametrize("rule", RULES)
def test_only_touched_rows_change(rule, on_cpu):
    optimizer = make(rule, 3, on_cpu)
    before = {name: value.clone() for name, value in tensors(optimizer).items()}
    optimizer.keep(torch.tensor([4, 7, 4]), torch.ones(3, 3))
    optimizer.apply(torch.tensor([9, 7]), torch.ones(2, 3), LR)
    for name, value in tensors(optimizer).items():
        changed = (value != before[name]).view(NUM_ROWS, -1)
        assert changed.any(1).nonzero().view(-1).tolist() == [4, 7, 9], name


@PATHS
@pytest.mark.parametrize("keeps", [True, False], ids=["keep", "apply"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_counts_nothing_and_the_rest_of_its_row_does(rule, bad, keeps, on_cpu):
    rows = torch.tensor([5, 2, 5, 8])
    gradients = torch.tensor([[1.0, bad, 2.0], [bad] * 3, [0.5, 3.0, bad], [1.0, 1.0, 1.0]])
    zeros = torch.where(gradients.isfinite(), gradients, 0.0)
    optimizer, wanted = make(rule, 3, on_cpu), make(rule, 3, on_cpu)
    before = optimizer.weight.clone()
    for one, values in ((optimizer, gradients), (wanted, zeros)):
        if keeps:
            one.keep(rows, values)
            one.apply(rows[:1], values[:1], LR)
        else:
            one.apply(rows, values, LR)
    assert_same(optimizer, wanted)
    assert torch.equal(optimizer.weight[2], before[2])
    assert (optimizer.weight[5] != before[5]).all() and (optimizer.weight[8] != before[8]).all()


@PATHS
@pytest.mark.parametrize("rule", RULES)
def test_no_rows_change_nothing(rule, on_cpu):
    """A rank whose tables are in no bag of a batch."""
    optimizer = make(rule, 3, on_cpu)
    before = {name: value.clone() for name, value in tensors(optimizer).items()}
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 3)
    optimizer.apply(*nothing, LR)
    optimizer.keep(*nothing)
    optimizer.apply(*nothing, LR)
    for name, value in tensors(optimizer).items():
        assert torch.equal(value, before[name]), name
    optimizer.keep(*nothing)
    optimizer.apply(*draw_rows(NUM_ROWS, 3, 9, 0), LR)
    wanted = make(rule, 3, on_cpu)
    wanted.apply(*draw_rows(NUM_ROWS, 3, 9, 0), LR)
    assert_same(optimizer, wanted)


def test_batches_without_ids_are_not_kept():
    """A rank whose tables are in no bag sees many of them."""
    optimizer = make("sgd", 3, on_cpu=False)
    optimizer.keep(torch.empty(0, dtype=torch.int64), torch.empty(0, 3))
    assert not optimizer._kept._kept


@PATHS
@pytest.mark.parametrize("rule", RULES)
def test_a_shared_optimiser_takes_the_gradients_of_all_ranks_as_one_does(rule, on_cpu):
    """Ranks keep some gradients or none, their sums are summed, and all ranks do the same step."""
    ranks = [TABLE_OPTIMIZERS[rule](draw_weight(3), is_shared=True) for _ in range(3)]
    alone = make(rule, 3, on_cpu)
    for rank in ranks:
        rank._on_cpu = on_cpu
    for step in range(4):
        batches = [draw_rows(NUM_ROWS, 3, size, 10 * step + size) for size in (5, 70, 9)]
        batches[0][1][2, 1], batches[1][1][3] = NAN, INF
        has_none = step % 3
        del batches[has_none]
        for rank, batch in zip(ranks[:has_none] + ranks[has_none + 1 :], batches, strict=True):
            rank.keep(*(column[:2] for column in batch))
            rank.keep(*(column[2:] for column in batch))
        total = sum(sums.clone() for rank in ranks for sums in rank.shared_gradients())
        for rank in ranks:
            (sums,) = rank.shared_gradients()
            sums.copy_(total)
            rank.apply_kept(LR, NoScale())
        rows, gradients = zip(*batches, strict=True)
        alone.apply(torch.cat(rows), torch.cat(gradients), LR)
        for rank in ranks:
            assert_same(rank, alone)
            for name, tensor in tensors(rank).items():
                assert torch.equal(tensor, tensors(ranks[0])[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_kept_gradients_of_a_shared_optimiser_are_applied_once(rule):
    optimizer = TABLE_OPTIMIZERS[rule](draw_weight(3), is_shared=True)
    optimizer.keep(*draw_rows(NUM_ROWS, 3, 50, 0))
    optimizer.apply_kept(LR, NoScale())
    once = {name: value.clone() for name, value in tensors(optimizer).items()}
    optimizer.apply_kept(LR, NoScale())
    for name, value in tensors(optimizer).items():
        assert torch.equal(value, once[name]), name
