"""Ids of tables as rows of a matrix that holds parts of the tables."""

import itertools
from collections.abc import Sequence

import torch

from model.batch import Bags
from ranks.placement import Part


class RowsOfIds:
    """Turns ids of tables into rows of a matrix: (id // divisor) % modulus + offset.

    Args:
        parts: the P parts that the matrix holds, one below the other.
        device: where the ids are.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self._num_parts = len(parts)
        ends = itertools.accumulate(part.num_rows for part in parts)
        numbers = [[end - part.end for end, part in zip(ends, parts, strict=True)]]
        if any(part.divisor > 1 or part.modulus for part in parts):
            numbers.append([part.divisor for part in parts])
            numbers.append([part.modulus or torch.iinfo(torch.int64).max for part in parts])
        # for each part: its offset and, where ids share rows, its divisor and its modulus
        self._numbers = [
            torch.tensor(of_parts, dtype=torch.int64, device=device) for of_parts in numbers
        ]

    def __call__(self, bags: Bags) -> Bags:
        """Bags of ids, B rows of P parts -> the same bags with rows of the matrix."""
        if not self._num_parts:
            return Bags(bags.ids.long(), bags.lengths)
        if bags.lengths is None:
            return Bags(_to_rows(bags.ids.view(-1, self._num_parts), *self._numbers).view(-1))
        lengths, num_ids = bags.lengths, len(bags.ids)

        def of_each_id(of_parts: torch.Tensor) -> torch.Tensor:
            of_bags = of_parts.expand_as(lengths).reshape(-1)
            return torch.repeat_interleave(of_bags, lengths.reshape(-1), output_size=num_ids)

        return Bags(_to_rows(bags.ids, *map(of_each_id, self._numbers)), lengths)


def _to_rows(
    ids: torch.Tensor,
    offsets: torch.Tensor,
    divisors: torch.Tensor | None = None,
    moduli: torch.Tensor | None = None,
) -> torch.Tensor:
    if divisors is None or moduli is None:
        return ids + offsets
    return ids.div(divisors, rounding_mode="floor").remainder(moduli) + offsets
