"""Which share of a batch's ids falls on the parts of a table that is cut by rows.

    python bench/capacity.py [--rows=1000000]

An exchange that routes ids with messages of fixed sizes needs room for the most ids that a part
may get. Ids are those of the demo's largest columns, and of values whose frequency falls as
1 / n^s, all numbered by first appearance, as preparation does. Batches are of shuffled rows, and of
rows in the order in which the ids were numbered, as --data-randomize=none takes them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import row
from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE
from criteo.demo import NUM_VALUES, ROWS_PER_DRAW, PlantedModel

Ints = npt.NDArray[np.int64]
BATCH, NUM_ROWS = 32768, 1 << 20
PARTS = (2, 4, 8)
NUM_COLUMNS = 3  # of the demo: the largest
ZIPF_VALUES, ZIPF_EXPONENTS = 40_000_000, (1.05, 1.2)


def number_by_first_appearance(values: npt.NDArray[np.generic]) -> Ints:
    """Values (n,) -> ids 0, 1, 2, ... in the order in which the values first come."""
    _, first, places = np.unique(values, return_index=True, return_inverse=True)
    ids = np.empty(len(first), np.int64)
    ids[np.argsort(first)] = np.arange(len(first))
    return ids[places]


def demo_columns(num_rows: int) -> dict[str, Ints]:
    """Ids of the demo's largest columns."""
    model, columns = PlantedModel(1), np.argsort(-NUM_VALUES)[:NUM_COLUMNS]
    pieces = []
    for begin in range(0, num_rows, ROWS_PER_DRAW):
        _, hashed, missing, _ = model.draw(min(ROWS_PER_DRAW, num_rows - begin))
        pieces.append(np.where(missing[:, FIRST_SPARSE:], 0, hashed)[:, columns])
    values = np.concatenate(pieces)
    return {
        f"demo, column {column}": number_by_first_appearance(values[:, k])
        for k, column in enumerate(columns)
    }


def zipf_ids(exponent: float, num_rows: int) -> Ints:
    """Ids of values n = 1, 2, ... with a probability near 1 / n^exponent; the exponent is not 1."""
    uniform, power = np.random.default_rng(1).random(num_rows), 1 - exponent
    values = ((ZIPF_VALUES**power - 1) * uniform + 1) ** (1 / power)
    return number_by_first_appearance(values.astype(np.int64))


def shares(parts: Ints, num_parts: int, batch: int) -> npt.NDArray[np.float64]:
    """The share of each batch's ids that falls on each part: (whole batches, parts).

    Args:
        parts: the part of each id, in the rows' order.
        num_parts: number of parts.
        batch: rows of a batch.
    """
    num_batches = len(parts) // batch
    numbers = np.arange(num_batches * batch) // batch
    cells = numbers * num_parts + parts[: num_batches * batch]
    counts = np.bincount(cells, minlength=num_batches * num_parts)
    return counts.reshape(num_batches, num_parts) / batch


def column_lines(name: str, ids: Ints, batch: int) -> Iterator[str]:
    """A line for each number of parts that a table may be cut into."""
    num_rows = int(ids.max()) + 1
    shuffled = np.random.default_rng(0).permutation(ids)
    for count in PARTS:
        ends = np.cumsum(split_evenly(num_rows, count))
        found, in_order = (
            shares(np.searchsorted(ends, one, side="right"), count, batch)
            for one in (shuffled, ids)
        )
        dealt = shares(shuffled % count, count, batch).max()
        fullest = found[:, found.mean(0).argmax()]
        largest = found.max()
        vectors = f"{dealt:6.1%}  {count} {count * largest:5.2f} {found.max(0).sum():5.2f}"
        what = f"{name}, {num_rows:,} rows, {count} parts"
        yield row(what, f"{fullest.mean():.1%}", f"{largest:.1%}", f"{in_order.max():.1%}", vectors)


def lines(num_rows: int = NUM_ROWS, batch: int = BATCH) -> Iterator[str]:
    """The table."""
    yield f"shares of {batch:,} ids that fall on the fullest part; {num_rows:,} ids"
    yield "vectors for an id: all parts answer, one capacity for all parts, one for each (shuffled)"
    yield row("", "mean", "largest", "ordered", "id % k  vectors")
    columns = demo_columns(num_rows)
    columns |= {f"1 / n^{one}": zipf_ids(one, num_rows) for one in ZIPF_EXPONENTS}
    for name, ids in columns.items():
        yield from column_lines(name, ids, batch)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="ids to draw")
    for line in lines(parser.parse_args().rows):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
