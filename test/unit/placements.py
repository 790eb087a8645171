"""Placements of all kinds, and models placed so, for what must not depend on where rows are."""

import common.compiled  # noqa: F401  (before torch: both use the same threads)

# isort: split
import torch

from common.shares import split_evenly
from engine.model_file import ModelState
from model.embedding_tables import EmbeddingTables, PoolingWeights
from model.static_exchange import StaticExchange
from optim.dense import make_dense_optimizer
from ranks.placement import EVERY_RANK, Part, Placement, place_tables


def on_every_rank(matrix):
    return [Part(matrix, 0, matrix.num_rows, EVERY_RANK)]


def whole_on(rank):
    return lambda matrix: [Part(matrix, 0, matrix.num_rows, rank)]


def cut_over(ranks):
    """Cuts rows evenly over these ranks, in their order; a small matrix has none for the last."""

    def cut(matrix):
        parts, begin = [], 0
        for rank, size in zip(ranks, split_evenly(matrix.num_rows, len(ranks)), strict=True):
            if size:
                parts.append(Part(matrix, begin, begin + size, rank))
            begin += size
        return parts

    return cut


def uneven_over(ranks):
    """Each rank but the last has one row more than those before it together; the last the rest."""

    def cut(matrix):
        parts, begin = [], 0
        for k, rank in enumerate(ranks):
            end = matrix.num_rows if rank == ranks[-1] else min(begin + 2**k, matrix.num_rows)
            if end > begin:
                parts.append(Part(matrix, begin, end, rank))
            begin = end
        return parts

    return cut


def placed(tables, world_size, ways):
    """A placement: the ways take turns with the matrices that are looked up."""
    matrices = [matrix for table in tables for matrix in table.matrices]
    looked_up = [matrix for matrix in matrices if matrix.is_looked_up]
    parts = [
        part
        for matrix in matrices
        for part in (
            ways[looked_up.index(matrix) % len(ways)](matrix)
            if matrix.is_looked_up
            else on_every_rank(matrix)
        )
    ]
    return Placement(tuple(parts), world_size)


def whole(tables, world_size):
    return place_tables(tables, world_size)


def cut(tables, world_size):
    return placed(tables, world_size, [cut_over(range(world_size))])


def shared(tables, world_size):
    return placed(tables, world_size, [on_every_rank])


def mixed(tables, world_size):
    """Cut over all ranks, whole, on every rank, cut over some of them."""
    last = world_size - 1
    some = cut_over(range(1, world_size)) if last else whole_on(0)
    ways = [cut_over(range(world_size)), whole_on(last), on_every_rank, some, whole_on(0)]
    return placed(tables, world_size, ways)


def odd(tables, world_size):
    """The first rows are on the last rank, or on one in the middle, and parts are uneven."""
    ranks = list(range(world_size))
    backwards, turned = ranks[::-1], [*ranks[world_size // 2 :], *ranks[: world_size // 2]]
    return placed(tables, world_size, [uneven_over(backwards), cut_over(turned), on_every_rank])


PLACEMENTS = {"whole": whole, "cut": cut, "shared": shared, "mixed": mixed, "odd": odd}
MOVES = [  # from a placement to another one
    ("whole", "cut"),
    ("cut", "odd"),
    ("odd", "shared"),
    ("shared", "mixed"),
    ("mixed", "whole"),
]


class Model(torch.nn.Module):
    """Tables and a dense layer under the names of the program's model."""

    def __init__(self, tables):
        super().__init__()
        self.emb_l, self.top_l = tables, torch.nn.Linear(3, 2)
        torch.nn.init.constant_(self.top_l.weight, 0.5)  # threads would share a generator
        torch.nn.init.constant_(self.top_l.bias, 0.25)
        if tables.learned_pooling:
            self.v_W_l = PoolingWeights(tables)


def state_on(process, place, tables, optimizer, learned=False):
    """What a rank saves of a model with such tables, which are placed so; it is not trained."""
    exchange = StaticExchange(process, tables, place(tables, process.world_size))
    own = EmbeddingTables(tables, exchange, optimizer, learned)
    model = Model(own)
    return ModelState(
        process=process,
        model=model,
        tables=own,
        dense_optimizer=make_dense_optimizer(optimizer, list(model.parameters()), 0.1, False),
        optimizer_name=optimizer,
        num_epochs=1,
        num_batches=10,
        num_test_batches=0,
    )


def fill(tables):
    """Give all rows of a rank numbers that tell their matrix, tensor and row."""
    for name in ("weight", "sum", "momentum", "pooling", "pooling.sum"):
        for part, view in tables.held_parts(name):
            own = sum(map(ord, part.matrix.key + name)) * 1000
            rows = torch.arange(own + part.begin, own + part.end)
            view.copy_(rows.view(-1, *[1] * (view.dim() - 1)))


def held(tables):
    """{(key of the matrix, name of the tensor, first row): a rank's rows of it}."""
    return {
        (part.matrix.key, name, part.begin): view.clone()
        for name in ("weight", "sum", "momentum", "pooling", "pooling.sum")
        for part, view in tables.held_parts(name)
    }
