"""Vectors travel while other work is done, both ways, and numbers of two bytes keep gradients."""

import pytest
import torch
from thread_ranks import ThreadRanks

from model.travel import Travel, Types
from optim.update import Update

NUM_RANKS = 2


class Noted(torch.autograd.Function):
    """Returns its numbers, and notes when its backward pass is done."""

    @staticmethod
    def forward(ctx, numbers, note):
        ctx.note = note
        return numbers.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.note()
        return gradient, None


FLOAT32 = Types()


def travel_there_and_back(types=FLOAT32, num_rows=4, size=1.0, has_vectors=True, first=1.0):
    """Rank r sends r + 1 numbers to each rank; (events, what arrives, gradients) of each rank."""
    ranks = ThreadRanks(NUM_RANKS)

    def work(process):
        def note(what):
            return lambda: ranks.events.append((process.rank, what, None))

        sizes = [rank + 1 if has_vectors or rank else 0 for rank in range(NUM_RANKS)]
        send, receive = [sizes[process.rank]] * NUM_RANKS, sizes
        update = Update(0.1, mean_over=num_rows, dense_is_ready=note("dense is ready"))
        travel = Travel(process, send, receive, types, update)
        own = first + process.rank + torch.arange(sum(send)) / 8
        own = own.to(types.vectors).requires_grad_()
        dense = torch.ones(3, dtype=types.vectors, requires_grad=True)
        travel.depart([Noted.apply(own, note("rows"))] if len(own) else [])
        note("between")()
        between = Noted.apply(dense, note("backward of what lies between"))
        arrived = travel.arrive()
        gradients = size * (1 + process.rank + torch.arange(len(arrived)) / 8)
        joined = (arrived * gradients.to(arrived.dtype)).sum() + between.sum()
        Noted.apply(joined, note("backward of what comes after")).backward()
        return arrived.detach(), own.grad

    found = ranks.run(work)
    events = [[what for rank, what, _ in ranks.events if rank == k] for k in range(NUM_RANKS)]
    return events, *zip(*found, strict=True)


FORWARD = ["begin all_to_all", "between", "wait all_to_all"]
BACKWARD = [
    "backward of what comes after", "begin all_to_all", "backward of what lies between",
    "dense is ready", "wait all_to_all", "rows",
]  # fmt: skip


def test_vectors_and_gradients_are_on_their_way_while_what_lies_between_is_computed():
    """Also what comes of the dense gradients begins before the rows' gradients are waited for."""
    events, arrived, gradients = travel_there_and_back()
    assert events == [FORWARD + BACKWARD] * NUM_RANKS
    assert arrived[0].tolist() == [1, 2, 2.125] and arrived[1].tolist() == [1.125, 2.25, 2.375]
    assert gradients[0].tolist() == [1, 2] and gradients[1].tolist() == [1.125, 1.25, 2.125, 2.25]


def test_a_rank_without_vectors_of_its_own_takes_part():
    events, arrived, gradients = travel_there_and_back(has_vectors=False)
    assert events == [FORWARD + BACKWARD[:-1], FORWARD + BACKWARD]
    assert arrived[0].tolist() == [2, 2.125] and arrived[1].tolist() == [2.25, 2.375]
    assert gradients == (None, gradients[1]) and gradients[1].tolist() == [1, 1.125, 2, 2.125]


@pytest.mark.parametrize("num_rows", [1, 1000, 65536, 10**6])
@pytest.mark.parametrize("wire, tolerance", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_gradients_of_a_mean_over_many_rows_survive_two_bytes(wire, tolerance, num_rows):
    """Those of single rows are 1e-3 and less, of which float16 knows nothing once divided."""
    for of_row in (0.1, 1e-3, 1e-4):
        size = of_row / num_rows
        _, arrived, gradients = travel_there_and_back(Types(wire=wire), num_rows, size)
        _, _, wanted = travel_there_and_back(FLOAT32, num_rows, size)
        for found, exact in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=tolerance, atol=0)
        assert {one.dtype for one in arrived} == {torch.float32}


def test_a_loss_with_a_scale_needs_no_other_one():
    """Vectors of --amp=fp16: a factor on top would make infinite what its scale makes large."""
    _, arrived, gradients = travel_there_and_back(Types(torch.float16), 65536, 1000.0)
    assert gradients[0].tolist() == [1000, 2000]
    assert {one.dtype for one in (*arrived, *gradients)} == {torch.float16}


LARGEST = torch.finfo(torch.float16).max
LARGEST_OF_BOTH = 65536 / 4  # rounded to the type of the vectors
INFINITE, NO_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    "vectors, size, wanted",
    [
        (torch.float32, 1e6, LARGEST / 4),
        (torch.float32, -1e6, -LARGEST / 4),
        (torch.bfloat16, 1e6, LARGEST_OF_BOTH),
        (torch.float32, INFINITE, INFINITE),
        (torch.float16, INFINITE, INFINITE),
        (torch.float32, NO_NUMBER, NO_NUMBER),
    ],
)
def test_gradients_that_float16_has_no_number_for_are_its_largest_unless_they_are_infinite(
    vectors, size, wanted
):
    """They travel times 4. A loss with a scale, that of --amp=fp16, has to see what overflows."""
    types = Types(vectors, torch.float16)
    _, _, gradients = travel_there_and_back(types, num_rows=4, size=size)
    wanted = torch.full((2,), wanted, dtype=vectors)
    torch.testing.assert_close(gradients[0], wanted, rtol=0, atol=0, equal_nan=True)


def test_vectors_that_float16_has_no_number_for_are_its_largest():
    types = Types(wire=torch.float16)
    _, arrived, _ = travel_there_and_back(types, first=1e5)
    assert arrived[0].tolist() == [LARGEST] * 3
    _, arrived, _ = travel_there_and_back(types, first=INFINITE)
    assert arrived[0].tolist() == [INFINITE] * 3
