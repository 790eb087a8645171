"""Initial values of tables: from one stream for all of them, or from streams of their own."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ranks.placement import Matrix, Part

VALUES_PER_DRAW = 1 << 22  # drawn at a time; seeded values depend on it, so it stays
Held = Sequence[tuple[Part, torch.Tensor]]


def draw_in_order(matrices: Iterable[tuple[Matrix, Held]]) -> None:
    """Draw uniform(-bound, bound) for one matrix after the other from numpy's global generator.

    The numbers are the original's. All of them are drawn, whoever holds them, a piece at a time.

    Args:
        matrices: (matrix, the (part, view of its rows) that this rank holds).
    """
    for matrix, held in matrices:
        for begin, size in _pieces(matrix):
            values = np.random.uniform(low=-matrix.bound, high=matrix.bound, size=size)
            for own, rows in _overlaps(held, begin, size[0]):
                own.copy_(torch.from_numpy(values[rows].astype(np.float32)))


def draw_seeded(matrices: Iterable[tuple[Matrix, Held]], seed: int) -> None:
    """Draw uniform(-bound, bound) for the rows that this rank holds, on the device that has them.

    Each matrix is cut into pieces of a fixed number of rows, and each piece has a generator of its
    own. So the numbers depend on the seed, the matrix and the kind of device alone, and no rank
    draws more than what it holds and the rest of the pieces at its ends.

    Args:
        matrices: (matrix, the (part, view of its rows) that this rank holds).
        seed: that of the run.
    """
    place, table = 0, -1  # of the matrix in its table
    for matrix, held in matrices:
        place, table = (place + 1 if matrix.table == table else 0), matrix.table
        for number, (begin, size) in enumerate(_pieces(matrix)):
            for own, rows in _overlaps(held, begin, size[0]):
                own_seed = _seed_of(seed, table, place, number)
                _draw_piece(matrix.bound, own_seed, size, own, rows)


def _draw_piece(
    bound: float, seed: int, size: tuple[int, int], own: torch.Tensor, rows: slice
) -> None:
    """Draw a piece of that size, of which `own` gets those rows; in place if these are all."""
    generator = torch.Generator(device=own.device)
    generator.manual_seed(seed)
    if len(own) == size[0]:
        own.uniform_(-bound, bound, generator=generator)
    else:
        own.copy_(own.new_empty(size).uniform_(-bound, bound, generator=generator)[rows])


def _seed_of(*numbers: int) -> int:
    """A seed for torch made of several numbers, as numpy spreads them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _pieces(matrix: Matrix) -> Iterator[tuple[int, tuple[int, int]]]:
    """(first row, shape) of each piece of a matrix."""
    num_rows = max(1, VALUES_PER_DRAW // matrix.dim)
    for begin in range(0, matrix.num_rows, num_rows):
        yield begin, (min(num_rows, matrix.num_rows - begin), matrix.dim)


def _overlaps(held: Held, begin: int, num_rows: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """(this rank's rows, where they are in the piece) of parts that share rows with a piece.

    Args:
        held: (part, view of its rows).
        begin: first row of the piece.
        num_rows: its rows.
    """
    for part, view in held:
        first, last = max(begin, part.begin), min(begin + num_rows, part.end)
        if first < last:
            own = view[first - part.begin : last - part.begin]
            yield own, slice(first - begin, last - begin)
