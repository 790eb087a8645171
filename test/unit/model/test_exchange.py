"""Tables on several ranks return the vectors and updates of one rank. Each rank is a thread here.

test_ranks.py does the same with processes and the whole program.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from naive_embedding import bags_of, draw_bags

from common.shares import split_evenly
from model.compression import NoCompression
from model.embedding_tables import EmbeddingTables
from model.exchange import Exchange
from optim.update import Update
from ranks.placement import place_tables
from ranks.process import Process

NUM_ROWS, DIM = (7, 3, 50, 20, 11), 4


class ThreadRanks:
    """torch.distributed.all_to_all_single between threads."""

    def __init__(self, world_size):
        self.rank, self.sent = threading.local(), {}
        self.barrier = threading.Barrier(world_size, timeout=60)

    def all_to_all_single(self, output, values, receive, send):
        assert len(values) == sum(send) and len(output) == sum(receive)
        rank = self.rank.number
        self.sent[rank] = values.split(send)
        self.barrier.wait()
        received = [self.sent[other][rank] for other in sorted(self.sent)]
        assert [len(part) for part in received] == list(receive)
        output.copy_(torch.cat(received))
        self.barrier.wait()


def train(rank, world_size, lists, one_each, gradient):
    """Vectors of this rank's rows, and its parts' rows after a step."""
    process = Process(rank, world_size, rank, torch.device("cpu"), "gloo")
    placed = place_tables(NoCompression(DIM).make_tables(NUM_ROWS), world_size)
    tables = EmbeddingTables(placed, Exchange(process, placed), "sgd", learned_pooling=False)
    generator = torch.Generator().manual_seed(1)
    initial = {f"{t}.weight": torch.randn(n, DIM, generator=generator)
               for t, n in enumerate(NUM_ROWS)}  # fmt: skip
    tables.load_state_dict(initial)
    shares = split_evenly(len(lists), world_size)
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    num_ids = np.array([[len(bag) for bag in row] for row in lists])
    by_rank = np.array([part.sum(0) for part in np.split(num_ids, np.cumsum(shares)[:-1])])
    vectors = tables(bags_of(lists[own], one_each, by_rank), shares, Update(0.5))
    vectors.backward(gradient[own])
    return vectors.detach(), tables.state_dict()


@pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])
@pytest.mark.parametrize("world_size, batch", [(2, 6), (3, 8), (3, 2), (7, 9)])
def test_several_ranks_do_what_one_does(world_size, batch, one_each, monkeypatch):
    """Also ranks without rows of a batch (3 of 2 rows), and without tables (7 of 5 tables)."""
    _, lists = draw_bags(NUM_ROWS, batch, one_each)
    gradient = torch.randn(batch, len(NUM_ROWS), DIM)
    vectors, state = train(0, 1, lists, one_each, gradient)
    ranks = ThreadRanks(world_size)
    monkeypatch.setattr(dist, "all_to_all_single", ranks.all_to_all_single)

    def run(rank):
        ranks.rank.number = rank
        try:
            return train(rank, world_size, lists, one_each, gradient)
        except BaseException:
            ranks.barrier.abort()  # the other threads shall not wait for this one
            raise

    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(run, range(world_size)))
    assert torch.equal(torch.cat([own for own, _ in found]), vectors)
    merged = {key: value for _, own in found for key, value in own.items()}
    assert sum(len(own) for _, own in found) == len(state) == len(merged)
    for key, value in state.items():
        torch.testing.assert_close(merged[key], value)
