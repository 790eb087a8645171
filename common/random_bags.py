"""Rows of random and synthetic data, and where the bags of each table come from."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from common.bag_kernels import (
    Bags,
    Floats,
    Ids,
    Normal,
    Size,
    Stream,
    draw_floats,
    draw_gaussian,
    draw_traced,
    draw_uniform,
    place_by_row,
)
from common.errors import UserError
from common.stack_distances import StackDistances


class BagSource(Protocol):
    """Draws the bags of one table.

    Attributes:
        size: how many draws make a bag.
        most_ids: the most ids of a bag.
    """

    size: Size
    most_ids: int

    def draw(self, stream: Stream, bags: Bags, table: int) -> None:
        """Draw this table's bags of a batch, whose earlier tables are drawn."""


class UniformBags:
    """Bags of a table in which all rows are equally likely.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
    """

    def __init__(self, num_rows: int, size: Size) -> None:
        self.size, self.most_ids, self._num_rows = size, min(size.most, num_rows), num_rows

    def draw(self, stream: Stream, bags: Bags, table: int) -> None:
        """Draw this table's bags of a batch, whose earlier tables are drawn."""
        draw_uniform(stream, bags, table, self.size, self._num_rows)


class GaussianBags:
    """Bags of a table whose ids are normal numbers, cut at both ends and to whole numbers.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
        normal: the distribution.
    """

    def __init__(self, num_rows: int, size: Size, normal: Normal) -> None:
        self.size, self.most_ids = size, size.most
        self._num_rows, self._normal = num_rows, normal

    def draw(self, stream: Stream, bags: Bags, table: int) -> None:
        """Draw this table's bags of a batch, whose earlier tables are drawn.

        Raises:
            UserError: an id lies outside the table.
        """
        outside = draw_gaussian(stream, bags, table, self.size, self._normal, self._num_rows)
        if outside:
            raise UserError(
                f"gaussian data drew id {np.trunc(outside):.16g} for table {table} of"
                f" {self._num_rows} rows: let --rand-data-min and --rand-data-max lie inside"
                " every table"
            )


class TracedBags:
    """Bags of a table that follow a trace's stack distances.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
        trace: the trace's profile.
    """

    def __init__(self, num_rows: int, size: Size, trace: StackDistances) -> None:
        self._num_rows, self._profile = num_rows, trace.profile(size.most)
        self.size, self.most_ids = size, min(size.most, len(self._profile.ids))

    def draw(self, stream: Stream, bags: Bags, table: int) -> None:
        """Draw this table's bags of a batch; warns if the trace has ids beyond the table."""
        if draw_traced(stream, bags, table, self.size, self._profile, self._num_rows):
            rows = self._num_rows
            message = f"the trace of table {table} has ids beyond its {rows} rows: taken modulo"
            warnings.warn(message, stacklevel=2)


def most_draws(sources: Sequence[BagSource]) -> int:
    """The most draws of a bag of any table."""
    return max(source.size.most for source in sources)


class DrawnRows(NamedTuple):
    """A batch of B rows, of which some are kept.

    Attributes:
        dense: (kept rows, m) float32.
        targets: (kept rows,) float32.
        bags: the lengths of all bags, and the ids of the rows that are kept.
    """

    dense: Floats
    targets: Floats
    bags: Bags

    def block(self) -> Ids:
        """The rows that are kept as model/batch.py's BagBatch wants them in one int32 array."""
        bags = self.bags
        begin, end = bags.kept
        lengths = bags.lengths[:, begin:end].T
        sizes = (self.dense.size, self.targets.size, lengths.size, bags.ends[-1])
        block = np.empty(sum(int(size) for size in sizes), np.int32)
        dense, targets, of_bags, ids = np.split(block, np.cumsum(sizes[:-1]))
        dense[:] = self.dense.reshape(-1).view(np.int32)
        targets[:] = self.targets.view(np.int32)
        of_bags.reshape(lengths.shape)[:] = lengths
        place_by_row(bags, ids)
        return block


def draw_rows(
    stream: Stream,
    sources: Sequence[BagSource],
    num_rows: int,
    num_dense: int,
    kept: tuple[int, int],
    round_targets: bool,
) -> DrawnRows:
    """The next batch of a stream: dense features, bags table by table, targets.

    Args:
        stream: where the numbers come from; it has room for the draws of a bag.
        sources: those of the tables.
        num_rows: rows of the batch.
        num_dense: m, dense features of a row.
        kept: (begin, end) of the rows that are kept; the others cost no memory.
        round_targets: make targets 0 or 1.

    Raises:
        UserError: an id lies outside its table.
    """
    begin, end = kept
    dense = _floats(stream, num_rows * num_dense).reshape(num_rows, num_dense)
    bags = Bags(
        lengths=np.empty((len(sources), num_rows), np.int32),
        ids=np.empty((end - begin) * sum(source.most_ids for source in sources), np.int32),
        ends=np.zeros(len(sources) + 1, np.int64),
        kept=np.array(kept, np.int64),
        values=np.empty(most_draws(sources)),
    )
    for table, source in enumerate(sources):
        source.draw(stream, bags, table)
    targets = _floats(stream, num_rows)[begin:end]
    return DrawnRows(dense[begin:end], np.round(targets) if round_targets else targets, bags)


def _floats(stream: Stream, count: int) -> Floats:
    numbers: npt.NDArray[np.float32] = np.empty(count, np.float32)
    draw_floats(stream, numbers)
    return numbers
