"""Compressed tables as their papers define them, id by id, with autograd's dense gradients."""

import torch

KINDS = {
    "qr_mult": "--qr-flag --qr-threshold=5",
    "qr_add": "--qr-flag --qr-threshold=5 --qr-operation=add --qr-collisions=7",
    "qr_concat": "--qr-flag --qr-threshold=10 --qr-operation=concat",
    "md": "--md-flag --md-threshold=2 --md-temperature=0.5",
    "md_round": "--md-flag --md-threshold=10 --md-temperature=1 --md-round-dims",
}


def vector(state, table, ids, operation, collisions):
    """The vector of one bag: a list of ids of one table.

    arXiv 1909.02107, section 3 (quotient and remainder); arXiv 1909.11810, equation 3 (a matrix P
    projects the narrow vectors to the dimension that all tables share).

    Args:
        state: the tensors of all tables by their keys.
        table: number of the table.
        ids: the bag.
        operation: mult, add or concat.
        collisions: ids that share a quotient.
    """
    key = f"{table}.weight"
    if key in state:
        return total(state[key], ids)
    if f"{key}_q" in state:
        quotient = total(state[f"{key}_q"], [i // collisions for i in ids])
        remainder = total(state[f"{key}_r"], [i % collisions for i in ids])
        if operation == "concat":
            return torch.cat([quotient, remainder])
        return quotient * remainder if operation == "mult" else quotient + remainder
    narrow = total(state[f"{table}.embs.weight"], ids)
    projection = state.get(f"{table}.proj.weight")
    return narrow if projection is None else projection @ narrow


def total(weight, ids):
    return sum((weight[i] for i in ids), torch.zeros(weight.shape[1]))


def vectors(state, lists, options):
    """(B, T, D) for lists [row][table] -> ids."""
    rows = [
        [
            vector(state, table, ids, options.qr_operation, options.qr_collisions)
            for table, ids in enumerate(bags)
        ]
        for bags in lists
    ]
    return torch.stack([torch.stack(row) for row in rows])
