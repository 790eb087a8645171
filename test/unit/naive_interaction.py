"""The dot interaction as loops over pairs, and numbers to try it on."""

import torch


def naive(dense, pooled, itself):
    """Row by row, pair by pair."""
    rows = []
    for first, others in zip(dense, pooled, strict=True):
        vectors = [first, *others]
        pairs = [
            vectors[i] @ vectors[j]
            for i in range(len(vectors))
            for j in range(i + 1 if itself else i)
        ]
        rows.append(torch.cat([first, torch.stack(pairs)]))
    width = dense.shape[1] + num_pairs(pooled.shape[1], itself)
    return torch.stack(rows) if rows else (dense.sum() + pooled.sum()).expand(0, width)


def num_pairs(num_tables, itself):
    return (num_tables + 1) * (num_tables + 2 if itself else num_tables) // 2


def draw(shape):
    rows, num_tables, dim = shape
    random = torch.Generator().manual_seed(3)
    dense = torch.randn(rows, dim, generator=random)
    return dense, torch.randn(rows, num_tables, dim, generator=random)
