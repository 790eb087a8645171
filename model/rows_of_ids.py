"""Ids of tables as rows of a matrix that holds parts of the tables."""

import itertools
from collections.abc import Sequence

import torch

from model.batch import Bags
from ranks.placement import Part

# Ids whose rows other ranks have are looked up in rows of zeros at the matrix's end: there are
# several, because a GPU adds the gradients of one row one after the other.
SPARE_ROWS = 256


def shifts_of(parts: Sequence[Part]) -> list[int]:
    """What leads from a row of each part's matrix to its row if the parts lie below one another."""
    ends = itertools.accumulate(part.num_rows for part in parts)
    return [end - part.end for end, part in zip(ends, parts, strict=True)]


def is_plain(part: Part) -> bool:
    """Whether a part has all rows of a matrix, in the order of the ids."""
    return part.is_whole and part.matrix.divisor == 1 and not part.matrix.modulus


class RowsOfIds:
    """Turns ids of tables into rows of a matrix: (id // divisor) % modulus + shift.

    Args:
        parts: the P parts that the matrix holds, one below the other. If one of them is not whole,
            SPARE_ROWS rows come after them, for ids whose rows other ranks have.
        device: where the ids are.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        matrices = [part.matrix for part in parts]

        def tensor(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        self._num_parts = len(parts)
        self._numbers = {"shift": tensor(shifts_of(parts))}
        if any(matrix.divisor > 1 or matrix.modulus for matrix in matrices):
            most = torch.iinfo(torch.int64).max
            self._numbers["divisor"] = tensor([matrix.divisor for matrix in matrices])
            self._numbers["modulus"] = tensor([matrix.modulus or most for matrix in matrices])
        self._first_spare = sum(part.num_rows for part in parts)
        if not all(part.is_whole for part in parts):
            self._numbers["begin"] = tensor([part.begin for part in parts])
            self._numbers["end"] = tensor([part.end for part in parts])

    def __call__(self, bags: Bags) -> Bags:
        """Bags of ids, B rows of P parts -> the same bags with rows of the matrix."""
        if bags.lengths is None:
            return Bags(self._to_rows(bags.ids.view(-1, self._num_parts), self._numbers).view(-1))
        lengths, num_ids = bags.lengths, len(bags.ids)

        def of_each_id(of_parts: torch.Tensor) -> torch.Tensor:
            of_bags = of_parts.expand_as(lengths).reshape(-1)
            return torch.repeat_interleave(of_bags, lengths.reshape(-1), output_size=num_ids)

        numbers = {name: of_each_id(of_parts) for name, of_parts in self._numbers.items()}
        return Bags(self._to_rows(bags.ids, numbers), lengths)

    def _to_rows(self, ids: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Ids (n, P), or (n,) with numbers of each id -> rows of the same shape."""
        if "divisor" in numbers:
            ids = ids.div(numbers["divisor"], rounding_mode="floor").remainder(numbers["modulus"])
        rows = ids + numbers["shift"]
        if "begin" not in numbers:
            return rows
        is_here = (ids >= numbers["begin"]) & (ids < numbers["end"])
        spare = self._first_spare + torch.arange(len(ids), device=ids.device) % SPARE_ROWS
        return torch.where(is_here, rows, spare.view(-1, *[1] * (ids.dim() - 1)))
