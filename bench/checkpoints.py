"""What a checkpoint costs beside torch.save and torch.load of the same tensors.

    python bench/checkpoints.py [--gb 1] [--pairs 3] [--folder DIR]

The yardstick writes one file with torch.save, syncs it, and reads it with torch.load. Ours has
checksums and 64 MB files as well. The copy is what steps wait for if a checkpoint is written while
training goes on; the first one is that of memory which nobody has touched. Figures are medians.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import HEADER, row  # noqa: E402
from checkpoints.folder import CheckpointFolder  # noqa: E402
from checkpoints.index import Index  # noqa: E402
from checkpoints.matrices import WEIGHT, HeldRows, MatrixShape, Shard  # noqa: E402
from checkpoints.shard_file import read_tensors  # noqa: E402
from checkpoints.writer import CopiedRows, write_rows  # noqa: E402

DIM = 64


def seconds(work: Callable[[], object]) -> float:
    """How long the work takes, when the disk has done all that came before."""
    os.sync()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Costs:
    """A table of a model, its checkpoint and its yardstick's file.

    Args:
        folder: where both go.
        num_bytes: of the table.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self._folder, num_rows = folder, num_bytes // (4 * DIM)
        self._table = torch.rand(num_rows, DIM)
        self._shape = MatrixShape(num_rows, {WEIGHT: (DIM,)})
        self._rows = [HeldRows(Shard("emb_l.0.weight", 0, num_rows), {WEIGHT: self._table}, False)]
        self.checkpoints = CheckpointFolder(folder / "checkpoints", keep=1)

    def save(self) -> None:
        """Save a checkpoint between two steps."""
        partial = self.checkpoints.begin(0)
        written = write_rows(partial, 0, self._rows)
        assert not written.trouble, written.trouble
        index = Index({}, {}, {"emb_l.0.weight": self._shape}, written.files, {})
        self.checkpoints.publish(partial, index)

    def load(self) -> None:
        """Read the newest checkpoint into the table."""
        path = self.checkpoints.checkpoints()[0].path
        for file in Index.read(path).files:
            tensors = read_tensors(path / file.name, file.facts)
            for shard in file.shards:
                self._rows[0].copy_from(shard, tensors)

    def torch_save(self) -> None:
        """Save the table as the yardstick does."""
        with open(self._folder / "yardstick.pth", "wb") as file:
            torch.save({"emb_l.0.weight": self._table}, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load(self) -> None:
        """Read it as the yardstick does."""
        found = torch.load(self._folder / "yardstick.pth", weights_only=True)
        self._table.copy_(found["emb_l.0.weight"])

    def copies(self) -> tuple[float, float]:
        """Seconds of the first copy between two steps, and of the second."""
        copied = CopiedRows()
        return seconds(lambda: copied.take(self._rows)), seconds(lambda: copied.take(self._rows))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the table")
    parser.add_argument("--pairs", type=int, default=3, help="repetitions")
    parser.add_argument("--folder", help="where files go; default: the system's for such files")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        costs = Costs(folder, int(1e9 * options.gb))
        with costs.checkpoints.opened():
            lines(costs, options)
    finally:
        shutil.rmtree(folder)
    return 0


def lines(costs: Costs, options: argparse.Namespace) -> None:
    """Measure, and print a line for each measurement."""
    print(HEADER)
    size = f"{options.gb:g} GB"
    for what, ours, yardstick in (
        (f"save {size} between steps, s", costs.save, costs.torch_save),
        (f"read {size}, s", costs.load, costs.torch_load),
    ):
        seconds(ours), seconds(yardstick)  # makes files, and fills the system's cache
        pairs = []
        for number in range(options.pairs):  # now one is first, now the other
            works = (ours, yardstick) if number % 2 else (yardstick, ours)
            pairs.append(tuple(map(seconds, works))[:: 1 if number % 2 else -1])
        own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(row(what, f"{own:.2f}", f"{other:.2f}", f"{ratio:.2f}"), flush=True)
    firsts, seconds_ones = zip(*(costs.copies() for _ in range(options.pairs)), strict=True)
    print(row(f"first copy of {size}, s", f"{statistics.median(firsts):.2f}"))
    print(row("later copies, s", f"{statistics.median(seconds_ones):.2f}"))


if __name__ == "__main__":
    sys.exit(main())
