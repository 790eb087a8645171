"""Compressed tables beside plain ones on the demo data: rows, bytes, ms a step and test AUC.

    python bench/compressed.py [--rows 1500000] [--epochs 1] [--flags='--optimizer=sgd ...']

All train the scripts' network on the same rows from the same seed, by row-wise Adagrad: with plain
SGD the products of small numbers that `mult` begins with take long to grow. `concat` has D 32, so
that its vectors are as wide as the others'. Bytes are those of the tables and projections in
float32; what an optimiser remembers comes on top.
"""

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch as dlrm  # noqa: E402
from bench.common import output  # noqa: E402
from criteo.prepared import find_prepared
from criteo.spec import DataSpec
from model.compression import compression_from_options

DAYS = 3
MODEL = (
    "--arch-sparse-feature-size=64 --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1"
    " --loss-function=bce --data-set=terabyte --max-ind-range=100000 --memory-map"
    " --data-randomize=none --mini-batch-size=2048 --test-mini-batch-size=16384"
    " --optimizer=rwsadagrad --learning-rate=0.01 --print-freq=20 --print-time"
    " --test-freq=1000000 --mlperf-logging --tensor-board-filename="
)
KINDS = {
    "plain": "",
    "qr mult": "--qr-flag",
    "qr add": "--qr-flag --qr-operation=add",
    "qr concat, D 32": "--qr-flag --qr-operation=concat --arch-sparse-feature-size=32",
    "md": "--md-flag",
    "md, powers of 2": "--md-flag --md-round-dims",
}
HEADER = f"{'tables':<16} {'rows':>10} {'MB':>7} {'of plain':>8} {'ms a step':>9} {'test AUC':>8}"


def measure(flags: list[str]) -> tuple[int, int, float, float]:
    """(rows of all matrices, numbers in them, median ms a step, AUC) of a run."""
    text = output("dlrm_s_pytorch.py", *flags)
    times = [float(time) for time in re.findall(r", ([\d.]+) ms/it", text)]
    auc = float(re.findall(r" auc ([\d.]+),", text)[-1])
    options = dlrm.parse_options(flags)
    prepared = find_prepared(DataSpec.from_options(options))
    tables = compression_from_options(options).make_tables(prepared.counts)
    rows = sum(matrix.num_rows for table in tables for matrix in table.matrices)
    numbers = sum(table.num_values for table in tables)
    return rows, numbers, statistics.median(times[1:]), auc


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_500_000, help="of all days; a sixth tests")
    parser.add_argument("--flags", default="", help="more flags of all runs")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = [f"--make-demo={folder}", f"--demo-rows={options.rows}", f"--demo-days={DAYS}"]
        output("data_utils.py", *demo)
        more = [f"--nepochs={options.epochs}", f"--data_path={folder}", *options.flags.split()]
        print(HEADER, flush=True)
        plain = 0
        for name, kind in KINDS.items():
            rows, numbers, ms, auc = measure([*MODEL.split(), *kind.split(), *more])
            plain = plain or numbers
            sizes = f"{rows:>10,} {4e-6 * numbers:>7.1f} {numbers / plain:>8.3f}"
            print(f"{name:<16} {sizes} {ms:>9.1f} {auc:>8.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
