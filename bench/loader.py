"""The loader alone, on prepared rows that the page cache holds: compact blocks, ready tensors.

    python bench/loader.py [--rows 4000000] [--batch 32768]

Blocks are what the loader gives and what travels to a device; tensors are what `decode` makes of
them on the CPU: logarithms in float32, ids in int64, labels in float32. Lines of random data, which
is drawn while steps run, come from bench/random_data.py.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from criteo.columns import NUM_DENSE, Columns
from criteo.demo import NUM_VALUES
from criteo.prepared import Prepared
from devices.threads import set_up_threads
from dlrm_data_pytorch import NUM_CARD_READERS, CriteoDataset, load_batches, open_criteo_split
from ranks.process import Process

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench import random_data  # noqa: E402
from bench.common import HEADER, row  # noqa: E402
from bench.training import write_prepared  # noqa: E402

PASSES, RANKS, WORKERS = 9, 8, 2
BLOCKS, TENSORS = "20,000,000", "3,000,000"  # rows/s wanted
COUNTS = np.minimum(NUM_VALUES, 10_000_000)


def draw(num_rows: int) -> Columns:
    """Columns (40, n) int32 as wide on disk as Criteo's."""
    random = np.random.default_rng(1)
    limits = [2, *[1 << 16] * NUM_DENSE, *COUNTS]
    return np.stack([random.integers(0, limit, num_rows, dtype=np.int32) for limit in limits])


def make(folder: Path, num_rows: int) -> Prepared:
    """Prepared data, just written and so in the page cache."""
    write_prepared(folder, draw(num_rows), COUNTS.tolist())
    return Prepared.from_meta(folder, json.loads((folder / "meta.json").read_text()))


def split(prepared: Prepared, batch: int, rank: int = 0, world_size: int = 1) -> CriteoDataset:
    """The training rows of a rank, mapped."""
    process = Process(rank, world_size, 0, torch.device("cpu"), "gloo")
    return open_criteo_split(prepared, "train", batch, process, None, in_memory=False)


def speed(data: CriteoDataset, num_workers: int, decode: bool) -> float:
    """Rows/s of the median pass; the first one, in which workers start, does not count."""
    numbers = list(range(len(data))) * (1 + PASSES)
    rows, ends = 0, []
    for number, batch in enumerate(
        load_batches(data, numbers, num_workers, torch.device("cpu")), 1
    ):
        rows += batch.num_rows
        if decode:
            batch.decode()
        if number % len(data) == 0:
            ends.append(time.perf_counter())
    return rows / (1 + PASSES) / statistics.median(np.diff(ends))


def speed_of_ranks(prepared: Prepared, batch: int) -> float:
    """Rows/s of a rank of many, the median of all; together they read each row once."""
    rows, speeds = 0, []
    for rank in range(RANKS):
        data = split(prepared, batch, rank, RANKS)
        speeds.append(speed(data, 0, decode=False))
        rows += data.num_rows_read
    wanted = (1 + PASSES) * sum(prepared.rows_per_part[:-1])
    if rows != wanted:
        raise SystemExit(f"{RANKS} ranks read {rows} rows, expected {wanted}")
    return statistics.median(speeds)


def lines(prepared: Prepared, batch: int) -> Iterator[str]:
    """Lines of the table, each as soon as it is measured."""
    data = split(prepared, batch)
    for decode, what, wanted in ((False, "blocks", BLOCKS), (True, "tensors", TENSORS)):
        for num_workers, maker in ((0, "a thread"), (WORKERS, f"{WORKERS} workers")):
            found = f"{speed(data, num_workers, decode):,.0f}"
            yield row(f"loader, {what} by {maker}, rows/s", found, wanted=wanted)
    data.num_readers = NUM_CARD_READERS
    found = f"{speed(data, 0, decode=False):,.0f}"
    yield row(f"loader, blocks by {NUM_CARD_READERS} threads, rows/s", found)
    found = f"{speed_of_ranks(prepared, batch):,.0f}"
    yield row(f"loader, blocks, a rank of {RANKS}, rows/s", found)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000_000, help="to read in a pass")
    parser.add_argument("--batch", type=int, default=32768, help="rows of a batch")
    options = parser.parse_args()
    torch.set_num_threads(2)
    set_up_threads(2)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepared = make(Path(folder) / "prepared", options.rows)
        for line in itertools.chain(
            lines(prepared, options.batch), random_data.lines(Path(folder))
        ):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
