"""Embedding bags as loops over ids; bags, and rows with gradients, to try them on."""

import numpy as np
import torch

from model.batch import Bags


def naive_vectors(weights, pooling, lists):
    """(B, T, D) sums over bags, id by id.

    Args:
        weights: (rows, D) of each table.
        pooling: (rows,) of each table.
        lists: [row][table] -> ids.
    """
    zeros = torch.zeros(weights[0].shape[1])
    return torch.stack(
        [
            torch.stack(
                [
                    sum((weights[table][i] * pooling[table][i] for i in ids), zeros)
                    for table, ids in enumerate(bags)
                ]
            )
            for bags in lists
        ]
    )


def draw_bags(num_rows, batch, one_each, seed=0):
    """(Bags, the same as lists: [row][table] -> ids) for tables of `num_rows` rows."""
    random = np.random.default_rng(seed)
    lists = [
        [random.integers(0, n, 1 if one_each else random.integers(0, 5)).tolist() for n in num_rows]
        for _ in range(batch)
    ]
    return bags_of(lists, one_each), lists


def bags_of(lists, one_each, ids_per_rank=None):
    """Bags of the rows in `lists`; ids_per_rank (ranks, T) if there are several ranks."""
    ids = torch.tensor([i for row in lists for bag in row for i in bag], dtype=torch.int64)
    if one_each:
        return Bags(ids)
    lengths = torch.tensor([[len(bag) for bag in row] for row in lists], dtype=torch.int64)
    if not lists:
        lengths = lengths.view(0, ids_per_rank.shape[1])
    return Bags(ids, lengths, ids_per_rank)


def parameters_of(state, num_rows):
    """(weights, pooling weights or ones) of tables in a state dict, as leaves of autograd."""
    weights = [state[f"emb_l.{t}.weight"].clone().requires_grad_() for t in range(len(num_rows))]
    pooling = [
        state.get(f"v_W_l.{t}", torch.ones(n)).clone().requires_grad_()
        for t, n in enumerate(num_rows)
    ]
    return weights, pooling


def draw_rows(num_rows, dim, size, seed):
    """`size` rows below num_rows, most of them several times, and their gradients (size, dim)."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(num_rows, (size,), generator=random)
    return rows, torch.randn(size, dim, generator=random)
