"""Training speed of the program, in pairs with the yardstick: one process, 2 threads, float32.

    python bench/training.py [--pairs 5] [--only 128]

The program runs as a user runs it, on prepared rows drawn as the yardstick draws its own; its
speed is the ms/it of its log, the loader's wait included. The two take turns, so that a machine
that slows down slows both, and what counts is the median of the pairs' ratios.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, output  # noqa: E402
from bench.yardstick import ROWS, Rows  # noqa: E402
from criteo.columns import FIRST_SPARSE, Columns
from criteo.meta_file import SPLITS, WITHOUT_VOCABULARY
from criteo.row_layout import Layout

NUM_ROWS, NUM_TESTED = 1 << 20, 1000
YARDSTICK = re.compile(r"([\d.]+) ms/it")
PROGRAM = re.compile(r"^Finished training .* ([\d.]+) ms/it", re.M)


@dataclass(frozen=True)
class Case:
    """A line of the table: shapes, the ratio to reach, steps of a run of each program."""

    name: str
    batch: int
    dim: int
    bottom: str
    top: str
    at_least: float
    steps: int


CASES = (
    Case("128, D 16, Kaggle", 128, 16, "13-512-256-64-16", "512-256-1", 1.5, 800),
    Case("2048, D 64, 8p", 2048, 64, "13-512-256-64", "512-512-256-1", 1.25, 40),
    Case("32768, D 64, 8p", 32768, 64, "13-512-256-64", "512-512-256-1", 1.8, 4),
)


@dataclass(frozen=True)
class Figures:
    """Medians of a case: ms a step of both, and of the pairs' ratios."""

    case: Case
    ours_ms: float
    yardstick_ms: float
    ratio: float


def make_rows(folder: Path, num_rows: int = NUM_ROWS) -> None:
    """Prepared rows in the data folder `folder`, drawn as the yardstick's."""
    drawn = Rows(num_rows)
    columns = np.concatenate([drawn.label[None], drawn.dense.T, drawn.sparse.T])
    write_prepared(folder / "kaggleAdDisplayChallenge_processed.prepared", columns, ROWS)


def write_prepared(folder: Path, columns: Columns, counts: Sequence[int]) -> None:
    """Prepared data as `prepared_data` describes it, to train on; some rows are tested on as well.

    Args:
        folder: to make.
        columns: (40, n) int32.
        counts: rows of each table.
    """
    largest = [*columns[:FIRST_SPARSE].max(1), *(count - 1 for count in counts)]
    layout = Layout.holding(largest)
    rows = layout.pack(columns)
    folder.mkdir(parents=True)
    rows.tofile(folder / "train.bin")
    write_meta(folder, layout, counts, len(rows))


def write_meta(folder: Path, layout: Layout, counts: Sequence[int], num_rows: int) -> None:
    """What makes prepared data of a folder that has `train.bin`, of which some rows are tested on.

    Args:
        folder: the folder.
        layout: of the rows in train.bin.
        counts: rows of each table.
        num_rows: in train.bin.
    """
    num_tested = min(num_rows, NUM_TESTED)
    with open(folder / "train.bin", "rb") as rows:
        (folder / "test.bin").write_bytes(rows.read(num_tested * layout.row_bytes))
    (folder / "val.bin").write_bytes(b"")
    meta = {
        "format": WITHOUT_VOCABULARY,  # which earlier checkouts read too
        "columns": layout.columns,
        "imported": True,  # from nowhere: no raw file and no flags to compare with
        "sources": [],
        "counts": [int(count) for count in counts],
        "rows_per_part": [num_rows, num_tested],
        "rows": dict(zip(SPLITS, (num_rows, num_tested, 0), strict=True)),
        "recipe": {
            "--data-set": "kaggle",
            "--max-ind-range": None,
            "--data-sub-sample-rate": None,
            "order on disk (--memory-map with --data-randomize)": "total",
            "--numpy-rand-seed": None,
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def yardstick_ms(case: Case) -> float:
    """Ms a step of the yardstick."""
    shapes = ["--dim", case.dim, "--bot", case.bottom, "--top", case.top]
    steps = ["--batch", case.batch, "--iters", case.steps, "--warmup", max(3, case.steps // 10)]
    text = output("bench/yardstick.py", "train", *shapes, *steps, "--threads", 2)
    return float(YARDSTICK.findall(text)[-1])


def our_ms(case: Case, data: Path, root: Path = ROOT) -> float:
    """Ms a step of the program in the checkout `root`, from the second of two log lines."""
    text = output(
        "dlrm_s_pytorch.py",
        f"--data_path={data}",
        "--memory-map",
        f"--arch-sparse-feature-size={case.dim}",
        f"--arch-mlp-bot={case.bottom}",
        f"--arch-mlp-top={case.top}",
        "--loss-function=bce",
        "--learning-rate=0.1",
        f"--mini-batch-size={case.batch}",
        f"--num-batches={2 * case.steps}",
        f"--print-freq={case.steps}",
        "--print-time",
        "--tensor-board-filename=",
        root=root,
    )
    return float(PROGRAM.findall(text)[-1])


def measure(case: Case, data: Path, num_pairs: int) -> Figures:
    """Both in turn, `num_pairs` times."""
    pairs = [(our_ms(case, data), yardstick_ms(case)) for _ in range(num_pairs)]
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return Figures(case, statistics.median(ours), statistics.median(theirs), ratio)


def line(figures: Figures) -> str:
    """A row of the table."""
    case = figures.case
    return (
        f"{case.name:<20} {figures.ours_ms:>9.2f} {figures.yardstick_ms:>13.2f}"
        f" {figures.ratio:>7.2f} {case.at_least:>9.2f}"
    )


HEADER = (
    f"{'batch, shapes':<20} {'ms a step':>9} {'yardstick, ms':>13} {'ratio':>7} {'at least':>9}"
)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each program a line")
    parser.add_argument("--only", type=int, default=0, help="one batch size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder))
        print(HEADER)
        for case in CASES:
            if options.only in (0, case.batch):
                print(line(measure(case, Path(folder), options.pairs)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
