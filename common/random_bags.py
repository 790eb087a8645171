"""Rows of random and synthetic data, and where the bags of each table come from."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from common.bag_kernels import (
    Bags,
    Doubles,
    Floats,
    Ids,
    Ints,
    Normal,
    Size,
    Stream,
    draw_gaussian,
    draw_traced,
    draw_uniform,
    keep_distinct,
    place_by_row,
)
from common.errors import UserError
from common.stack_distances import StackDistances

ROOM = 1 << 16  # draws that are sorted at a time: they stay in the second cache


class BagSource(Protocol):
    """Draws the bags of one table.

    Attributes:
        size: how many draws make a bag.
        most_ids: the most ids of a bag.
        num_rows: of the table.
        dtype: of the numbers that are drawn.
    """

    size: Size
    most_ids: int
    num_rows: int
    dtype: type[np.int64 | np.float64]

    def draw(self, stream: Stream, values: npt.NDArray[Any], lengths: Ids, table: int) -> None:
        """Draw the next bags.

        Args:
            stream: where random numbers come from.
            values: (R, size.most) written: the draws of each bag, then numbers that sort last.
            lengths: (R,) written: how many draws each bag has.
            table: the number of this table, for messages.
        """


class UniformBags:
    """Bags of a table in which all rows are equally likely.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
    """

    dtype = np.int64

    def __init__(self, num_rows: int, size: Size) -> None:
        self.size, self.most_ids, self.num_rows = size, min(size.most, num_rows), num_rows

    def draw(self, stream: Stream, values: Ints, lengths: Ids, table: int) -> None:
        """Draw the next bags, as BagSource says."""
        draw_uniform(stream, self.size, self.num_rows, values, lengths)


class GaussianBags:
    """Bags of a table whose ids are normal numbers, cut at both ends and to whole numbers.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
        normal: the distribution.
    """

    dtype = np.float64

    def __init__(self, num_rows: int, size: Size, normal: Normal) -> None:
        self.size, self.most_ids, self.num_rows = size, size.most, num_rows
        self._normal = normal
        self._may_be_outside = normal.minimum <= -1 or normal.maximum >= num_rows

    def draw(self, stream: Stream, values: Doubles, lengths: Ids, table: int) -> None:
        """Draw the next bags, as BagSource says.

        Raises:
            UserError: an id lies outside the table.
        """
        draw_gaussian(stream, self.size, self._normal, values, lengths)
        if not self._may_be_outside:
            return
        outside = values[(values <= -1) | ((values >= self.num_rows) & (values < np.inf))]
        if len(outside):
            raise UserError(
                f"gaussian data drew id {np.trunc(outside.min()):.16g} for table {table} of"
                f" {self.num_rows} rows: let --rand-data-min and --rand-data-max lie inside"
                " every table"
            )


class TracedBags:
    """Bags of a table that follow a trace's stack distances.

    Args:
        num_rows: rows of the table.
        size: how many draws make a bag.
        trace: the trace's profile.
    """

    dtype = np.int64

    def __init__(self, num_rows: int, size: Size, trace: StackDistances) -> None:
        self.num_rows, self._profile = num_rows, trace.profile(size.most)
        self.size, self.most_ids = size, min(size.most, len(self._profile.ids))

    def draw(self, stream: Stream, values: Ints, lengths: Ids, table: int) -> None:
        """Draw the next bags, as BagSource says; warns if an id lies beyond the table."""
        if draw_traced(stream, self.size, self._profile, values, lengths) >= self.num_rows:
            rows = self.num_rows
            message = f"the trace of table {table} has ids beyond its {rows} rows: taken modulo"
            warnings.warn(message, stacklevel=2)


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
        stream: where the numbers come from.
        sources: those of the tables.
        num_rows: rows of the batch.
        num_dense: m, dense features of a row.
        kept: (begin, end) of the rows that are kept; the others cost no memory.
        round_targets: make targets 0 or 1.

    Raises:
        UserError: an id lies outside its table.
    """
    begin, end = kept
    dense = stream.random.random((num_rows, num_dense)).astype(np.float32)
    bags = Bags(
        lengths=np.empty((len(sources), num_rows), np.int32),
        ids=np.empty((end - begin) * sum(source.most_ids for source in sources), np.int32),
        ends=np.zeros(len(sources) + 1, np.int64),
        kept=np.array(kept, np.int64),
    )
    for table, source in enumerate(sources):
        _draw_table(stream, source, bags, table)
    targets = stream.random.random(num_rows).astype(np.float32)[begin:end]
    return DrawnRows(dense[begin:end], np.round(targets) if round_targets else targets, bags)


def _draw_table(stream: Stream, source: BagSource, bags: Bags, table: int) -> None:
    """Draw a table's bags, some rows at a time: numpy sorts many bags in one call."""
    most, of_table = source.size.most, bags.lengths[table]
    room = np.empty((min(len(of_table), max(1, ROOM // most)), most), source.dtype)
    end = bags.ends[table]
    for begin in range(0, len(of_table), len(room)):
        lengths = of_table[begin : begin + len(room)]
        values = room[: len(lengths)]
        source.draw(stream, values, lengths, table)
        if most > 1:  # numpy would take 20 ns a row to find nothing to sort
            values.sort(axis=1)
        kept = int(bags.kept[0]) - begin, int(bags.kept[1]) - begin
        end += keep_distinct(values, lengths, kept, source.num_rows, bags.ids[end:])
    bags.ends[table + 1] = end
